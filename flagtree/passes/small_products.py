"""Products of few rows as the template `gemm`, for targets whose own product beats the platform's library there.

Decoding one token a sequence reads every weight for a handful of rows.  Where the number of rows is a size of the call, the template
names the operator that takes more of them; the launch chooses once a size.  Runs after fusion: nothing is fused into a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flagtree.ir import gemm
from flagtree.ir.index import Bounds
from flagtree.ir.program import Extern, Numerics, Operand, Program, Ref, Template
from flagtree.passes.base import Fuel, Report
from flagtree.passes.rewrite import replace_externs
from flagtree.targets.base import Target


@dataclass(frozen=True)
class SmallProducts:
    """No options."""

    name: ClassVar[str] = "small_products"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report, fuel = Report(self.name), fuel or Fuel()
        if not target.gemm_rows:
            return program, report
        bounds = Bounds({s.name: (s.lo, s.hi) for s in program.symbols}, {})

        def replacement(step: Extern) -> Template | str | None:
            return _template(program, step, target, bounds) if step.callee == gemm.PRODUCT else None

        return replace_externs(program, report, fuel, replacement), report


def _template(program: Program, step: Extern, target: Target, bounds: Bounds) -> Template | str:
    """The template in the call's place, or why not."""
    operands = tuple(a.buffer for a in step.args if isinstance(a, Ref))
    if len(operands) not in (2, 3) or step.kwargs or step.mutates or step.outputs[0] is None:
        return "a call of another form"
    x, w, *bias = (program.buffer(n) for n in operands)
    y = program.buffer(step.outputs[0])
    limit = max((target.gemm_rows.get(level, {}).get(x.dtype, 0) for level in target.levels), default=0)
    if not limit or any(b.dtype != x.dtype for b in (w, y, *bias)):
        return f"no product of {x.dtype} rows of our own"
    columns, depth = (n.constant for n in w.shape) if len(w.shape) == 2 else (None, None)
    if columns is None or depth is None or not w.is_contiguous:
        return "the weight is no row-major matrix of known sizes"
    if not gemm.COLUMNS[0] <= columns <= gemm.COLUMNS[1] or not gemm.DEPTH[0] <= depth <= gemm.DEPTH[1]:
        return f"{columns} columns of {depth}"
    if bias and (bias[0].shape != w.shape[:1] or not bias[0].is_contiguous):
        return "the bias is not one number a column, side by side"
    if gemm.row_stride(x) is None or not y.is_contiguous or y.role != "temp" or y.alias_of is not None:
        return "the rows do not lie evenly"
    rows = gemm.rows_of(x)
    if any(program.buffer(program.root(s.source[1])).role == "temp" for s in program.symbols if s.name in rows.names()):
        return "the number of rows is known only while the program runs"
    least, most = bounds.minimum(rows), bounds.maximum(rows)
    if least is not None and least > limit:
        return f"more than {limit} rows"
    if bias and (most is None or most > limit):
        return "above its rows the library's biased product rounds otherwise when it writes where ours does"
    otherwise: tuple[tuple[str, Operand], ...] = () if most is not None and most <= limit else ((gemm.OTHERWISE, step.callee),)
    attrs = ((gemm.ROWS_AT_MOST, limit), *otherwise)
    return Template(step.name, "gemm", operands, (y.name,), attrs, (), (), Numerics(fp_contract=True), step.origins)
