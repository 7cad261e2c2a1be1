"""Ranges of names, and what they prove about index expressions: lower ends, membership, equality, simplified divisions.

A proof that fails says "not proved", never "false".  The verifier, the passes and the code generators ask here;
sympy is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping

from flagtree.ir.expression import ZERO, Atom, Index, Quotient, Remainder, floordiv, remainder, split_multiple

MOST_CASES = 8  # remainders that a proof looks at one by one


class Bounds:
    """Inclusive ranges of names: symbols have integer ends, axes run from 0 to extent - 1 (an Index over symbols)."""

    def __init__(self, symbols: Mapping[str, tuple[int, int]], axes: Mapping[str, Index] | None = None) -> None:
        self.symbols = dict(symbols)
        self.limits: dict[str, tuple[Index, Index]] = {}
        for name, extent in (axes or {}).items():
            self.limits[name] = (ZERO, Index.of(extent) - 1)

    def narrowed(self, limits: Mapping[str, tuple[Index | int, Index | int]]) -> Bounds:
        """A copy with the inclusive range of some names replaced."""
        out = Bounds(self.symbols)
        out.limits = {**self.limits, **{n: (Index.of(a), Index.of(b)) for n, (a, b) in limits.items()}}
        return out

    def in_range(self, value: Index, extent: Index) -> bool:
        """Proved: 0 <= value < extent."""
        return self.nonnegative(value) and self.nonnegative(extent - value - 1)

    def nonnegative(self, value: Index) -> bool:
        """Proved: value >= 0 for every assignment in range.  False means not proved."""
        low = value.constant if value.constant is not None else self.minimum(value)
        if low is not None and low >= 0:
            return True
        outer = self._eliminate_axes(value)  # first, as an axis ends where its extent, in symbols, says
        cases = [] if outer is None else self._divided(outer)
        return bool(cases) and all(bounds.nonnegative(case) for case, bounds in cases)

    def _divided(self, value: Index) -> list[tuple[Index, Bounds]]:
        """Cases by remainder: a symbol n of some (n + a) // d is d*q + r - a for each r below d, so that divisions by d cancel.
        Empty when there is no such division by a small d.  Each case only widens what the symbol may be, so what is proved holds."""
        for atom in (a for m, _ in value.terms for a in m if isinstance(a, Quotient)):
            d = atom.den.constant
            if d is None or not 1 < d <= MOST_CASES:
                continue
            for name in sorted(atom.num.names() & self.symbols.keys()):
                rest = (atom.num - name).constant
                if rest is not None:
                    q, (lo, hi) = f"%q{len(self.limits)}", self.symbols[name]
                    inside = self.narrowed({q: ((lo + rest) // d, (hi + rest) // d)})
                    return [(value.substitute({name: d * Index.of(q) + r - rest}), inside) for r in range(d)]
        return []

    def equal(self, a: Index, b: Index) -> bool:
        return a == b or self.simplify(a - b) == ZERO

    def minimum(self, value: Index) -> int | None:
        """A lower bound over all assignments, None when there is none: axes go to the end that their sign asks for, then symbols."""
        # axes first: an axis that runs over x // d cancels against a x // d beside it, which naming divisions would hide
        outer = self._eliminate_axes(value)
        if outer is None:
            return None
        named, ranges = self._name_divisions(outer)
        low = ranges._eliminate_axes(named)
        if low is None:
            return None
        value = low
        # shift every symbol by its lower end: with all coefficients non-negative, the constant is the minimum
        lows = {n: Index.of(n) + lo for n, (lo, _) in self.symbols.items() if n in value.names()}
        shifted = value.substitute(lows)
        if all(c >= 0 for m, c in shifted.terms if m) and all(a in self.symbols for m, _ in shifted.terms for a in m):
            return next((c for m, c in shifted.terms if not m), 0)
        return ranges.interval(value)[0]

    def _name_divisions(self, value: Index) -> tuple[Index, Bounds]:
        """Divisions become axes of their own, so that elimination sees an affine form: x % d runs over 0..d-1."""
        limits: dict[str, tuple[Index | int, Index | int]] = {}
        names: dict[Atom, str] = {}
        out = ZERO
        for m, c in value.terms:
            product = Index.of(c)
            for atom in m:
                if not isinstance(atom, str):
                    lo, hi = self._atom_interval(atom)
                    top = atom.den - 1 if isinstance(atom, Remainder) else self._quotient_top(atom) or hi
                    if lo is None or top is None:
                        product = product * Index((((atom,), 1),))
                        continue
                    name = names.setdefault(atom, f"%{len(names)}")
                    limits[name] = (lo, top)
                    atom = name
                product = product * atom
            out = out + product
        return (out, self.narrowed(limits)) if limits else (value, self)

    def _quotient_top(self, atom: Quotient) -> Index | None:
        """An upper bound of floor(num/den) over the symbols, where the largest num is q*den + r with r within one den:
        i // s1 for i < s0*s1 is at most s0 - 1."""
        low = self._eliminate_axes(-atom.num)
        if low is None or not (low.names() | atom.den.names()) <= self.symbols.keys():
            return None
        q, r = split_multiple(-low, atom.den)
        if r.constant is None:
            return None
        if r.constant >= 0:
            return q if self.nonnegative(atom.den - r.constant - 1) else None
        return q - 1 if self.nonnegative(atom.den + r.constant) else None

    def maximum(self, value: Index) -> int | None:
        low = self.minimum(-value)
        return None if low is None else -low

    def _eliminate_axes(self, value: Index) -> Index | None:
        """Send each axis to the end that its sign asks for; one inside a division stays, one of unknown sign gives None."""
        stuck: set[str] = set()
        for _ in range(len(self.limits) + 1):
            name = next((n for n in sorted(value.names()) if n in self.limits and n not in stuck), None)
            if name is None:
                return value
            factor = value.coefficient(name)
            if factor is None:
                stuck.add(name)
                continue
            lo, hi = self.limits[name]
            if self._sign(factor) >= 0:
                value = value.substitute({name: lo})
            elif self._sign(-factor) >= 0:
                value = value.substitute({name: hi})
            else:
                return None
        return value

    def _sign(self, factor: Index) -> int:
        if factor.constant is not None:
            return 1 if factor.constant >= 0 else -1
        lo, _ = self.interval(factor)
        return 1 if lo is not None and lo >= 0 else -1

    def interval(self, value: Index) -> tuple[int | None, int | None]:
        """Plain interval arithmetic over every name; None is unbounded."""
        lo: int | None = 0
        hi: int | None = 0
        for m, c in value.terms:
            a: int | None = 1
            b: int | None = 1
            for atom in m:
                a, b = _interval_product((a, b), self._atom_interval(atom))
            a, b = _interval_product((a, b), (c, c))
            lo = None if lo is None or a is None else lo + a
            hi = None if hi is None or b is None else hi + b
        return lo, hi

    def _atom_interval(self, atom: Atom) -> tuple[int | None, int | None]:
        if isinstance(atom, str):
            if atom in self.symbols:
                return self.symbols[atom]
            if atom in self.limits:
                lo, hi = self.limits[atom]
                return self.interval(lo)[0], self.interval(hi)[1]
            return None, None
        nlo, nhi = self.interval(atom.num)
        dlo, dhi = self.interval(atom.den)
        if isinstance(atom, Remainder):
            top = None if dhi is None else dhi - 1
            return 0, (min(top, nhi) if top is not None and nhi is not None and nlo is not None and nlo >= 0 else top)
        if dlo is None or dlo <= 0 or nlo is None:
            return None, None
        low = nlo // dlo if nlo < 0 else (0 if dhi is None else nlo // dhi)
        return low, None if nhi is None else (nhi // dlo if nhi >= 0 else (nhi // dhi if dhi is not None else 0))

    def simplify(self, value: Index) -> Index:
        """Rebuild every division with ranges known."""
        if all(isinstance(a, str) for m, _ in value.terms for a in m):
            return value
        out = ZERO
        for m, c in value.terms:
            product = Index.of(c)
            for atom in m:
                if isinstance(atom, str):
                    product = product * atom
                else:
                    build = floordiv if isinstance(atom, Quotient) else remainder
                    product = product * build(self.simplify(atom.num), self.simplify(atom.den), self)
            out = out + product
        return out


def _interval_product(x: tuple[int | None, int | None], y: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    if x == (0, 0) or y == (0, 0):
        return 0, 0
    if None in x or None in y:
        if x[0] is not None and x[0] >= 0 and y[0] is not None and y[0] >= 0:
            return x[0] * y[0], None
        return None, None
    ends = [a * b for a in x for b in y]  # type: ignore[operator]
    return min(ends), max(ends)


