"""What is known about the values of one kernel: dtype, the axes they depend on, integers as index expressions, masks as constraints.

Computed once from the body; the verifier's rules and the passes ask it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flagtree.ir.index import Bounds, Index
from flagtree.ir.program import Access, Arg, BodyOp, Compute, IndexValue, Kernel, Load, Program, Reduce, Scan, Store

NO_AXES: frozenset[str] = frozenset()
_NEGATED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}


@dataclass(slots=True)
class Facts:
    """`dtypes` and `axes` by value name; `definitions` the op that defines a value; `bounds` over symbols and axes."""

    kernel: Kernel
    bounds: Bounds
    extents: dict[str, Index]
    dtypes: dict[str, str] = field(default_factory=dict)
    axes: dict[str, frozenset[str]] = field(default_factory=dict)
    definitions: dict[str, BodyOp] = field(default_factory=dict)
    _integers: dict[str, Index | None] = field(default_factory=dict)
    _in_range: dict[tuple[Index, Index, str | None], bool] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, kernel: Kernel, before: Mapping[str, tuple[str, frozenset[str]]] | None = None) -> Facts:
        """`before`: values defined ahead of the body (a template's accumulator), name to dtype and axes."""
        extents = {a.name: a.extent for a in kernel.axes}
        facts = Facts(kernel, Bounds({s.name: (s.lo, s.hi) for s in program.symbols}, extents), extents)
        for name, (dtype, axes) in (before or {}).items():
            facts.dtypes[name], facts.axes[name] = dtype, axes
        for op in kernel.body:
            facts._add(op)
        return facts

    def _add(self, op: BodyOp) -> None:
        if isinstance(op, Store):
            return
        if isinstance(op, Load):
            axes = self.access_axes(op.access)
        elif isinstance(op, IndexValue):
            axes = self.index_axes((op.expr,))
        elif isinstance(op, Scan):
            axes = self.axes.get(op.arg, NO_AXES) | {op.axis}
        else:
            axes = self.args_axes(op.args)
        if isinstance(op, Reduce):
            for name, dtype in zip(op.names, op.dtypes):
                self.dtypes[name], self.axes[name], self.definitions[name] = dtype, axes - set(op.axes), op
        else:
            self.dtypes[op.name], self.axes[op.name], self.definitions[op.name] = op.dtype, axes, op

    def args_axes(self, args: Iterable[Arg | None]) -> frozenset[str]:
        """The axes that any of the named values depends on."""
        return NO_AXES.union(*(self.axes.get(a, NO_AXES) for a in args if isinstance(a, str)))

    def index_axes(self, index: Iterable[Index]) -> frozenset[str]:
        """The axes in index expressions, those behind SSA integers included."""
        names = NO_AXES.union(*(i.names() for i in index))
        return frozenset(n for n in names if n in self.extents).union(*(self.axes.get(n, NO_AXES) for n in names))

    def access_axes(self, access: Access) -> frozenset[str]:
        return self.index_axes(access.index) | self.args_axes((access.mask,))

    def store_axes(self, store: Store) -> frozenset[str]:
        """The axes at whose every point a store is executed."""
        return self.access_axes(store.access) | self.args_axes((store.value,))

    # -- integers and masks ------------------------------------------------------------------------------------------
    def integer(self, arg: Arg) -> Index | None:
        """An integer value as an index expression; a loaded or otherwise computed integer stands for itself."""
        if not isinstance(arg, str):
            return Index.of(arg) if isinstance(arg, int) else None
        if arg not in self._integers:
            self._integers[arg] = self._integer(arg)
        return self._integers[arg]

    def _integer(self, name: str) -> Index | None:
        op = self.definitions.get(name)
        if isinstance(op, IndexValue):
            return self.resolve(op.expr)
        if isinstance(op, Compute) and self.dtypes[name] in ("i32", "i64") and op.op in ("add", "sub", "mul", "cast"):
            parts = [self.integer(a) for a in op.args]
            if op.op == "cast":
                wide = isinstance(op.args[0], str) and self.dtypes.get(op.args[0]) in ("i32", "i64")
                return parts[0] if wide else Index.of(name)
            a, b = (Index.of(name) if p is None else p for p in parts)
            return a + b if op.op == "add" else a - b if op.op == "sub" else a * b
        return Index.of(name) if self.dtypes.get(name, "").lstrip("iu").isdigit() else None

    def resolve(self, index: Index) -> Index:
        """An index with its SSA integers replaced by what they are computed from."""
        named = {n: v for n in index.names() if n in self.definitions and (v := self.integer(n)) is not None and v.name != n}
        return index.substitute(named)

    def constraints(self, mask: str | None) -> tuple[Index, ...]:
        """Expressions that are >= 0 wherever the mask holds."""
        op = None if mask is None else self.definitions.get(mask)
        if not isinstance(op, Compute):
            return ()
        if op.op == "and":
            return tuple(c for a in op.args if isinstance(a, str) for c in self.constraints(a))
        if op.op == "not" and isinstance(op.args[0], str):
            inner = self.definitions.get(op.args[0])
            return self._comparison(inner, _NEGATED.get(inner.op, "")) if isinstance(inner, Compute) else ()
        return self._comparison(op, op.op)

    def _comparison(self, op: Compute, relation: str) -> tuple[Index, ...]:
        if relation not in ("lt", "le", "gt", "ge", "eq"):
            return ()
        a, b = self.integer(op.args[0]), self.integer(op.args[1])
        if a is None or b is None:
            return ()
        forms = {"lt": (b - a - 1,), "le": (b - a,), "gt": (a - b - 1,), "ge": (a - b,), "eq": (a - b, b - a)}
        return forms[relation]

    def in_range(self, index: Index, extent: Index, mask: str | None) -> bool:
        """Proved: 0 <= index < extent at every point where the mask holds.  A loaded integer in the index is data: allowed."""
        name = index.name
        if name is not None and name in self.extents and self.extents[name] == extent:
            return True
        key = (index, extent, mask)
        if key not in self._in_range:
            self._in_range[key] = self._prove(self.resolve(index), extent, mask)
        return self._in_range[key]

    def _prove(self, index: Index, extent: Index, mask: str | None) -> bool:
        if any(n in self.definitions for n in index.names()):
            return True
        index = self.bounds.simplify(index)
        assumed = self.constraints(mask)
        if any(self.bounds.nonnegative(-c - 1) for c in assumed):
            return True  # the mask never holds
        narrowed = self._narrowed(assumed)
        return all(
            self.bounds.nonnegative(side)
            or narrowed.nonnegative(side)
            or any(self.bounds.nonnegative(side - k * c) for c in assumed for k in _factors(side, c))
            for side in (index, extent - index - 1)
        )

    def _narrowed(self, assumed: tuple[Index, ...]) -> Bounds:
        """The bounds where constraints on one axis (i - 1 >= 0) hold: what a shifted and divided index needs."""
        limits = dict(self.bounds.limits)
        for constraint in assumed:
            axes = [n for n in constraint.names() if n in limits]
            factor = constraint.coefficient(axes[0]) if len(axes) == 1 else None
            if factor is not None and factor.constant in (1, -1):
                lo, hi = limits[axes[0]]
                rest = constraint - factor * axes[0]
                limits[axes[0]] = (-rest, hi) if factor.constant == 1 else (lo, rest)
        return self.bounds.narrowed(limits) if assumed else self.bounds


def _factors(side: Index, constraint: Index) -> set[Index]:
    """Positive constants k for which `k * constraint` may cancel a term of `side`; 1 is always tried."""
    names = {m[0] for m, c in constraint.terms if len(m) == 1 and abs(c) == 1}
    return {Index.of(1)} | {Index.of(abs(c)) for m, c in side.terms if len(m) == 1 and m[0] in names}
