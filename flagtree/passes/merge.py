"""Joining two kernels into one: `can_merge` answers Legal(reindex) or Refused(reason), `merge` does it.

The producer's axes are mapped onto the consumer's by the index at which the consumer reads what the producer stores.
Reads at that same point take the value itself; reads at another point (a rotation, a gather) take a copy of the
pointwise part of its computation, moved there.  Both keep every rounding, so no bit changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import ZERO, Index
from flagtree.ir.program import Access, Axis, BodyOp, Compute, Kernel, Load, Numerics, Program, Reduce, Scan, Store, defined, operands
from flagtree.passes.base import Refused
from flagtree.passes.rewrite import EXPENSIVE, free_axes, rename, renumber


@dataclass(frozen=True, slots=True)
class Legal:
    """`axes`: producer axis -> index over the consumer's axes (none: inlined wherever read); `added`: producer axes that become
    axes of their own; `reduced`: consumer axes that become reduce axes; `flowing`: the buffers handed over;
    `overwritten`: those that the consumer stores whole again, so that the producer's store is dead."""

    axes: Mapping[str, Index] | None
    added: tuple[Axis, ...]
    reduced: frozenset[str]
    flowing: tuple[str, ...]
    overwritten: frozenset[str] = frozenset()


def can_merge(program: Program, a: Kernel, b: Kernel, kept: frozenset[str], heads: bool = False, groups: bool = False) -> Legal | Refused:
    """May producer `a` be computed inside consumer `b`?  `kept` are flowing buffers whose store must stay.  A row that is reduced may be
    cut: with `groups` into those that the consumer reduces each for itself (a norm, then a scale for each group), with `heads` into heads.

    A buffer that both write (x.add_(1); x.mul_(2)) must be stored whole by both: the first store is dead then.  That no step
    between the two reads it is the caller's to know: such a step depends on `a` and `b` depends on it.
    """
    flowing = tuple(n for n in a.writes if n in b.reads)
    if not flowing:
        return _refused(a, b, "nothing flows between them")
    if any(program.buffer(n).alias_of is not None for k in (a, b) for n in (*k.reads, *k.writes)):
        return _refused(a, b, "an access through a view that has no index form")
    if (a.numerics.rounding, a.numerics.fp_contract) != (b.numerics.rounding, b.numerics.fp_contract):
        return _refused(a, b, "numerics policies differ")
    overwritten = frozenset(a.writes) & frozenset(b.writes)
    for kernel, names in ((a, flowing), (a, sorted(overwritten)), (b, sorted(overwritten))):
        for name in names:
            if (why := _store_refusal(program, kernel, name)) is not None:
                return _refused(a, b, f"{why} and written by both" if name in overwritten else why)
    legal = _legal(a, b, flowing, overwritten, kept - overwritten, heads, groups)
    return replace(legal, overwritten=overwritten) if isinstance(legal, Legal) else legal


def _legal(a: Kernel, b: Kernel, flowing: tuple[str, ...], overwritten: frozenset[str], kept: frozenset[str],
           heads: bool, groups: bool) -> Legal | Refused:  # fmt: skip
    """The verdict on domains and hazards, for stores that are whole."""
    needed = bool(kept or set(a.writes) - set(flowing) - overwritten)  # the producer stores what the consumer does not take over
    base = _base_mapping(a, b, flowing, groups)
    if base is None:
        if again := sorted(set(a.reads) & set(b.writes)):
            return _refused(a, b, f"'{again[0]}' would be read at moved points while it is written")
        return _inline(a, b, flowing, needed)
    legal = _complete(a, b, base, flowing, needed, heads)
    if isinstance(legal, Legal) and (why := _hazard(a, b, legal, overwritten)) is not None:
        return _refused(a, b, why)
    return legal


def _refused(a: Kernel, b: Kernel, reason: str) -> Refused:
    return Refused((a.name, b.name), reason)


def _store_of(a: Kernel, buffer: str) -> Store:
    return next(s for s in a.stores if s.access.buffer == buffer)


def _store_refusal(program: Program, a: Kernel, buffer: str) -> str | None:
    """A handed-over buffer is stored once, whole and unmasked, each dimension at a distinct axis (or 0 where it has one element)."""
    stores = [s for s in a.stores if s.access.buffer == buffer]
    if len(stores) != 1 or stores[0].mode != "set" or stores[0].access.mask:
        return f"'{buffer}' is stored in parts"
    names = [i.name for i in stores[0].access.index if i != ZERO]
    axes = {x.name for x in a.axes}
    if any(n not in axes for n in names) or len(set(names)) != len(names):
        return f"'{buffer}' is not stored at plain axes"
    extents = {x.name: x.extent for x in a.axes}
    for index, size in zip(stores[0].access.index, program.buffer(buffer).shape, strict=True):
        if size != (Index.of(1) if index == ZERO else extents[index.name or ""]):
            return f"'{buffer}' is stored in parts"  # a slice: the rest holds what another step wrote
    free = free_axes(a.body, axes)[stores[0].value]
    if not free <= set(names) and free - set(names):
        return f"'{buffer}' is stored repeatedly"
    return None


def _mapping(a: Kernel, load: Load) -> dict[str, Index]:
    """Producer axis -> where the load reads, for the axes of the store's index."""
    store = _store_of(a, load.access.buffer)
    return {i.name: g for i, g in zip(store.access.index, load.access.index, strict=True) if i.name is not None}


def _base_mapping(a: Kernel, b: Kernel, flowing: tuple[str, ...], groups: bool) -> dict[str, Index] | None:
    """The read that places the producer: each parallel axis is read at one axis of the consumer (or 0 where it runs once), with
    `groups` a reduced one at the groups of the consumer and the places in each.

    Other reduced axes may be read anywhere, at a label's position say; those are left open.  The read that places most axes wins.
    """
    extents = {x.name: x.extent for x in b.axes}
    result: dict[str, Index] | None = None
    for load in b.loads:
        if load.access.buffer not in flowing:
            continue
        mapping = _mapping(a, load)
        placed = {}
        for axis in a.axes:
            g = mapping.get(axis.name)
            plain = g is not None and (extents.get(g.name or "") == axis.extent or (g == ZERO and axis.extent.constant == 1))
            plain = plain or (groups and g is not None and _is_cut(axis, g, b))
            if plain:
                placed[axis.name] = g
            elif g is not None and axis.kind == "parallel":
                break
        else:
            names = [n for g in placed.values() if g is not None for n in g.names()]
            if len(set(names)) == len(names) and (result is None or len(placed) > len(result)):
                result = placed  # type: ignore[assignment]
    return result


def _is_cut(axis: Axis, at: Index, b: Kernel) -> bool:
    """Is a reduced axis read at `group * size + place`, whole, with a parallel axis of groups and a reduced one of places?"""
    groups, places = ([x for x in b.axes if x.name in at.names() and x.kind == kind] for kind in ("parallel", "reduce"))
    whole = axis.extent.constant
    if axis.kind != "reduce" or whole is None or len(at.names()) != 2 or len(groups) != 1 or len(places) != 1:
        return False
    size = places[0].extent.constant
    return size is not None and groups[0].extent == Index.of(whole // size) and whole % size == 0 and (
        at == Index.of(groups[0].name) * size + Index.of(places[0].name)
    )


def _inline(a: Kernel, b: Kernel, flowing: tuple[str, ...], needed: bool) -> Legal | Refused:
    """Every read is at a moved point: only a pointwise producer that disappears may be copied there."""
    if any(isinstance(op, (Reduce, Scan)) for op in a.body):
        return _refused(a, b, "a reduction is read at another point")
    if needed:
        return _refused(a, b, "read at another point, and the value is needed elsewhere too")
    if _is_expensive(a) and _grows(a, b):
        return _refused(a, b, "would repeat an expensive computation")
    return Legal(None, (), frozenset(), flowing)


def _is_expensive(kernel: Kernel) -> bool:
    return any(isinstance(op, Compute) and op.op in EXPENSIVE for op in kernel.body)


def _grows(a: Kernel, b: Kernel) -> bool:
    """Has the consumer a larger domain than the producer?  Unknown counts as larger."""
    size = [1, 1]
    names: list[list[str]] = [[], []]
    for k, kernel in enumerate((a, b)):
        for axis in kernel.axes:
            if axis.extent.constant is not None:
                size[k] *= axis.extent.constant
            else:
                names[k].append(str(axis.extent))
    return size[1] > size[0] or any(names[1].count(n) > names[0].count(n) for n in names[1])


def _complete(a: Kernel, b: Kernel, base: dict[str, Index], flowing: tuple[str, ...], needed: bool, heads: bool) -> Legal | Refused:
    """Match the producer's remaining axes with free axes of the consumer of the same extent, else add them."""
    taken = {n for g in base.values() for n in g.names()}
    free = [x for x in b.axes if x.name not in taken and x.extent.constant != 1]
    axes, added = dict(base), []
    reduced: set[str] = set()
    shared = _shared_positions(a, b)
    for axis in a.axes:
        if axis.name in axes:
            if axis.kind == "reduce":
                reduced |= axes[axis.name].names()
            continue
        if axis.extent.constant == 1 and axis.kind == "parallel":
            axes[axis.name] = ZERO
            continue
        choice = sorted((x for x in free if x.extent == axis.extent), key=lambda x: (axis.name, x.name) not in shared)
        if choice:
            free.remove(choice[0])
            axes[axis.name] = Index.of(choice[0].name)
            if axis.kind == "reduce":
                reduced.add(choice[0].name)
        elif heads and (cut := _cut(axis, free, a, b)) is not None:
            free = [x for x in free if x.name not in cut.names()]
            axes[axis.name] = cut
            reduced |= cut.names()
        else:
            fresh = f"{axis.name}~"
            added.append(Axis(fresh, axis.extent, axis.kind))
            axes[axis.name] = Index.of(fresh)
    legal = Legal(axes, tuple(added), frozenset(reduced), flowing)
    why = _domain_refusal(a, b, legal, [x for x in free if x.kind == "parallel"], free, needed)
    return legal if why is None else _refused(a, b, why)


def _cut(axis: Axis, free: list[Axis], a: Kernel, b: Kernel) -> Index | None:
    """`head * size + place`, at which the consumer reads the row that the producer reduces: a norm of all heads, then a turn of each."""
    read = [pair for x in a.loads for y in b.loads if x.access.buffer == y.access.buffer for pair in zip(x.access.index, y.access.index)]
    left = [x for x in free if x.kind == "parallel"]
    for heads, places in itertools.permutations(left) if axis.kind == "reduce" and len(left) == 2 else ():
        size = places.extent.constant or 0
        at = Index.of(heads.name) * size + Index.of(places.name)
        if axis.extent == heads.extent * size and any(axis.name in i.names() and i.substitute({axis.name: at}) == j for i, j in read):
            return at
    return None


def _shared_positions(a: Kernel, b: Kernel) -> set[tuple[str, str]]:
    """(axis of a, axis of b) that index the same dimension of the same buffer."""
    out = set()
    for x in a.loads:
        for y in b.loads:
            if x.access.buffer == y.access.buffer:
                out |= {(i.name, j.name) for i, j in zip(x.access.index, y.access.index, strict=True) if i.name and j.name}
    return out


def _domain_refusal(a: Kernel, b: Kernel, legal: Legal, parallel_left: list[Axis], left: list[Axis], needed: bool) -> str | None:
    reduces = [op for op in a.body if isinstance(op, (Reduce, Scan))]
    if parallel_left and reduces:
        return "would repeat the reduction for every " + " and ".join(x.name for x in parallel_left)
    if parallel_left and needed:
        return "would repeat a store that is needed elsewhere"
    if left and _is_expensive(a) and not reduces:
        return "would repeat an expensive computation"
    if legal.added and any(x.kind == "parallel" for x in legal.added):
        return "the producer has axes that the consumer lacks"
    assert legal.axes is not None
    if any(not legal.axes[x.name].names() for x in a.axes if x.kind == "reduce"):
        return "the reduction runs over an axis that the consumer lacks"
    sets = {frozenset(n for x in op.axes for n in legal.axes[x].names()) for op in a.body if isinstance(op, Reduce)}
    own = {frozenset(op.axes) for op in b.body if isinstance(op, Reduce)}
    cut = len(own) == 1 and any(len(g.names()) > 1 for g in legal.axes.values())
    nested = cut and all(group < row for group in own for row in sets)  # groups within the row
    sets |= set() if sets and nested else own
    scans = {legal.axes[op.axis].name for op in a.body if isinstance(op, Scan)} | {op.axis for op in b.body if isinstance(op, Scan)}
    if len(sets) > 1 or (sets and scans and next(iter(sets)) != frozenset(scans)):
        return "reductions over different axes"
    if sets or scans:
        inner = next(iter(sets)) if sets else frozenset(scans)
        if any(x.kind == "reduce" and x.name not in inner for x in (*left, *legal.added)) or legal.reduced - inner:
            return "reductions over different axes"
    return None


def _hazard(a: Kernel, b: Kernel, legal: Legal, overwritten: frozenset[str]) -> str | None:
    """A buffer both read and written by the joined kernel must be touched at one index only."""
    assert legal.axes is not None
    stored: dict[str, set[tuple[Index, ...]]] = {}
    loaded: dict[str, set[tuple[Index, ...]]] = {}
    points: list[Mapping[str, Index]] = [legal.axes]
    points += [{**legal.axes, **_mapping(a, load)} for load in b.loads if load.access.buffer in legal.flowing]
    values = [n for op in a.body for n in defined(op)]  # both kernels have a v0, and a copy at another point has its own
    points = [{**p, **{n: Index.of(f"a{points.index(p)}.{n}") for n in values}} for p in points]
    for op in a.body:
        if isinstance(op, Load):
            loaded.setdefault(op.access.buffer, set()).update(tuple(i.substitute(p) for i in op.access.index) for p in points)
        elif isinstance(op, Store) and op.access.buffer not in overwritten:
            stored.setdefault(op.access.buffer, set()).add(tuple(i.substitute(points[0]) for i in op.access.index))
    for op in b.body:
        if isinstance(op, Store) or (isinstance(op, Load) and op.access.buffer not in legal.flowing):
            (stored if isinstance(op, Store) else loaded).setdefault(op.access.buffer, set()).add(op.access.index)
    parallel = {x.name for x in (*b.axes, *legal.added) if x.kind == "parallel" and x.extent.constant != 1} - legal.reduced
    reduced = {x.name for x in (*b.axes, *legal.added) if x.extent.constant != 1} - parallel
    for name in sorted(stored.keys() & loaded.keys()):
        if len(stored[name] | loaded[name]) > 1:
            return f"'{name}' would be read and written at different elements"
        named = {n for i in next(iter(stored[name])) for n in i.names()}
        if name in {*a.reads, *a.writes} and not (parallel if named.isdisjoint(reduced) else parallel | reduced) <= named:
            return f"'{name}' would be read at points that do not write it"
    return None


def zero(dtype: str) -> bool | int | float:
    """The literal 0 of a type."""
    return False if dtype == "b1" else 0.0 if DTYPES[dtype].is_float else 0


# -- doing it ----------------------------------------------------------------------------------------------------------
class _Joiner:
    """Builds the joined body; `moved` copies part of the producer to another point."""

    def __init__(self, a: Kernel, b: Kernel, legal: Legal) -> None:
        self.a, self.b, self.legal = a, b, legal
        self.names = {n: f"a.{n}" for op in a.body for n in defined(op)}
        self.out: list[BodyOp] = []
        self.copies: dict[tuple, dict[str, str]] = {}
        self.free = free_axes(a.body, (x.name for x in a.axes))
        self.definition = {n: op for op in a.body for n in defined(op)}
        self.fresh = 0

    def join(self, dropped: frozenset[str]) -> list[BodyOp]:
        axes = self.legal.axes
        if axes is not None:
            for op in self.a.body:
                if not (isinstance(op, Store) and op.access.buffer in dropped):
                    self.out.append(rename(op, self.names, axes))
        replaced: dict[str, str] = {}
        for op in self.b.body:
            if isinstance(op, Load) and op.access.buffer in self.legal.flowing:
                replaced[op.name] = self._value_for(rename(op, replaced), op.access.buffer)  # type: ignore[arg-type]
            else:
                self.out.append(rename(op, replaced))
        return self.out

    def _value_for(self, load: Load, buffer: str) -> str:
        store, mapping = _store_of(self.a, buffer), _mapping(self.a, load)
        axes, mask = self.legal.axes, load.access.mask
        if axes is not None and all(axes[x] == g for x, g in mapping.items()):
            value = self.names[store.value]
        else:
            value = self._moved(store.value, mapping, mask)
        if mask is None:
            return value
        self.out.append(Compute(load.name, load.dtype, "where", (mask, value, load.other if load.other is not None else zero(load.dtype))))
        return load.name

    def _moved(self, value: str, mapping: dict[str, Index], mask: str | None) -> str:
        """Copy what `value` needs to the point `mapping`; parts that do not depend on a moved axis are shared."""
        axes = self.legal.axes
        moved = {x: g for x, g in mapping.items() if axes is None or axes[x] != g}
        where = {**(axes or {}), **mapping}
        memo = self.copies.setdefault((tuple(sorted((x, str(g)) for x, g in moved.items())), mask), {})

        def copy(name: str) -> str:
            if name in memo:
                return memo[name]
            if axes is not None and not self.free[name] & moved.keys():
                return self.names[name]
            op = self.definition[name]
            renamed = {n: copy(n) for n in operands(op) if n in self.definition}
            self.fresh += 1
            memo[name] = renamed[name] = f"m{self.fresh}.{name}"
            new = rename(op, renamed, where)
            if isinstance(new, Load) and mask is not None:
                new = self._masked(new, mask)
            self.out.append(new)
            return memo[name]

        return copy(value)

    def _masked(self, load: Load, mask: str) -> Load:
        """A copy made for a masked read touches memory only where that read would."""
        if load.access.mask is not None:
            self.fresh += 1
            both = f"m{self.fresh}.mask"
            self.out.append(Compute(both, "b1", "and", (load.access.mask, mask)))
            mask = both
        other = load.other if load.other is not None else zero(load.dtype)
        return replace(load, access=Access(load.access.buffer, load.access.index, mask), other=other)


def moved_reduction(a: Kernel, b: Kernel, legal: Legal) -> str | None:
    """Would a copy at another point need a reduction (or an expensive operation at every point)?"""
    free = free_axes(a.body, (x.name for x in a.axes))
    definition = {n: op for op in a.body for n in defined(op)}
    for load in b.loads:
        if load.access.buffer not in legal.flowing:
            continue
        mapping = _mapping(a, load)
        moved = {x for x, g in mapping.items() if legal.axes is None or legal.axes[x] != g}
        stack = [_store_of(a, load.access.buffer).value] if moved else []
        while stack:
            name = stack.pop()
            op = definition.get(name)
            if op is None or (legal.axes is not None and not free[name] & moved):
                continue
            if isinstance(op, (Reduce, Scan)):
                return "a reduction is read at another point"
            if legal.axes is not None and isinstance(op, Compute) and op.op in EXPENSIVE and len(mapping) > 1 and _full(mapping, moved):
                return "would repeat an expensive computation"
            stack.extend(operands(op))
    return None


def _full(mapping: Mapping[str, Index], moved: set[str]) -> bool:
    """Does the moved read still cover the axis (a rotation), rather than pick one element (a gather)?"""
    return all(any(not n.startswith("v") for n in mapping[x].names()) for x in moved)


def merge(a: Kernel, b: Kernel, legal: Legal, dropped: frozenset[str]) -> Kernel:
    """The joined kernel, under the consumer's name; stores to `dropped` buffers are gone."""
    body = _Joiner(a, b, legal).join(dropped)
    b_axes = tuple(replace(x, kind="reduce") if x.name in legal.reduced else x for x in b.axes)
    accumulator = "f64" if "f64" in (a.numerics.accumulator, b.numerics.accumulator) else "f32"
    numerics = Numerics(b.numerics.rounding, b.numerics.fp_contract, accumulator)
    origins, ops = tuple(dict.fromkeys((*a.origins, *b.origins))), (*a.ops, *b.ops)
    return renumber(replace(b, axes=(*b_axes, *legal.added), body=tuple(body), numerics=numerics, origins=origins, ops=ops))
