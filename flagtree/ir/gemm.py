"""The template `gemm` as the kernel that computes it for a few rows: one text for every size, so one compiled kernel an element type.

y[i, j] = sum over k of x[i, k] * w[j, k], in f32 with fused multiply-adds, rounded once to the element type.  `canonical.py` hands it
out as a template's isolated form; sizes and x's row stride are symbols that the launch passes.
"""

from __future__ import annotations

import functools

from flagtree.ir.index import Index, contiguous_strides
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Buffer, Program, Template

COLUMNS, DEPTH = (16, 1 << 20), (64, 1 << 18)  # least and most: other products stay with the platform's library
_FURTHEST = 1 << 31  # elements from row to row of x
PRODUCT = "aten.linear.default"  # what it computes
ROWS_AT_MOST = "rows_at_most"  # attribute: the rows up to which the kernel is used
OTHERWISE = "otherwise"  # attribute: the operator that takes more rows, where there can be more

_TEXT = """
program isolated
  symbol n0 in 0..{rows} from argument
  symbol n1 in {columns[0]}..{columns[1]} from argument
  symbol n2 in {depth[0]}..{depth[1]} from argument
  symbol n3 in {depth[0]}..{furthest} from argument
  buffer b0: {dtype}[n0, n2] input strides(n3, 1)
  buffer b1: {dtype}[n1, n2] input
  buffer b2: {dtype}[n0, n1] temp
  kernel kernel {{i0 < n0, i1 < n1}} reduce {{r0 < n2}} numerics(eager, contract=on, acc=f32)
{body}
  outputs b2
"""
_PLAIN = (
    "v0: f32 = load b0[i0, r0]", "v1: f32 = load b1[i1, r0]", "v2: f32 = mul v0, v1", "v3: f32 = sum v2 over r0", "store b2[i0, i1] = v3",
)  # fmt: skip
_HALF = (
    "v0: {0} = load b0[i0, r0]", "v1: f32 = cast v0", "v2: {0} = load b1[i1, r0]", "v3: f32 = cast v2", "v4: f32 = mul v1, v3",
    "v5: f32 = sum v4 over r0", "v6: {0} = cast v5", "store b2[i0, i1] = v6",
)  # fmt: skip


@functools.cache
def product(dtype: str, rows: int) -> Program:
    """The isolated kernel for up to `rows` rows: b0 = x, b1 = w, b2 = y; n0 rows, n1 columns, n2 depth, n3 elements between rows of x."""
    body = "\n".join(f"    {line.format(dtype)}" for line in (_PLAIN if dtype == "f32" else _HALF))
    return parse_program(_TEXT.format(rows=rows, columns=COLUMNS, depth=DEPTH, furthest=_FURTHEST, dtype=dtype, body=body))


def above_reason(template: Template) -> str:
    """Why more rows are a call."""
    return f"matrix product of more than {rows_at_most(template)} rows: the platform's library"


def is_product(program: Program) -> bool:
    """Is an isolated kernel this one?"""
    return len(program.buffers) == 3 and len(program.symbols) == 4 and program == product(program.buffers[0].dtype, program.symbols[0].hi)


def row_stride(x: Buffer) -> Index | None:
    """Elements from row to row when x[..., K] is seen as a matrix, None where its rows do not lie evenly."""
    shape, strides = x.shape, x.layout
    if not shape or (strides[-1].constant != 1 and shape[-1].constant != 1):
        return None
    outer = [(n, s) for n, s in zip(shape[:-1], strides[:-1], strict=True) if n.constant != 1]
    if not outer:
        return shape[-1]
    sizes = tuple(n for n, _ in outer)
    last = outer[-1][1]
    return last if all(s == c * last for (_, s), c in zip(outer, contiguous_strides(sizes), strict=True)) else None


def rows_of(x: Buffer) -> Index:
    """The rows of x[..., K] seen as a matrix."""
    rows = Index.of(1)
    for n in x.shape[:-1]:
        rows = rows * n
    return rows


def arguments(program: Program, template: Template) -> tuple[Index, ...]:
    """What a launch passes for n0, n1, n2, n3."""
    x, w = (program.buffer(n) for n in template.operands)
    stride = row_stride(x)
    assert stride is not None, "a pass chose the template for rows that do not lie evenly"
    return rows_of(x), w.shape[0], w.shape[1], stride


def rows_at_most(template: Template) -> int:
    """The rows up to which the kernel is used."""
    value = dict(template.attrs)[ROWS_AT_MOST]
    assert isinstance(value, int)
    return value
