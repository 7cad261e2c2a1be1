"""The products of a mixture of experts as kernels of our own, the gate in the first of them, for targets that run tiles.

The call of a library for each expert needs the counts on the host and writes both halves of the gate to memory; a kernel over all experts
needs neither.  Runs after fusion, which made the gate one kernel; nothing is fused into a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flagtree.ir.experts import BLOCK, COLUMN, DOWN, DTYPES_OF, ROW, UP, Names, Product, axes, sums
from flagtree.ir.index import Bounds, Index, floordiv
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
from flagtree.passes.rewrite import bounds, rename
from flagtree.targets.base import Target

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
        taken: set[str] = set()  # names of the steps that went into a product
        for step in steps:
            if isinstance(step, Repeat):
                out.append(replace(step, body=self._steps(program, step.body, report, fuel)))
            elif isinstance(step, Extern) and step.callee in (UP, DOWN):
                gate = _gate(program, steps, step) if step.callee == UP else None
                weight = _dequantised(program, steps, step, 1 if gate is None else 2)
                found = _product(program, step, gate, weight)
                if isinstance(found, Kernel) and fuel.take():
                    report.rewrites += 1
                    report.matched.append(step.name)
                    taken |= {s.name for s in (gate, weight) if s is not None}
                    out.append(found)
                    continue
                if isinstance(found, str):
                    report.refused.append(Refused((step.name,), found))
                out.append(step)
            else:
                out.append(step)
        return tuple(s for s in out if not isinstance(s, Kernel) or s.name not in taken)


def _dequantised(program: Program, steps: tuple[Step, ...], step: Extern, parts: int) -> Kernel | None:
    """The step that makes the call's weight from e4m3fn and a scale a block, for this call alone; each of `parts` ends with a block."""
    weight = step.args[1].buffer if isinstance(step.args[1], Ref) else ""
    makers, readers = [s for s in steps if weight in s.writes], [s for s in steps if weight in s.reads]
    if len(makers) != 1 or len(readers) != 1 or weight in program.outputs or not isinstance(maker := makers[0], Kernel):
        return None
    points = tuple(Index.of(a.name) for a in maker.axes)
    kinds = sorted(op.op for op in maker.body if isinstance(op, Compute))
    if len(points) != 3 or kinds != ["cast", "cast", "mul"] or len(maker.loads) != 2 or len(maker.stores) != 1:
        return None
    if (columns := maker.axes[1].extent.constant) is None or columns // parts % BLOCK:
        return None
    known = bounds(program, maker)  # a dimension of one block has no division left
    blocks = (points[0], *(known.simplify(floordiv(p, Index.of(BLOCK), known)) for p in points[1:]))
    by_type = {op.dtype: op.access for op in maker.loads}
    places = [by_type[t].index if t in by_type else None for t in ("f8e4m3fn", "f32")]
    plain = maker.stores[0].access.index == points and not any(op.access.mask for op in (*maker.loads, *maker.stores))
    return maker if plain and places == [points, blocks] else None


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


def _product(program: Program, step: Extern, gate: Kernel | None, weight: Kernel | None) -> Kernel | str:
    """The kernel in the place of the call, of its gate and of what makes its weight, or why not."""
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
    product = Product(up, x.dtype, top_k, columns // parts, parts, weight is not None)
    stored = {op.dtype: op.access.buffer for op in weight.loads} if weight is not None else {}
    names = Names(starts.name, order.name, x.name, stored.get("f8e4m3fn", w.name), stored.get("f32", ""))
    body, totals, choice = sums(product, names)
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
    origins = tuple(dict.fromkeys(o for s in (step, gate, weight) if s is not None for o in s.origins))
    ops = tuple(dict.fromkeys((step.callee, *(op for s in (gate, weight) if s is not None for op in s.ops))))
    rows, experts = order.shape[0], w.shape[0]
    domain = axes(rows, Index.of(columns // parts), experts, w.shape[2])
    schedule = tiles(program, rows, experts, "r1", DEPTH_BYTES // (4 if x.dtype == "f32" else 2))
    return Kernel(step.name, domain, whole, Numerics(fp_contract=True), schedule, origins, ops)


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


def tiles(program: Program, rows: Index, experts: Index, inside: str, depth: int) -> Schedule:
    """Tiles of few rows unless an expert has more of them when the choices spread evenly; a function of ranges, not of a call's size.
    `depth` elements at a time along `inside`, the axis that is summed."""
    most = Bounds({s.name: (s.lo, s.hi) for s in program.symbols}, {}).maximum(rows)
    tall = FEW if most is not None and most <= FEW * (experts.constant or 1) else MANY
    return Schedule(COLUMN, ((ROW, tall), (COLUMN, COLUMNS), (inside, depth)), (inside,), WARPS, STAGES)
