"""A row that is reduced first and then group by group: a norm, then a scale for each group, in one kernel of several parts.

Each part is a kernel whose reductions agree, walked like any other (cpp_sweeps): the row, then all its groups, then all its elements, so
that no element waits for the reduction of its group.  What a part computes again it computes with the same roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flagtree.codegen import cpp_ops as ops
from flagtree.codegen.cpp_index import index_text
from flagtree.codegen.cpp_keep import STACK_BYTES, STORED_WORTH, WORTH, can_be_read_back, cost
from flagtree.codegen.cpp_layout import Layout, arranged
from flagtree.codegen.cpp_states import block
from flagtree.codegen.cpp_sweeps import RowWriter
from flagtree.errors import CodegenError
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.flat import operands, part
from flagtree.ir.index import ONE, ZERO, Index
from flagtree.ir.program import Access, Axis, BodyOp, Buffer, Compute, Load, Reduce, Scan, Store, defined

ROW, GROUPS, ELEMENTS = range(3)
MANY = STACK_BYTES // 64  # groups of a row from which their values are no small array


@dataclass(frozen=True, slots=True)
class Parts:
    """`walks`: the row's own reductions and what varies over no reduced axis; the groups' reductions; the stores that are left.  An axis
    that a part does not reduce is parallel there.  `handed`: arrays of a row in which a part leaves what a later one reads."""

    walks: tuple[Layout, ...]
    handed: tuple[Buffer, ...]


def row_statements(layout: Layout, multiples: Mapping[str, int], chunk: int) -> tuple[list[str], int]:
    """The statements of one row, and the partial states that its reductions keep; arguments as of `RowWriter`.

    Raises CodegenError for reductions that neither agree nor lie one within another.
    """
    parts = split(layout)
    if parts is None:
        return RowWriter(layout, multiples, chunk).row(), layout.partials
    lines = [f"alignas(64) {ops.memory(b.dtype)} {b.name}[{b.shape[0]}];" for b in parts.handed]
    for walk in parts.walks:
        inner = RowWriter(walk, multiples, 0).row()
        for axis in reversed(walk.kernel.parallel):
            if axis in walk.outer and axis.name in layout.reduced_names:
                extent = index_text(axis.extent, {}, layout.kernel.bounds)
                inner = block(f"for (i64 {axis.name} = 0; {axis.name} < {extent}; ++{axis.name})", inner)
        lines += inner
    return lines, parts.walks[0].partials


def split(layout: Layout) -> Parts | None:
    """The parts of a kernel; None where all its reductions agree.  CodegenError as `row_statements`."""
    inside = {frozenset(op.axes) for op in layout.kernel.body if isinstance(op, Reduce)} - {layout.reduced_names}
    return _Split(layout, inside).parts() if inside else None


class _Split:
    """`late`: values that need a group's reduction.  `home`: of each value the part that computes it first.  `ready`: those that are
    variables of the row.  `bodies`: the ops of each part."""

    def __init__(self, layout: Layout, inside: set[frozenset[str]]) -> None:
        self.layout, self.kernel, self.reduced = layout, layout.kernel, layout.reduced_names
        self.late: set[str] = set()
        for op in self.kernel.body:
            if (isinstance(op, Reduce) and not self._is_whole(op)) or not self.late.isdisjoint(operands(op)):
                self.late.update(defined(op))
        rows = [op for op in self.kernel.body if isinstance(op, Reduce) and self._is_whole(op)]
        scans = any(isinstance(op, Scan) for op in self.kernel.body)
        if len(inside) > 1 or scans or not rows or any(not self.late.isdisjoint(op.names) for op in rows):
            kinds = " and ".join(sorted(", ".join(sorted(names)) for names in (*inside, self.reduced)))
            raise CodegenError(
                "cannot generate C++ for this kernel",
                why=f"over {kinds} it has reductions or scans that neither agree nor are a row's and then those of groups of it",
            )
        self.groups = self.reduced - next(iter(inside))
        self.loaded = {op.access.buffer for op in self.kernel.body if isinstance(op, Load)}
        self.home: dict[str, int] = {}
        self.ready: set[str] = set()
        self.stored: dict[str, Store] = {}  # values that an earlier part leaves in memory
        self.handed: dict[str, Buffer] = {}
        self.bodies: list[list[BodyOp]] = []

    def _is_whole(self, op: Reduce) -> bool:
        return frozenset(op.axes) == self.reduced

    def parts(self) -> Parts:
        done: set[int] = set()
        for number in (ROW, GROUPS, ELEMENTS):
            self.bodies.append(self._body(number, done))
        for value, array in self.handed.items():
            self.bodies[self.home[value]].append(Store(Access(array.name, (self._place(value),)), value))
        walks, seen = [], frozenset[str]()
        arrays = tuple(self.handed.values())
        for number, body in enumerate(self.bodies):
            kernel = part(self.kernel, tuple(self._axis(a, number) for a in self.kernel.axes), tuple(body), arrays)
            lanes = self.reduced if number == ROW else self.reduced - self.groups
            if body:
                made = arranged(kernel, lanes & {a.name for a in kernel.axes})
                walks.append(replace(made, groups=self.groups, seen=seen))
            seen |= {op.access.buffer for op in body if isinstance(op, (Load, Store))}
        states = min(w.partials for w in walks[:ELEMENTS])
        common = [replace(w, widest=self.layout.widest, partials=states, large=self.layout.large) for w in walks]
        return Parts(tuple(common), arrays)

    def _axis(self, axis: Axis, number: int) -> Axis:
        """What a part does not reduce is parallel in it."""
        kept = self.reduced if number == ROW else self.reduced - self.groups if number == GROUPS else ()
        return axis if axis.kind != "reduce" or axis.name in kept else replace(axis, kind="parallel")

    # -- which part ----------------------------------------------------------------------------------------------------
    def _body(self, number: int, done: set[int]) -> list[BodyOp]:
        """The ops of a part: its own, with what they need, and stores of values that are there then."""
        body = self.kernel.body
        own = {k for k, op in enumerate(body) if k not in done and self._belongs(op, number)}
        chosen = self._needed(own)
        elsewhere = self.kernel.dtypes.keys() - self.ready - {n for _, op in chosen for n in defined(op)}
        for k, op in enumerate(body):
            if isinstance(op, Store) and k not in done | own and self._is_plain(op) and elsewhere.isdisjoint(operands(op)):
                own.add(k)
                chosen.append((k, op))
        done |= own
        for _, op in chosen:
            self.home.update((n, number) for n in defined(op) if n not in self.home)
            if isinstance(op, Store) and can_be_read_back(self.layout, op):
                self.stored[op.value] = op
            elif number == ROW and not isinstance(op, Store) and self._over(*defined(op)) <= frozenset():
                self.ready.update(defined(op))
        return [op for _, op in sorted(chosen, key=lambda pair: pair[0])]

    def _belongs(self, op: BodyOp, number: int) -> bool:
        """Must the part execute it?  Whatever else it needs, it takes."""
        if isinstance(op, Reduce):
            return number == (ROW if self._is_whole(op) else GROUPS)
        once = self.late.isdisjoint((*operands(op), *defined(op))) and not self.layout.is_swept(op)
        if number == ROW or not isinstance(op, Store):
            return once and number == ROW
        of_groups = self.kernel.op_depends(op) & self.reduced <= self.groups and op.access.buffer not in self.loaded
        return number == ELEMENTS or of_groups or not self._has_few_groups()

    def _has_few_groups(self) -> bool:
        count = ONE
        for axis in self.kernel.reduced:
            count = count * (axis.extent if axis.name in self.groups else ONE)
        return (self.kernel.bounds.maximum(count) or MANY) < MANY

    def _is_plain(self, op: Store) -> bool:
        """Of each element of the row, to a buffer that no part loads any more."""
        return op.access.buffer not in self.loaded and self.kernel.op_depends(op) >= self.reduced

    # -- what a part needs -----------------------------------------------------------------------------------------------
    def _needed(self, own: set[int]) -> list[tuple[int, BodyOp]]:
        """(place in the body, op): `own` with what they need of values that no variable holds."""
        needed: set[str] = set()
        out: list[tuple[int, BodyOp]] = []
        for k, op in reversed(tuple(enumerate(self.kernel.body))):
            names = needed & set(defined(op)) - self.ready
            read = [] if k in own else [self._read(op, n) for n in sorted(names)]
            if k in own or (names and None in read):
                out.append((k, op))
                needed.update(operands(op))
            else:
                out += [(k, load) for load in read if load is not None]
        return out

    def _read(self, op: BodyOp, value: str) -> Load | None:
        """The load of a value that an earlier part leaves; None: it is computed again."""
        dtype, over = self.kernel.dtypes[value], self._over(value)
        if value not in self.home:
            return None
        if over <= self.groups:
            return self._handed(value) if value in self.late else None
        if over != self.reduced:
            return None
        defining = {n: o for o in self.kernel.body for n in defined(o) if not isinstance(o, Reduce) and self.layout.is_swept(o)}
        if value in self.stored and cost(value, defining) >= STORED_WORTH:
            return Load(value, dtype, self.stored[value].access, None)
        dear = cost(value, defining, {*self.stored, *self.handed}) >= WORTH and not self._widens(op)
        return self._handed(value) if dear and (value in self.handed or self._has_room(value)) else None

    def _widens(self, op: BodyOp) -> bool:
        """A conversion to more bits: what it converts takes less room."""
        if not isinstance(op, Compute) or op.op != "cast" or not isinstance(op.args[0], str):
            return False
        return DTYPES[self.kernel.dtypes[op.args[0]]].bits < DTYPES[op.dtype].bits

    # -- arrays of a row ---------------------------------------------------------------------------------------------------
    def _over(self, *values: str) -> frozenset[str]:
        """The reduced axes that they vary over."""
        return frozenset(a for n in values for a in self.kernel.depends[n]) & self.reduced

    def _place(self, value: str) -> Index:
        """Where a value stands in its array: that of its element in the row, or of its group."""
        place, over = ZERO, self.groups if self._over(value) <= self.groups else self.reduced
        for axis in self.kernel.reduced:
            if axis.name in over:
                place = place * axis.extent + Index.of(axis.name)
        return place

    def _handed(self, value: str) -> Load:
        place, dtype = self._place(value), self.kernel.dtypes[value]
        if value not in self.handed:
            self.handed[value] = Buffer(f"{value}_handed", dtype, (Index.of(self.kernel.bounds.maximum(place) or 0) + 1,))
        return Load(value, dtype, Access(self.handed[value].name, (place,)), None)

    def _has_room(self, value: str) -> bool:
        """Rows may be too long for the stack."""
        last = self.kernel.bounds.maximum(self._place(value))
        taken = sum(DTYPES[b.dtype].bytes for b in self.handed.values()) + DTYPES[self.kernel.dtypes[value]].bytes
        return last is not None and (last + 1) * taken <= STACK_BYTES
