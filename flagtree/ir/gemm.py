"""The template `gemm` as the kernel that computes it for a few rows: one text for every size, so one compiled kernel an element type.

y[i, j] = sum over k of x[i, k] * w[j, k], plus bias[j] where there is one: in f32 with fused multiply-adds, rounded once to the element
type.  `canonical.py` hands it out as a template's isolated form; sizes and x's row stride are symbols that the launch passes.
"""

from __future__ import annotations

import functools

from flagtree.ir.index import Index, contiguous_strides
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Buffer, Program, Template

# least and most: others stay with the platform's library.  Sixteen running sums of f32 lose what the library loses (RMS 1.1e-3 at
# a depth of 2^18), but more than verify allows beside the interpreter's pairwise sums from 2^17 on
COLUMNS, DEPTH = (16, 1 << 20), (32, 1 << 16)
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
{bias}  buffer {result}: {dtype}[n0, n1] temp
  kernel kernel {{i0 < n0, i1 < n1}} reduce {{r0 < n2}} numerics(eager, contract=on, acc=f32)
{body}
  outputs {result}
"""


@functools.cache
def product(dtype: str, rows: int, bias: bool = False) -> Program:
    """The isolated kernel for up to `rows` rows: b0 = x, b1 = w, b2 = the bias if there is one, the last buffer y; n0 rows, n1 columns,
    n2 depth, n3 elements between rows of x."""
    body: list[str] = []

    def value(text: str, kind: str = "f32") -> str:
        body.append(f"    v{len(body)}: {kind} = {text}")
        return f"v{len(body) - 1}"

    def widened(access: str) -> str:
        loaded = value(f"load {access}", dtype)
        return loaded if dtype == "f32" else value(f"cast {loaded}")

    x, w = widened("b0[i0, r0]"), widened("b1[i1, r0]")
    result = value(f"sum {value(f'mul {x}, {w}')} over r0")
    if bias:
        result = value(f"add {result}, {widened('b2[i1]')}")
    if dtype != "f32":
        result = value(f"cast {result}", dtype)
    y = "b3" if bias else "b2"
    body.append(f"    store {y}[i0, i1] = {result}")
    declared = f"  buffer b2: {dtype}[n1] input\n" if bias else ""
    sizes = {"rows": rows, "columns": COLUMNS, "depth": DEPTH, "furthest": _FURTHEST}
    return parse_program(_TEXT.format(**sizes, dtype=dtype, bias=declared, result=y, body="\n".join(body)))


def above_reason(template: Template) -> str:
    """Why more rows are a call."""
    return f"matrix product of more than {rows_at_most(template)} rows: the platform's library"


def is_product(program: Program) -> bool:
    """Is an isolated kernel this one?"""
    if len(program.buffers) not in (3, 4) or len(program.symbols) != 4:
        return False
    return program == product(program.buffers[0].dtype, program.symbols[0].hi, has_bias(program))


def has_bias(program: Program) -> bool:
    """Does the isolated kernel add a bias?"""
    return len(program.buffers) == 4


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
    x, w = (program.buffer(n) for n in template.operands[:2])
    stride = row_stride(x)
    assert stride is not None, "a pass chose the template for rows that do not lie evenly"
    return rows_of(x), w.shape[0], w.shape[1], stride


def rows_at_most(template: Template) -> int:
    """The rows up to which the kernel is used."""
    value = dict(template.attrs)[ROWS_AT_MOST]
    assert isinstance(value, int)
    return value
