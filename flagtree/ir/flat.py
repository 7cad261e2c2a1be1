"""An isolated kernel with every access as one flat element offset: what both code generators start from.

Strides are applied, axes of extent one are gone, neighbouring axes that every access walks as one are one axis.
Order in the flow: ir.canonical isolates, `flatten` here, `segments` splits a loop where an index changes branch, then C++ or Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flagtree.errors import CodegenError
from flagtree.ir.index import ZERO, Bounds, Index
from flagtree.ir.index import flatten as flat_offset
from flagtree.ir.program import (
    Access,
    Axis,
    BodyOp,
    Buffer,
    IndexValue,
    Kernel,
    Load,
    Numerics,
    Program,
    Reduce,
    Scan,
    Schedule,
    Store,
    indices,
    operands,
)  # fmt: skip

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class FlatKernel:
    """One kernel whose accesses have a one-element `index`: the offset in elements from element 0 of the buffer.

    `depends`: for each SSA value the axes that it varies over.  `dtypes`: of each value.  `spans`: for each buffer the
    largest offset that the declaration allows, as an Index over symbols.
    """

    axes: tuple[Axis, ...]
    body: tuple[BodyOp, ...]
    bounds: Bounds
    numerics: Numerics
    schedule: Schedule | None
    buffers: tuple[Buffer, ...]
    symbols: tuple[str, ...]
    depends: Mapping[str, frozenset[str]]
    dtypes: Mapping[str, str]
    spans: Mapping[str, Index]

    @property
    def parallel(self) -> tuple[Axis, ...]:
        return tuple(a for a in self.axes if a.kind != "reduce")

    @property
    def reduced(self) -> tuple[Axis, ...]:
        return tuple(a for a in self.axes if a.kind == "reduce")

    def axis(self, name: str) -> Axis:
        """The axis of that name; StopIteration when there is none."""
        return next(a for a in self.axes if a.name == name)

    def op_depends(self, op: BodyOp) -> frozenset[str]:
        """The axes for whose points `op` is executed: for a store, those of its offset, value and mask."""
        return _op_depends(op, self.depends, frozenset(a.name for a in self.axes))

    def fits_int32(self, value: Index) -> bool:
        """Proved by ranges: every intermediate and the value itself fit a signed 32-bit integer."""
        low, high = self.bounds.minimum(value), self.bounds.maximum(value)
        return low is not None and high is not None and low >= -INT32_MAX and high <= INT32_MAX

    def access_fits_int32(self, access: Access) -> bool:
        """The offset fits 32 bits wherever the element is touched: by ranges, or because the buffer itself is small enough."""
        return self.fits_int32(access.index[0]) or self.fits_int32(self.spans[access.buffer])


def flatten(program: Program, collapse: bool = True) -> FlatKernel:
    """FlatKernel of a program with exactly one step, a kernel (`ir.canonical.isolate` makes one).

    Raises CodegenError when the program is not of that form or a reduction takes no axis that exists.
    """
    if len(program.steps) != 1 or not isinstance(program.steps[0], Kernel):
        raise CodegenError("cannot generate code for this program", where=program.name, why="it is not one isolated kernel")
    kernel = program.steps[0]
    bounds = Bounds({s.name: (s.lo, s.hi) for s in program.symbols}, {a.name: a.extent for a in kernel.axes})
    body = tuple(map_indices(op, lambda i: i, {b.name: b for b in program.buffers}) for op in kernel.body)
    axes, body = _drop_unit_axes(kernel.axes, body)
    schedule = kernel.schedule
    if collapse:
        axes, body, schedule = _collapse(axes, body, schedule, bounds)
    bounds = Bounds(bounds.symbols, {a.name: a.extent for a in axes})
    positions = {op.name: op.expr for op in body if isinstance(op, IndexValue)}
    body = tuple(map_indices(op, lambda e: bounds.simplify(e.substitute(positions))) for op in body)
    return _assemble(axes, body, bounds, schedule, kernel.numerics, program)


def part(kernel: FlatKernel, axes: tuple[Axis, ...], body: tuple[BodyOp, ...], scratch: tuple[Buffer, ...]) -> FlatKernel:
    """Some ops of a kernel over its axes (one may be of another kind), with `scratch` among its buffers; values that are defined
    outside keep their facts.  Neighbouring reduce axes become one where nothing in the part tells them apart any more."""
    axes, body, _ = _collapse(axes, body, None, kernel.bounds, ("reduce",))
    bounds = Bounds(kernel.bounds.symbols, {a.name: a.extent for a in axes})
    body = tuple(map_indices(op, bounds.simplify) for op in body)
    depends, dtypes = value_facts(axes, body)
    spans = {b.name: sum(((e - 1) * s for e, s in zip(b.shape, b.layout, strict=True)), ZERO) for b in scratch}
    return replace(kernel, axes=axes, body=body, bounds=bounds, schedule=None, buffers=(*kernel.buffers, *scratch),
                   depends={**kernel.depends, **depends}, dtypes={**kernel.dtypes, **dtypes}, spans={**kernel.spans, **spans})  # fmt: skip


def _assemble(axes: tuple[Axis, ...], body: tuple[BodyOp, ...], bounds: Bounds, schedule: Schedule | None,
              numerics: Numerics, program: Program) -> FlatKernel:  # fmt: skip
    depends, dtypes = value_facts(axes, body)
    spans = {b.name: sum(((e - 1) * s for e, s in zip(b.shape, b.layout, strict=True)), ZERO) for b in program.buffers}
    symbols = tuple(s.name for s in program.symbols)
    return FlatKernel(axes, body, bounds, numerics, schedule, program.buffers, symbols, depends, dtypes, spans)


def value_facts(axes: Iterable[Axis], body: Iterable[BodyOp]) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """(axes that each value varies over, dtype of each value)."""
    names = frozenset(a.name for a in axes)
    depends: dict[str, frozenset[str]] = {}
    dtypes: dict[str, str] = {}
    for op in body:
        if isinstance(op, Store):
            continue
        found = _op_depends(op, depends, names)
        if isinstance(op, Reduce):
            depends.update((n, found) for n in op.names)
            dtypes.update(zip(op.names, op.dtypes, strict=True))
        else:
            depends[op.name] = found
            dtypes[op.name] = op.dtype
    return depends, dtypes


def _op_depends(op: BodyOp, depends: Mapping[str, frozenset[str]], axes: frozenset[str]) -> frozenset[str]:
    found: set[str] = set()
    for name in operands(op):
        found |= {name} if name in axes else depends.get(name, frozenset())
    if isinstance(op, Reduce):
        found -= set(op.axes)
    if isinstance(op, Scan):
        found.add(op.axis)
    return frozenset(found)


def map_indices(op: BodyOp, change, buffers: Mapping[str, Buffer] | None = None) -> BodyOp:  # type: ignore[no-untyped-def]
    """The op with `change` applied to each index expression; with `buffers`, accesses become flat offsets first."""
    if isinstance(op, IndexValue):
        return replace(op, expr=change(op.expr))
    if isinstance(op, (Load, Store)):
        index = op.access.index
        if buffers is not None:
            index = (flat_offset(index, buffers[op.access.buffer].layout),)
        return replace(op, access=replace(op.access, index=tuple(change(i) for i in index)))
    return op


def _drop_unit_axes(axes: tuple[Axis, ...], body: tuple[BodyOp, ...]) -> tuple[tuple[Axis, ...], tuple[BodyOp, ...]]:
    """Axes of extent one become index 0; a reduction keeps one axis, so that it stays a reduction."""
    unit = {a.name for a in axes if a.extent.constant == 1}
    for op in body:
        if isinstance(op, Scan):
            unit.discard(op.axis)
        elif isinstance(op, Reduce) and all(a in unit for a in op.axes):
            if not op.axes:
                raise CodegenError(f"the reduction {', '.join(op.names)} names no axis")
            unit.discard(op.axes[-1])
    if not unit:
        return axes, body
    zero = dict.fromkeys(unit, ZERO)
    out = []
    for op in body:
        op = map_indices(op, lambda i: i.substitute(zero))
        out.append(replace(op, axes=tuple(a for a in op.axes if a not in unit)) if isinstance(op, Reduce) else op)
    return tuple(a for a in axes if a.name not in unit), tuple(out)


def _collapse(axes: tuple[Axis, ...], body: tuple[BodyOp, ...], schedule: Schedule | None, bounds: Bounds,
              kinds: tuple[str, ...] = ("parallel", "reduce")) -> tuple[tuple[Axis, ...], tuple[BodyOp, ...], Schedule | None]:  # fmt: skip
    """Merge neighbours of one kind until none is left that every index walks as `outer * extent(inner) + inner`."""
    merged = True
    while merged:
        merged = False
        for kind in kinds:
            group = [a for a in axes if (a.kind == "reduce") == (kind == "reduce")]
            for outer, inner in itertools.pairwise(group):
                if not _one_walk(outer, inner, body, schedule, bounds):
                    continue
                joined = Axis(inner.name, outer.extent * inner.extent, inner.kind)
                axes = tuple(joined if a == inner else a for a in axes if a != outer)
                body = tuple(_without(op, outer.name) for op in body)
                schedule = _join_schedule(schedule, outer.name, inner.name)
                merged = True
                break
    return axes, body, schedule


def _one_walk(outer: Axis, inner: Axis, body: tuple[BodyOp, ...], schedule: Schedule | None, bounds: Bounds) -> bool:
    if schedule is not None and (outer.name in schedule.loop) != (inner.name in schedule.loop):
        return False
    for op in body:
        if isinstance(op, Scan) and op.axis in (outer.name, inner.name):
            return False
        if isinstance(op, Reduce) and (outer.name in op.axes) != (inner.name in op.axes):
            return False
        for e in indices(op):
            a, b = e.coefficient(outer.name), e.coefficient(inner.name)
            if a is None or b is None or not bounds.equal(a, b * inner.extent):
                return False
    return not _differs_in_one(outer.name, inner.name, body)


def _differs_in_one(outer: str, inner: str, body: tuple[BodyOp, ...]) -> bool:
    """A store in add mode repeats over axes that it does not name; merging would change nothing else."""
    return any(isinstance(op, Store) and op.mode != "set" and (outer in operands(op)) != (inner in operands(op)) for op in body)


def _without(op: BodyOp, outer: str) -> BodyOp:
    """`outer` set to zero: the inner axis now runs over both."""
    op = map_indices(op, lambda i: i.substitute({outer: ZERO}))
    return replace(op, axes=tuple(a for a in op.axes if a != outer)) if isinstance(op, Reduce) else op


def _join_schedule(schedule: Schedule | None, outer: str, inner: str) -> Schedule | None:
    if schedule is None:
        return None
    tiles = dict(schedule.tiles)
    if outer in tiles or inner in tiles:
        tiles[inner] = tiles.pop(outer, 1) * tiles.get(inner, 1)
    return replace(schedule, lane=inner if schedule.lane == outer else schedule.lane, tiles=tuple(tiles.items()),
                   loop=tuple(a for a in schedule.loop if a != outer))  # fmt: skip
