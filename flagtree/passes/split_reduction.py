"""Split a long column reduction (a bias's or a norm weight's gradient) into partial sums over blocks of rows and their final sum.

One pass down all rows leaves as many parallel pieces as there are columns, too few for threads or a GPU.  The blocks depend on nothing
but the kernel's text, so the result is one value whatever the level, the threads or the batch.  Runs just before `schedule`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import Index
from flagtree.ir.program import (
    Access,
    Arg,
    Axis,
    BodyOp,
    Buffer,
    Compute,
    IndexValue,
    Kernel,
    Load,
    Program,
    Reduce,
    Scan,
    Step,
    Store,
    defined,
    operands,
)
from flagtree.ir.verify import unproved
from flagtree.passes.base import Fuel, Refused, Report
from flagtree.passes.rewrite import bounds, free_axes, prune, rename, renumber
from flagtree.targets.base import Target

BLOCK = 256  # rows of one partial sum; the longest divisor of a constant extent that is no longer, so that no mask is needed
SHORTEST = 64  # a divisor below this is not worth having: blocks of BLOCK rows with a mask instead
COLUMNS = 16384  # with so many columns there is work enough without a split
IDENTITY: dict[str, object] = {"sum": 0, "prod": 1, "any": False, "all": True}


@dataclass(frozen=True)
class SplitReduction:
    """`rows`: the shortest reduced axis that is split."""

    name: ClassVar[str] = "split_reduction"
    version: ClassVar[int] = 1
    rows: int = 1024

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report, fuel = Report(self.name), fuel or Fuel()
        steps: list[Step] = []
        buffers: list[Buffer] = []
        for step in program.steps:
            axis = self._axis(program, step, report) if isinstance(step, Kernel) else None
            if axis is None or not isinstance(step, Kernel):
                steps.append(step)
                continue
            partial, final, made = split(step, axis)
            why = unproved(program.with_(buffers=(*program.buffers, *made)), partial)
            if why is not None:  # right, but no reader could know
                report.refused.append(Refused((step.name,), f"the partial sums cannot be proved: {why}"))
            if why is not None or not fuel.take():
                steps.append(step)
                continue
            steps += [partial, final]
            buffers += made
            report.rewrites += 1
            report.matched.append(f"{step.name} in blocks of {block_of(axis.extent)} along {axis.name}")
        if not report.rewrites:
            return program, report
        return program.with_(steps=tuple(steps), buffers=(*program.buffers, *buffers)), report

    def _axis(self, program: Program, kernel: Kernel, report: Report) -> Axis | None:
        """The reduced axis to split: the longest, where the kernel reduces columns and nothing speaks against it."""
        reduced = [a for a in kernel.axes if a.kind == "reduce"]
        known = bounds(program, kernel)
        lengths = {a.name: known.maximum(a.extent) for a in reduced}
        long = [a for a in reduced if (n := lengths[a.name]) is None or n >= self.rows]
        if not long or kernel.schedule is not None or not _reduces_columns(program, kernel):
            return None
        why = _refusal(kernel)
        if why is not None:
            report.refused.append(Refused((kernel.name,), why))
            return None
        columns = 1
        for axis in kernel.axes:
            columns *= (axis.extent.constant or 1) if axis.kind == "parallel" else 1
        if columns >= COLUMNS:
            report.refused.append(Refused((kernel.name,), f"{columns} columns are work enough"))
            return None
        return max(long, key=lambda a: (lengths[a.name] or 1 << 62, a.name))


def _reduces_columns(program: Program, kernel: Kernel) -> bool:
    """Do neighbours in memory belong to different results?  What varies along one kind of axis only (a row's scale) says nothing."""
    kinds = {a.name: a.kind for a in kernel.axes}
    contiguous = []
    for load in kernel.loads:
        if {kinds.get(n) for i in load.access.index for n in i.names()} >= {"parallel", "reduce"}:
            strides = program.buffer(load.access.buffer).layout
            inner = next((i.name for i, s in zip(load.access.index, strides, strict=True) if s.constant == 1 and i.name), None)
            contiguous.append(kinds.get(inner or ""))
    return "parallel" in contiguous and "reduce" not in contiguous


def _refusal(kernel: Kernel) -> str | None:
    axes = {a.name for a in kernel.axes}
    reduced = {a.name for a in kernel.axes if a.kind == "reduce"}
    free = free_axes(kernel.body, axes)
    made: set[str] = set()  # values that need a reduction
    for op in kernel.body:
        late = any(n in made for n in operands(op))
        if isinstance(op, Scan):
            return "it scans"
        if isinstance(op, Reduce):
            if late:
                return "a reduction needs the result of another"
            if op.combiner not in IDENTITY or set(op.axes) != reduced:
                return f"{op.combiner} over {', '.join(op.axes)} has no partial form"
        if isinstance(op, Store):
            swept = free.get(op.value, frozenset()) | {n for i in op.access.index for n in i.names() if n in axes}
            if swept & reduced or op.mode != "set":
                return "it stores at each row"
        if late or isinstance(op, Reduce):
            made.update(defined(op))
    written = {s.access.buffer for s in kernel.stores}
    return "it reads what it writes" if any(load.access.buffer in written for load in kernel.loads) else None


def block_of(extent: Index) -> int:
    """Rows of one partial sum."""
    n = extent.constant
    divisor = next((b for b in range(BLOCK, SHORTEST - 1, -1) if n % b == 0), None) if n is not None else None
    return divisor or BLOCK


def split(kernel: Kernel, axis: Axis) -> tuple[Kernel, Kernel, list[Buffer]]:
    """(partial, final, the buffers between them: one number a block and column for each reduction)."""
    size = block_of(axis.extent)
    blocks = (axis.extent + (size - 1)) // size
    block, row = Axis("block~", blocks), Axis("row~", Index.of(size), "reduce")
    parallel = [a for a in kernel.axes if a.kind == "parallel"]
    columns = [Index.of(a.name) for a in parallel]
    reduces = [op for op in kernel.body if isinstance(op, Reduce)]
    made = [Buffer(f"{kernel.name}_partial{k}", op.dtypes[0], (blocks, *(a.extent for a in parallel))) for k, op in enumerate(reduces)]
    at = Index.of(block.name) * size + Index.of(row.name)
    masked = axis.extent.constant is None or axis.extent.constant % size != 0
    body = list(_partial_body(kernel, axis, row, at, masked))
    body += [Store(Access(b.name, (Index.of(block.name), *columns)), op.names[0]) for b, op in zip(made, reduces, strict=True)]
    others = [a for a in kernel.axes if a.kind == "reduce" and a is not axis]
    partial = replace(kernel, name=f"{kernel.name}_partial", axes=(block, *parallel, *others, row), body=prune(body))
    q = Axis("block~", blocks, "reduce")
    rest: list[BodyOp] = []
    for op in kernel.body:
        if isinstance(op, Reduce):
            buffer = made[reduces.index(op)]
            rest.append(Load(f"{op.names[0]}~", op.dtypes[0], Access(buffer.name, (Index.of(q.name), *columns))))
            rest.append(replace(op, args=(f"{op.names[0]}~",), axes=(q.name,)))
        else:
            rest.append(op)
    final = replace(kernel, axes=(*parallel, q), body=prune(rest))
    return renumber(partial), renumber(final), made


def _partial_body(kernel: Kernel, axis: Axis, row: Axis, at: Index, masked: bool) -> Iterator[BodyOp]:
    """The kernel's values with the split axis at its place in the block; rows past the end touch no memory and count nothing."""
    inside = "inside~"
    if masked:
        yield IndexValue("at~", "i64", at)
        yield IndexValue("end~", "i64", axis.extent)
        yield Compute(inside, "b1", "lt", ("at~", "end~"))
    for op in kernel.body:
        if isinstance(op, Store):
            continue
        moved = rename(op, {}, {axis.name: at})
        if isinstance(moved, Load) and masked and any(axis.name in i.names() for i in op.access.index):  # type: ignore[union-attr]
            if moved.access.mask is not None:
                both = f"{moved.name}_inside~"
                yield Compute(both, "b1", "and", (moved.access.mask, inside))
                moved = replace(moved, access=replace(moved.access, mask=both))
            else:
                moved = replace(moved, access=replace(moved.access, mask=inside), other=_literal(0, moved.dtype))
        if isinstance(moved, Reduce) and isinstance(op, Reduce):
            if masked:
                kept = f"{op.names[0]}_kept~"
                identity: Arg = _literal(IDENTITY[op.combiner], op.dtypes[0])
                yield Compute(kept, op.dtypes[0], "where", (inside, op.args[0], identity))
                moved = replace(moved, args=(kept,))
            moved = replace(moved, axes=tuple(row.name if x == axis.name else x for x in op.axes))
        yield moved


def _literal(value: object, dtype: str) -> bool | int | float:
    return bool(value) if dtype == "b1" else float(value) if DTYPES[dtype].is_float else int(value)  # type: ignore[call-overload, arg-type]
