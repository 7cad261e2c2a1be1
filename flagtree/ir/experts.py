"""Products as kernels: rows sorted by expert times that expert's weights, or all rows times one, and what follows for each element.

Invariant: the body says it all (which expert, which rows, the sums, the roundings), so that the interpreter, the digest and the counted
bytes need nothing else; code generation for GPUs knows the body again (`known`) and writes tiles.  `passes/expert_products.py` makes those
of floats, `passes/scaled_products.py` those of e4m3fn or int8 with scales on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import Index, floordiv
from flagtree.ir.program import Access, Axis, BodyOp, Compute, IndexValue, Kernel, Load, Program, Reduce, Store

ROW, COLUMN, EXPERT, DEPTH = "i0", "i1", "r0", "r1"  # the axes of every such kernel
DTYPES_OF = frozenset({"f32", "f16", "bf16"})
SCALED = frozenset({"f8e4m3fn", "i8"})
UP, DOWN = "flagtree.experts_up.default", "flagtree.experts_down.default"  # the calls that such kernels take the place of
UP_SCALED, DOWN_SCALED, LINEAR_SCALED = (
    f"flagtree.{name}.default" for name in ("experts_up_scaled", "experts_down_scaled", "scaled_linear")
)
BLOCK = 128  # rows and columns of w that share a scale, where it is quantised


@dataclass(frozen=True, slots=True)
class Product:
    """`up`: row i0 is token order[i0] // top_k of x, else row i0 of x, whose result goes to place order[i0].  `parts`: the columns of w
    that one column of the result takes are i1, i1 + inner, … (the gate and what it gates: two)."""

    up: bool
    dtype: str
    top_k: int
    inner: int
    parts: int
    quantised: bool = False  # w is e4m3fn with a scale for each block of 128 x 128; taken back and rounded to `dtype` as it is read
    scaled: str = ""  # the type of x and w, f8e4m3fn or i8: the products of a block are summed alone, then scaled by both its scales
    group: int = 0  # columns of x and w to a scale,
    shared: int = 0  # rows of w to a scale
    dense: bool = False  # one w [inner, K] for all rows: no experts


@dataclass(frozen=True, slots=True)
class Names:
    """The buffers of a product: order i32 [N], starts i32 [E + 1] (none where dense), x, w [E, parts * inner, K], scales of both."""

    starts: str
    order: str
    x: str
    w: str
    scales: str = ""
    x_scales: str = ""


def scaled_axes(product: Product, rows: Index, experts: Index, blocks: Index) -> tuple[Axis, ...]:
    """The domain of a scaled product: as `axes`, the depth in blocks and places within them; no experts where dense."""
    whole = (Index.of(product.inner), *(() if product.dense else (experts,)), blocks, Index.of(product.group))
    kinds = ["parallel", "parallel", *["reduce"] * (len(whole) - 1)]
    names = (ROW, COLUMN, *(f"r{k}" for k in range(len(whole) - 1)))
    return tuple(Axis(n, e, k) for n, e, k in zip(names, (rows, *whole), kinds, strict=True))


def axes(rows: Index, columns: Index, experts: Index, depth: Index) -> tuple[Axis, ...]:
    """The domain: rows sorted by expert, columns of the result; reduced over experts and over the depth."""
    return Axis(ROW, rows), Axis(COLUMN, columns), Axis(EXPERT, experts, "reduce"), Axis(DEPTH, depth, "reduce")


def sums(product: Product, names: Names) -> tuple[tuple[BodyOp, ...], tuple[str, ...], Index]:
    """(body, the f32 sums that it ends in, the row's choice order[i0] as an index).  The row's expert is the number of experts that end
    before or at it."""
    body: list[BodyOp] = [] if product.dense else [
        Load("v0", "i32", Access(names.starts, (Index.of(EXPERT) + 1,))),
        IndexValue("v1", "i32", Index.of(ROW)),
        Compute("v2", "b1", "le", ("v0", "v1")),
        Compute("v3", "i32", "cast", ("v2",)),
        Reduce(("v4",), ("i32",), "sum", ("v3",), (EXPERT,)),
        Load("v5", "i32", Access(names.order, (Index.of(ROW),))),
        Compute("v6", "i32", "floordiv", ("v5", product.top_k)),
    ]

    def add(op: type[Load] | type[Compute], dtype: str, *rest: object) -> str:
        body.append(op(name := f"v{len(body)}", dtype, *rest))  # type: ignore[arg-type]
        return name

    def wide(name: str) -> str:
        return name if product.dtype == "f32" else add(Compute, "f32", "cast", (name,))

    row = Index.of("v6") if product.up else Index.of(ROW)
    if product.scaled:
        total = _scaled(product, names, row, add, body)
        return tuple(body), (total,), Index.of(ROW if product.dense else "v5")
    x = wide(add(Load, product.dtype, Access(names.x, (row, Index.of(DEPTH)))))
    found = []
    for part in range(product.parts):
        column = Index.of(COLUMN) + part * product.inner
        stored = "f8e4m3fn" if product.quantised else product.dtype
        w = add(Load, stored, Access(names.w, (Index.of("v4"), column, Index.of(DEPTH))))
        if product.quantised:
            block = (Index.of("v4"), floordiv(column, Index.of(BLOCK)), floordiv(Index.of(DEPTH), Index.of(BLOCK)))
            scale = add(Load, "f32", Access(names.scales, block))
            w = add(Compute, "f32", "mul", (add(Compute, "f32", "cast", (w,)), scale))
            w = w if product.dtype == "f32" else add(Compute, product.dtype, "cast", (w,))
        w = wide(w)
        term = add(Compute, "f32", "mul", (x, w))
        body.append(Reduce((name := f"v{len(body)}",), ("f32",), "sum", (term,), (DEPTH,)))
        found.append(name)
    return tuple(body), tuple(found), Index.of("v5")


def _scaled(product: Product, names: Names, row: Index, add: Callable[..., str], body: list[BodyOp]) -> str:
    """The sum over blocks of each block's own sum times its two scales."""
    expert = () if product.dense else (Index.of("v4"),)
    block, place = (Index.of(n) for n in (("r0", "r1") if product.dense else ("r1", "r2")))
    depth, column = block * product.group + place, Index.of(COLUMN)
    accumulator = "i32" if product.scaled == "i8" else "f32"
    sides = [add(Load, product.scaled, Access(n, at)) for n, at in ((names.x, (row, depth)), (names.w, (*expert, column, depth)))]
    term = add(Compute, accumulator, "mul", tuple(add(Compute, accumulator, "cast", (side,)) for side in sides))
    body.append(Reduce((part := f"v{len(body)}",), (accumulator,), "sum", (term,), (str(place),)))
    if accumulator != "f32":
        part = add(Compute, "f32", "cast", (part,))
    shared = column if product.shared == 1 else floordiv(column, Index.of(product.shared))
    scales = (add(Load, "f32", Access(names.x_scales, (row, block))), add(Load, "f32", Access(names.scales, (*expert, shared, block))))
    scaled = add(Compute, "f32", "mul", (part, add(Compute, "f32", "mul", scales)))
    body.append(Reduce((total := f"v{len(body)}",), ("f32",), "sum", (scaled,), (str(block),)))
    return total


@dataclass(frozen=True, slots=True)
class Known:
    """A product read back from a kernel: `after` follows the sums, for each element of the result."""

    product: Product
    names: Names
    sums: tuple[str, ...]
    after: tuple[BodyOp, ...]


def known(program: Program, kernel: Kernel) -> Known | None:
    """The product that a kernel with canonical names is, or None."""
    loads = kernel.loads
    if kernel.numerics.fp_contract and len(loads) >= 4 and any(op.dtype in SCALED for op in loads[:3]):
        return _known_scaled(program, kernel)
    if not kernel.numerics.fp_contract or len(loads) < 4 or [a.name for a in kernel.axes] != [ROW, COLUMN, EXPERT, DEPTH]:
        return None
    names = Names(*(op.access.buffer for op in loads[:4]))
    quantised = program.buffer(names.w).dtype == "f8e4m3fn"
    if quantised and len(loads) > 4:
        names = replace(names, scales=loads[4].access.buffer)
    divisor = next((op.args[1] for op in kernel.body if isinstance(op, Compute) and op.op == "floordiv"), None)
    inner = kernel.axes[1].extent.constant
    if not isinstance(divisor, int) or isinstance(divisor, bool) or inner is None:
        return None
    up = loads[2].access.index[0] != Index.of(ROW)
    parts = (len(loads) - 3) // (2 if quantised else 1)
    product = Product(up, program.buffer(names.x).dtype, divisor, inner, parts, quantised)
    if product.dtype not in DTYPES_OF or not DTYPES[product.dtype].is_float:
        return None
    body, found, _ = sums(product, names)
    after = kernel.body[len(body):]
    if kernel.body[: len(body)] != body or not all(isinstance(op, Compute | Store) for op in after):
        return None
    return Known(product, names, found, after)


def _known_scaled(program: Program, kernel: Kernel) -> Known | None:
    """A scaled product read back."""
    loads, dense = kernel.loads, kernel.loads[0].dtype in SCALED
    found = loads if dense else loads[2:]
    inner, group = kernel.axes[1].extent.constant, kernel.axes[-1].extent.constant
    if len(found) != 4 or len(kernel.axes) != (4 if dense else 5) or inner is None or group is None or not kernel.stores:
        return None
    starts, order = ("", "") if dense else (loads[0].access.buffer, loads[1].access.buffer)
    names = Names(starts, order, *(found[k].access.buffer for k in (0, 1, 3, 2)))
    divisor = next((op.args[1] for op in kernel.body if isinstance(op, Compute) and op.op == "floordiv"), 1)
    up = not dense and found[0].access.index[0] != Index.of(ROW)
    shared = 1 if found[3].access.index[-2] == Index.of(COLUMN) else BLOCK
    dtype = program.buffer(kernel.stores[0].access.buffer).dtype
    if isinstance(divisor, bool) or not isinstance(divisor, int):
        return None
    product = Product(up, dtype, divisor, inner, 1, scaled=found[0].dtype, group=group, shared=shared, dense=dense)
    body, totals, _ = sums(product, names)
    after = kernel.body[len(body):]
    plain = kernel.body[: len(body)] == body and all(isinstance(op, Compute | Store) for op in after)
    return Known(product, names, totals, after) if plain else None
