"""The products of a mixture of experts as kernels of our own, the gate in the first of them, for targets that run tiles.

The call of a library for each expert needs the counts on the host and writes both halves of the gate to memory; a kernel over all experts
needs neither.  Runs after fusion, which made the gate one kernel; nothing is fused into a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flagtree.ir.experts import COLUMN, DTYPES_OF, ROW, Names, Product, axes, sums
from flagtree.ir.index import Bounds, Index
from flagtree.ir.program import (
    Access,
    BodyOp,
    Compute,
    Extern,
    Kernel,
    Load,
    Numerics,
    Program,
    Ref,
    Repeat,
    Schedule,
    Step,
    Store,
    defined,
)
from flagtree.passes.base import Fuel, Refused, Report
from flagtree.passes.rewrite import rename
from flagtree.targets.base import Target

UP, DOWN = "flagtree.experts_up.default", "flagtree.experts_down.default"
FEW, MANY = 16, 64  # rows of a tile: what tl.dot takes at least, and where an expert has more of them
COLUMNS = 64
DEPTH_BYTES = 128  # of one row of a tile along the depth
WARPS, STAGES = 4, 2


@dataclass(frozen=True)
class ExpertProducts:
    """No options."""

    name: ClassVar[str] = "expert_products"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report, fuel = Report(self.name), fuel or Fuel()
        if target.warp <= 1:
            return program, report
        steps = self._steps(program, program.steps, report, fuel)
        return (program.with_(steps=steps) if report.rewrites else program), report

    def _steps(self, program: Program, steps: tuple[Step, ...], report: Report, fuel: Fuel) -> tuple[Step, ...]:
        out: list[Step] = []
        gates: set[str] = set()
        for step in steps:
            if isinstance(step, Repeat):
                out.append(replace(step, body=self._steps(program, step.body, report, fuel)))
            elif isinstance(step, Extern) and step.callee in (UP, DOWN):
                gate = _gate(program, steps, step) if step.callee == UP else None
                found = _product(program, step, gate)
                if isinstance(found, Kernel) and fuel.take():
                    report.rewrites += 1
                    report.matched.append(step.name)
                    gates |= {gate.name} if gate is not None else set()
                    out.append(found)
                    continue
                if isinstance(found, str):
                    report.refused.append(Refused((step.name,), found))
                out.append(step)
            elif step.name not in gates:
                out.append(step)
        return tuple(out)


def _gate(program: Program, steps: tuple[Step, ...], step: Extern) -> Kernel | None:
    """The one reader of the call's result, where it takes columns i and i + half of a row to one element each of what it writes."""
    both = step.outputs[0]
    assert both is not None
    readers = [s for s in steps if both in s.reads]
    if both in program.outputs or len(readers) != 1 or not isinstance(gate := readers[0], Kernel) or len(gate.axes) != 2:
        return None
    if any(not isinstance(op, Load | Compute | Store) for op in gate.body) or any(a.kind != "parallel" for a in gate.axes):
        return None
    row, column = (Index.of(a.name) for a in gate.axes)
    places = {(row, column), (row, column + gate.axes[1].extent)}
    plain = len(gate.loads) == 2 and {op.access.index for op in gate.loads} == places and all(op.access.buffer == both for op in gate.loads)
    store = gate.stores[0]
    one = len(gate.stores) == 1 and store.mode == "set" and store.access.index == (row, column)
    return gate if plain and one and store.access.mask is None and not any(op.access.mask for op in gate.loads) else None


def _product(program: Program, step: Extern, gate: Kernel | None) -> Kernel | str:
    """The kernel in the place of the call and of its gate, or why not."""
    x, w, order, starts = (program.buffer(a.buffer) for a in step.args[:4] if isinstance(a, Ref))
    out, top_k = program.buffer(step.outputs[0] or ""), step.args[4]
    columns, depth = w.shape[1].constant, w.shape[2].constant
    if x.dtype not in DTYPES_OF or x.dtype != w.dtype:
        return f"no product of {x.dtype} rows of our own"
    if columns is None or depth is None or w.shape[0].constant is None or not isinstance(top_k, int):
        return "experts of a size that is known only while the program runs"
    if not all(b.is_contiguous for b in (x, w, order, starts, out)):
        return "operands that do not lie densely"
    up, parts = step.callee == UP, 1 if gate is None else 2
    product = Product(up, x.dtype, top_k, columns // parts, parts)
    body, totals, choice = sums(product, Names(starts.name, order.name, x.name, w.name))
    rounded = [Compute(f"s{k}", x.dtype, "cast", (t,)) for k, t in enumerate(totals)] if x.dtype != "f32" else []
    results = [op.name for op in rounded] or list(totals)
    after: list[BodyOp] = list(rounded)
    if gate is not None:
        after += _after(gate, dict(zip((ROW, COLUMN), gate.axes, strict=True)), results)
    elif up:
        after.append(Store(Access(out.name, (Index.of(ROW), Index.of(COLUMN))), results[0]))
    else:
        after += [Compute("place", "i32", "mod", (choice.name, top_k)),  # type: ignore[arg-type]
                  Store(Access(out.name, (Index.of("v6"), Index.of("place"), Index.of(COLUMN))), results[0])]  # fmt: skip
    whole = _numbered((*body, *after))
    members = (step, gate) if gate is not None else (step,)
    origins = tuple(dict.fromkeys(o for s in members for o in s.origins))
    ops = tuple(dict.fromkeys((step.callee, *(gate.ops if gate is not None else ()))))
    rows, experts = order.shape[0], w.shape[0]
    domain = axes(rows, Index.of(columns // parts), experts, w.shape[2])
    return Kernel(step.name, domain, whole, Numerics(fp_contract=True), _schedule(program, product, rows, experts), origins, ops)


def _after(gate: Kernel, own: dict, results: list[str]) -> list[BodyOp]:
    """The gate's body on the sums instead of its loads."""
    moved = {axis.name: Index.of(name) for name, axis in own.items()}
    first = Index.of(gate.axes[1].name)
    names = {n: f"g{n}" for op in gate.body for n in defined(op)}
    names |= {op.name: results[0 if op.access.index[1] == first else 1] for op in gate.loads}
    return [rename(op, names, moved) for op in gate.body if not isinstance(op, Load)]


def _numbered(body: tuple[BodyOp, ...]) -> tuple[BodyOp, ...]:
    names = {n: f"v{k}" for k, n in enumerate(n for op in body for n in defined(op))}
    return tuple(rename(op, names) for op in body)


def _schedule(program: Program, product: Product, rows: Index, experts: Index) -> Schedule:
    """Tiles of few rows unless an expert has more of them when the choices spread evenly; a function of ranges, not of a call's size."""
    most = Bounds({s.name: (s.lo, s.hi) for s in program.symbols}, {}).maximum(rows)
    tall = FEW if most is not None and most <= FEW * (experts.constant or 1) else MANY
    depth = DEPTH_BYTES // (4 if product.dtype == "f32" else 2)
    return Schedule(COLUMN, ((ROW, tall), (COLUMN, COLUMNS), ("r1", depth)), ("r1",), WARPS, STAGES)
