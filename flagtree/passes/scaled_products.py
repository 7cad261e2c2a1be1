"""Products of quantised activations and weights as kernels of our own, for targets that run tiles.

No library that every platform has takes e4m3fn or int8 with a scale for each group on both sides; a tile of 128 along the depth is one
group, so that its sum is scaled once.  Runs after fusion; nothing is fused into a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flagtree.ir.experts import (
    BLOCK,
    COLUMN,
    DOWN_SCALED,
    DTYPES_OF,
    LINEAR_SCALED,
    ROW,
    SCALED,
    UP_SCALED,
    Names,
    Product,
    scaled_axes,
    sums,
)
from flagtree.ir.index import Index
from flagtree.ir.program import Access, BodyOp, Buffer, Compute, Extern, Kernel, Numerics, Program, Ref, Store
from flagtree.passes.base import Fuel, Report
from flagtree.passes.expert_products import tiles
from flagtree.passes.rewrite import replace_externs
from flagtree.targets.base import Target

STEP = 128  # of the depth, one group at most


@dataclass(frozen=True)
class ScaledProducts:
    """No options."""

    name: ClassVar[str] = "scaled_products"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report, fuel = Report(self.name), fuel or Fuel()
        if target.warp <= 1:
            return program, report

        def replacement(step: Extern) -> Kernel | str | None:
            return _kernel(program, step) if step.callee in (LINEAR_SCALED, UP_SCALED, DOWN_SCALED) else None

        return replace_externs(program, report, fuel, replacement), report


def _kernel(program: Program, step: Extern) -> Kernel | str:
    """The kernel in the place of a call, or why not."""
    buffers = [program.buffer(a.buffer) for a in step.args if isinstance(a, Ref)]
    x, scales, w, w_scales = buffers[:4]
    out, dense = program.buffer(step.outputs[0] or ""), step.callee == LINEAR_SCALED
    columns, depth, blocks = (n.constant for n in (w.shape[-2], w.shape[-1], w_scales.shape[-1]))
    if columns is None or depth is None or blocks is None or (not dense and w.shape[0].constant is None):
        return "a weight of a size that is known only while the program runs"
    if x.dtype not in SCALED or out.dtype not in DTYPES_OF or len(x.shape) != 2:
        return f"no product of our own of {x.dtype} of {len(x.shape)} dimensions to {out.dtype}"
    if not all(b.is_contiguous for b in (*buffers, out)):
        return "operands that do not lie densely"
    group, shared = depth // blocks, 1 if w_scales.shape[-2] == w.shape[-2] else BLOCK
    if blocks > 1 and group != STEP:
        return f"groups of {group}: a tile takes {STEP}"
    top_k = 1 if dense else step.args[6]
    assert isinstance(top_k, int)
    product = Product(step.callee == UP_SCALED, out.dtype, top_k, columns, 1, scaled=x.dtype, group=group, shared=shared, dense=dense)
    order, starts = ("", "") if dense else (b.name for b in buffers[4:6])
    names = Names(starts, order, x.name, w.name, w_scales.name, scales.name)
    body, (total,), choice = sums(product, names)
    rows = x.shape[0] if dense else program.buffer(order).shape[0]
    experts = Index.of(1) if dense else w.shape[0]
    domain = scaled_axes(product, rows, experts, Index.of(blocks))
    after = _after(product, out, total, choice)
    schedule = tiles(program, rows, experts, "r1" if dense else "r2", STEP)
    return Kernel(step.name, domain, (*body, *after), Numerics(fp_contract=True), schedule, step.origins, (step.callee,))


def _after(product: Product, out: Buffer, total: str, choice: Index) -> tuple[BodyOp, ...]:
    """The sum rounded to the result's type and stored at its row, or at its choice's place."""
    at: tuple[Index, ...] = (Index.of(ROW), Index.of(COLUMN))
    ops: list[BodyOp] = []
    if product.dtype != "f32":
        ops.append(Compute("rounded", product.dtype, "cast", (total,)))
        total = "rounded"
    if not product.dense and not product.up:
        ops.append(Compute("place", "i32", "mod", (choice.name, product.top_k)))  # type: ignore[arg-type]
        at = (Index.of("v6"), Index.of("place"), Index.of(COLUMN))
    return (*ops, Store(Access(out.name, at), total))
