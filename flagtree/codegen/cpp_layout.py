"""How the CPU walks a flat kernel: which axis lies across vector lanes, in which sweep over a row each op runs.

A sweep is one pass over the reduce axes; an op that needs a reduced value runs in a later sweep, and what it needs of earlier
values is computed again there.  A store to a buffer that the kernel also loads waits for the last sweep, so every load sees old values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from flagtree.codegen import cpp_order
from flagtree.errors import CodegenError
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.flat import FlatKernel, operands
from flagtree.ir.index import ONE, Index
from flagtree.ir.program import Axis, BodyOp, Compute, IndexValue, Load, Reduce, Scan, Store, defined

LARGE = 16 << 20  # bytes of one output of a kernel that no core keeps for whoever reads it next,
MOVED = 48 << 20  # where the kernel reads and writes so many in all: less may stay in a cache that cores share
WIDE_OPS = frozenset(("sin", "cos"))  # computed in f64 also for f32
PARTIALS = (64, 32)  # partial states of a reduction over lanes: the second in a kernel of short rows that are no multiple of the first,
# and in one with sums whose order is eager's (cpp_order)


@dataclass(frozen=True, slots=True)
class Layout:
    """`lane`: the axis across vector lanes (None: a kernel of one point).  `outer`: the other parallel axes, one row each point.
    `loops`: reduce axes walked by plain loops around the lanes (or inside, when the lane axis is parallel).
    `level`: for each value the sweep in which it can first be computed.  `widest`: bytes of the widest register lane.
    `partials`: partial states of a reduction over lanes.  `large`: buffers whose stores may go past the caches (`large_stores`).
    Of a part of a kernel (cpp_groups): `groups`, the axes of `outer` that the row before it is cut along; `seen`, the buffers that
    earlier parts have read."""

    kernel: FlatKernel
    lane: Axis | None
    outer: tuple[Axis, ...]
    loops: tuple[Axis, ...]
    level: Mapping[str, int]
    widest: int
    partials: int
    large: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()

    @property
    def lane_reduced(self) -> bool:
        return self.lane is not None and self.lane.kind == "reduce"

    @property
    def reduced_names(self) -> frozenset[str]:
        return frozenset(a.name for a in self.kernel.reduced)

    def is_swept(self, op: BodyOp) -> bool:
        """Runs once for each point of the reduce axes (a Reduce itself, too)."""
        if isinstance(op, (Reduce, Scan)):
            return True
        if isinstance(op, Store):
            return bool(self._store_axes(op) & self.reduced_names)
        return bool(self.kernel.depends[op.name] & self.reduced_names)

    def is_uniform(self, op: BodyOp) -> bool:
        """Runs once a row: neither lane nor reduce axes."""
        if isinstance(op, Reduce):
            return False
        axes = self._store_axes(op) if isinstance(op, Store) else self.kernel.depends[op.name]
        return not axes & (self.reduced_names | {self.lane.name if self.lane else ""})

    def is_streamed(self, op: Load) -> bool:
        """Consecutive elements, row after row, that no other row loads again (a weight's are)."""
        offset = op.access.index[0]
        if self.lane is None or op.access.mask is not None or offset.coefficient(self.lane.name) != ONE:
            return False
        around = (*self.outer, *self.loops)
        rows = [a.name for a in self.outer if a.name not in self.groups]
        if rows and offset.names().isdisjoint(rows):
            return False
        return not around or offset.coefficient(around[-1].name) == self.lane.extent

    def large_stores(self) -> tuple[Store, ...]:
        """Those that may write more than caches keep, whole lines that the kernel does not read: they go past the caches."""
        return tuple(op for op in self.kernel.body if isinstance(op, Store) and self._is_large(op))

    def _is_large(self, op: Store) -> bool:
        if self.lane is None or op.mode != "set" or op.access.mask is not None or op.access.buffer in self._reloaded():
            return False
        bounds = ((self.written(op), LARGE), (self.moved(), MOVED))
        highest = [(self.kernel.bounds.maximum(size), least) for size, least in bounds]
        return op.access.index[0].coefficient(self.lane.name) == ONE and all(h is None or h >= least for h, least in highest)

    def written(self, op: Store) -> Index:
        """Bytes."""
        return self._touched(op)

    def moved(self) -> Index:
        """Bytes that all loads and stores touch, each buffer counted once."""
        accesses = {op.access.buffer: op for op in self.kernel.body if isinstance(op, (Load, Store))}
        return sum((self._touched(op) for op in accesses.values()), Index.of(0))

    def _touched(self, op: Load | Store) -> Index:
        dtype = next(b.dtype for b in self.kernel.buffers if b.name == op.access.buffer)
        size = Index.of(DTYPES[dtype].bits // 8)
        for axis in self.kernel.axes:
            size = size * (axis.extent if axis.name in self.kernel.op_depends(op) else ONE)
        return size

    def _store_axes(self, op: Store) -> frozenset[str]:
        return self.kernel.op_depends(op)

    def varies_in_lanes(self, value: str) -> bool:
        """Differs from lane to lane of one vector."""
        return self.lane is not None and self.lane.name in self.kernel.depends.get(value, frozenset())

    @property
    def sweeps(self) -> int:
        """How many passes over the reduce axes: one more than the last level with work in it."""
        return max((self.sweep_of(op) + 1 for op in self.kernel.body if isinstance(op, (Reduce, Store)) and self.is_swept(op)), default=0)

    def sweep_of(self, op: BodyOp) -> int:
        """The sweep that executes a Reduce or a swept Store."""
        first = max((self.level.get(n, 0) for n in operands(op)), default=0)
        if isinstance(op, Store) and op.access.buffer in self._reloaded():
            return max(first, self._last_level())
        return first

    def _reloaded(self) -> frozenset[str]:
        loaded = {o.access.buffer for o in self.kernel.body if isinstance(o, Load)}
        return frozenset(o.access.buffer for o in self.kernel.body if isinstance(o, Store) and o.access.buffer in loaded)

    def _last_level(self) -> int:
        tops = [o for o in self.kernel.body if isinstance(o, (Reduce, Store)) and self.is_swept(o)]
        return max((self.level.get(n, 0) for o in tops for n in operands(o)), default=0)


def layout(kernel: FlatKernel) -> Layout:
    """Layout of a kernel; CodegenError for what this generator does not walk.  Where reductions differ, lanes lie along what all take."""
    kernel = _narrow_positions(kernel)
    _check(kernel)
    reduced = [frozenset(op.axes) for op in kernel.body if isinstance(op, Reduce)]
    made = arranged(kernel, frozenset.intersection(*reduced) if len(set(reduced)) > 1 else frozenset(a.name for a in kernel.axes))
    return replace(made, large=frozenset(op.access.buffer for op in made.large_stores()))


def arranged(kernel: FlatKernel, among: Collection[str]) -> Layout:
    """Layout of a kernel or of a part of one, its lane axis one of `among`."""
    lane = _lane(kernel, [a for a in kernel.axes if a.name in among])
    outer = _rows_in_memory_order(kernel, tuple(a for a in kernel.parallel if a != lane))
    loops = tuple(a for a in kernel.reduced if a != lane)
    scans = {op.axis for op in kernel.body if isinstance(op, Scan)}
    if scans and lane is not None and lane.kind == "reduce" and lane.name not in scans:
        lane_axis = kernel.axis(next(iter(scans)))
        lane, loops = lane_axis, tuple(a for a in kernel.reduced if a != lane_axis)
    loops = tuple(sorted(loops, key=lambda a: a.name in scans))  # a running value restarts when its loop is entered
    return Layout(kernel, lane, outer, loops, _levels(kernel), _widest(kernel, lane), _partials(kernel, lane))


def _rows_in_memory_order(kernel: FlatKernel, outer: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Rows may be walked in any order: the axis of the largest steps is the outermost, as far as the steps are known."""
    accesses = [op.access.index[0] for op in kernel.body if isinstance(op, (Load, Store))]

    def step(axis: Axis) -> int:
        factors = [a.coefficient(axis.name) for a in accesses]
        highest = [kernel.bounds.maximum(f) for f in factors if f is not None]
        return sum(h for h in highest if h is not None)

    known = all(a.coefficient(x.name) is not None for a in accesses for x in outer)
    return tuple(sorted(outer, key=step, reverse=True)) if known else outer


def _check(kernel: FlatKernel) -> None:
    scans = {op.axis for op in kernel.body if isinstance(op, Scan)}
    if len(scans) > 1:
        raise CodegenError("cannot generate C++ for this kernel", why=f"it scans along several axes: {', '.join(sorted(scans))}")
    for name in sorted(set(kernel.dtypes.values()) | {b.dtype for b in kernel.buffers}):
        if name == "f8e5m2":
            raise CodegenError("cannot generate C++ for this kernel", why=f"no vector code for the element type {name}")


def _lane(kernel: FlatKernel, axes: Sequence[Axis]) -> Axis | None:
    """The schedule's choice, else the axis with unit stride in most accesses; among equals a long one, then the innermost."""
    if not axes:
        return None
    if kernel.schedule is not None and kernel.schedule.lane is not None:
        chosen = [a for a in axes if a.name == kernel.schedule.lane]
        if chosen:
            return chosen[0]
    accesses = [op.access for op in kernel.body if isinstance(op, (Load, Store))]

    def score(position: int) -> tuple[bool, int, int]:
        axis = axes[position]
        unit = sum(a.index[0].coefficient(axis.name) == ONE for a in accesses)
        varying = sum(axis.name in a.index[0].names() for a in accesses)
        short = axis.extent.constant is not None and axis.extent.constant < 4
        return not short and unit > 0, 2 * unit - varying, position

    return axes[max(range(len(axes)), key=score)]


def _partials(kernel: FlatKernel, lane: Axis | None) -> int:
    if lane is not None and any(isinstance(op, Reduce) and lane.name in op.axes and cpp_order.is_ordered(op) for op in kernel.body):
        return cpp_order.PARTIALS
    size = None if lane is None else lane.extent.constant
    return PARTIALS[size is not None and size < 4 * PARTIALS[0] and size % PARTIALS[0] != 0]


def _levels(kernel: FlatKernel) -> dict[str, int]:
    level: dict[str, int] = {}
    for op in kernel.body:
        highest = max((level.get(n, 0) for n in operands(op)), default=0)
        level.update((n, highest + isinstance(op, Reduce)) for n in defined(op))
    return level


def _widest(kernel: FlatKernel, lane: Axis | None) -> int:
    """Bytes of the widest lane: 8 as soon as a value that differs between lanes is 64 bits wide, else 4."""
    for op in kernel.body:
        names = defined(op)
        varies = lane is None or isinstance(op, Reduce) or any(lane.name in kernel.depends[n] for n in names)
        if varies and (any(DTYPES[kernel.dtypes[n]].bits == 64 for n in names) or (isinstance(op, Compute) and op.op in WIDE_OPS)):
            return 8
        if isinstance(op, Scan) and varies and op.combiner in ("sum", "prod") and DTYPES[op.dtype].is_float:
            return 8  # carried in f64
    return 4


def _narrow_positions(kernel: FlatKernel) -> FlatKernel:
    """Positions that provably fit 32 bits, and are only compared, indexed with or converted, become i32: twice the lanes."""
    exprs = {op.name: op.expr for op in kernel.body if isinstance(op, IndexValue)}
    chosen = {n for n, e in exprs.items() if kernel.dtypes[n] == "i64" and kernel.fits_int32(e)}
    shrinking = True
    while shrinking:
        blocked = {n for op in kernel.body for n in _blocked(op, chosen)}
        shrinking = bool(blocked & chosen)
        chosen -= blocked
    body = tuple(replace(op, dtype="i32") if isinstance(op, IndexValue) and op.name in chosen else op for op in kernel.body)
    return replace(kernel, body=body, dtypes={**kernel.dtypes, **dict.fromkeys(chosen, "i32")})


def _blocked(op: BodyOp, narrow: set[str]) -> tuple[str, ...]:
    """Values that must keep their 64 bits because of this use."""
    if isinstance(op, (Load, IndexValue)) or (isinstance(op, Compute) and op.op == "cast"):
        return ()
    if isinstance(op, Compute) and op.op in ("lt", "le", "gt", "ge", "eq", "ne"):
        fits = all(a in narrow if isinstance(a, str) else isinstance(a, int) and abs(a) < 2**31 for a in op.args)
        return () if fits else tuple(a for a in op.args if isinstance(a, str))
    if isinstance(op, Store):
        return (op.value,)
    return operands(op)

