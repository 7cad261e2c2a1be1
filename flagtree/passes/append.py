"""Joining a pointwise consumer to a producer on the same domain, at the cost of what the consumer adds.

Invariant: the kernel is the one that `can_merge`, `merge` and `canonical_kernel` give, which stays the general way; None sends the
caller there.  Place in the flow: fusion asks here first, so that a long chain is not renamed, folded and proved again at each merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flagtree.ir.index import ZERO, Index
from flagtree.ir.program import Access, Axis, BodyOp, Compute, Kernel, Load, Numerics, Origin, Program, Store
from flagtree.passes.canonicalize import exact_cast, identity


@dataclass(slots=True)
class Known:
    """A canonical kernel of plain loads, computations and whole stores over parallel axes i0, i1, …, with what the canonical rules know
    of its body: dtypes, the operand of each cast, the first value of each identity, the uses of each value, the indices of each buffer."""

    axes: tuple[Axis, ...]
    body: list[BodyOp] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    casts: dict[str, str] = field(default_factory=dict)
    first: dict[object, str] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    loads: dict[str, frozenset[tuple[Index, ...]]] = field(default_factory=dict)
    stores: dict[str, Store] = field(default_factory=dict)
    origins: dict[Origin, None] = field(default_factory=dict)

    def copy(self) -> Known:
        tables = (self.dtypes, self.casts, self.first, self.uses, self.loads, self.stores, self.origins)
        return Known(self.axes, list(self.body), *(dict(t) for t in tables))  # type: ignore[arg-type]


class Unfit(Exception):
    """Something that only the general way decides."""


def known(program: Program, kernel: Kernel) -> Known | None:
    """What is known of a kernel, under canonical names; None when it is not plain."""
    if kernel.schedule is not None or any(a.name != f"i{k}" or a.kind != "parallel" for k, a in enumerate(kernel.axes)):
        return None
    out = Known(kernel.axes)
    try:
        _Appending(program, out, _own_axes(kernel, out.axes)).extend(kernel.body, {})
    except Unfit:
        return None
    out.origins = dict.fromkeys(kernel.origins)
    return out


def append(program: Program, a: Kernel, state: Known, b: Kernel, kept: frozenset[str]) -> tuple[Kernel, Known] | None:
    """Producer `a`, of which `state` is known, and consumer `b` as one kernel; `kept` are flowing buffers whose store must stay.

    None where the domains differ, a value is read at another point, or anything else needs the general way.
    """
    policies = {(k.numerics.rounding, k.numerics.fp_contract) for k in (a, b)}
    reads, writes = set(b.reads), set(b.writes)
    flowing = reads & state.stores.keys()
    if b.schedule is not None or len(policies) > 1 or not flowing:
        return None
    overwritten = writes & state.stores.keys()
    try:
        new = state.copy()
        join = _Appending(program, new, _own_axes(b, new.axes))
        values = {n: new.stores[n] for n in flowing}
        join.drop((flowing - kept) | overwritten)
        join.extend(b.body, values)
    except Unfit:
        return None
    new.origins.update(dict.fromkeys(b.origins))
    accumulator = "f64" if "f64" in (a.numerics.accumulator, b.numerics.accumulator) else "f32"
    numerics = Numerics(b.numerics.rounding, b.numerics.fp_contract, accumulator)
    ops = (*a.ops, *b.ops)
    return replace(b, axes=new.axes, body=tuple(new.body), numerics=numerics, origins=tuple(new.origins), ops=ops), new


def _own_axes(kernel: Kernel, axes: tuple[Axis, ...]) -> dict[str, str]:
    """Axis of the kernel to axis of the domain, one by one in order; axes of one point are left out.  Raises Unfit when they differ."""
    mine = [x for x in kernel.axes if x.extent.constant != 1]
    same = len(mine) == len(axes) and all(x.kind == "parallel" and x.extent == y.extent for x, y in zip(mine, axes, strict=False))
    if not same:
        raise Unfit
    return {x.name: y.name for x, y in zip(mine, axes, strict=True)}


class _Appending:
    """Adds ops to a Known under the canonical rules; `axes` maps the names of the ops' axes to the domain's."""

    def __init__(self, program: Program, to: Known, axes: Mapping[str, str]) -> None:
        self.program, self.to = program, to
        self.moved = {x: Index.of(y) for x, y in axes.items() if x != y}
        self.names = axes.keys() | {s.name for s in program.symbols}
        self.same: dict[str, str] = {}  # value of the ops -> value of the Known
        self.touched: set[str] = set()

    def drop(self, buffers: Iterable[str]) -> None:
        """Take stores away; their values must find another use."""
        gone = {id(self.to.stores.pop(n)) for n in buffers}
        for op in self.to.body:
            if id(op) in gone:
                assert isinstance(op, Store)
                self.to.uses[op.value] -= 1
                self.touched.add(op.access.buffer)
        self.to.body = [op for op in self.to.body if id(op) not in gone]

    def extend(self, body: Iterable[BodyOp], flowing: Mapping[str, Store]) -> None:
        """Add `body`; a load of a flowing buffer is the value stored there."""
        for op in body:
            if isinstance(op, Load):
                self.load(op, flowing.get(op.access.buffer))
            elif isinstance(op, Compute):
                self.compute(op)
            elif isinstance(op, Store):
                self.store(op)
            else:
                raise Unfit
        if 0 in self.to.uses.values():
            raise Unfit  # something is dead now
        for name in self.touched:  # what is loaded and stored is so at one element
            if name in self.to.stores and self.to.loads.get(name, frozenset()) - {self.to.stores[name].access.index}:
                raise Unfit

    def access(self, access: Access) -> Access:
        """The access over the domain's axes.  Raises Unfit for a mask, a view, an SSA integer or a division."""
        if access.mask is not None or self.program.buffer(access.buffer).alias_of is not None:
            raise Unfit
        for i in access.index:
            if any(not isinstance(atom, str) or atom not in self.names for monomial, _ in i.terms for atom in monomial):
                raise Unfit
        self.touched.add(access.buffer)
        if not self.moved:
            return access
        return Access(access.buffer, tuple(i.substitute(self.moved) for i in access.index))

    def define(self, op: Load | Compute) -> None:
        key = identity(op)
        name = f"v{len(self.to.dtypes)}"
        known = self.to.first.setdefault(key, name)
        self.same[op.name] = known
        if known != name:
            return
        self.to.dtypes[name], self.to.uses[name] = op.dtype, 0
        if isinstance(op, Compute):
            for a in op.args:
                if isinstance(a, str):
                    self.to.uses[a] += 1
            self.to.body.append(op if op.name == name else Compute(name, op.dtype, op.op, op.args))
        else:
            loads = self.to.loads.get(op.access.buffer, frozenset())
            self.to.loads[op.access.buffer] = loads | {op.access.index}
            self.to.body.append(op if op.name == name else Load(name, op.dtype, op.access, op.other))

    def load(self, op: Load, stored: Store | None) -> None:
        access = self.access(op.access)
        if stored is not None:
            if access.index != stored.access.index:
                raise Unfit  # read at another point
            self.same[op.name] = stored.value
        else:
            self.define(op if access is op.access else Load(op.name, op.dtype, access, op.other))

    def compute(self, op: Compute) -> None:
        args = tuple([self.same[a] if isinstance(a, str) else a for a in op.args])
        if op.op == "cast" and isinstance(args[0], str):
            arg = args[0]
            while arg in self.to.casts and exact_cast(self.to.dtypes[self.to.casts[arg]], self.to.dtypes[arg]):
                arg = self.to.casts[arg]
            if self.to.dtypes[arg] == op.dtype:
                self.same[op.name] = arg
                return
            args = (arg,)
        self.define(op if args == op.args else Compute(op.name, op.dtype, op.op, args))
        if op.op == "cast" and isinstance(args[0], str):
            self.to.casts[self.same[op.name]] = args[0]

    def store(self, op: Store) -> None:
        access, value = self.access(op.access), self.same[op.value]
        if op.mode != "set" or access.buffer in self.to.stores or not self.whole(access):
            raise Unfit
        self.to.uses[value] += 1
        new = op if access is op.access and value == op.value else Store(access, value, op.mode)
        self.to.stores[access.buffer] = new
        self.to.body.append(new)

    def whole(self, access: Access) -> bool:
        """Is every element stored once: each dimension at an axis of its own, or at 0 where it has one element?"""
        left = {x.name: x.extent for x in self.to.axes}
        for index, size in zip(access.index, self.program.buffer(access.buffer).shape, strict=True):
            if size != (Index.of(1) if index == ZERO else left.pop(index.name or "", None)):
                return False
        return not left
