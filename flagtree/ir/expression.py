"""Integer index expressions: polynomials over axes, symbols and SSA integers, with floor division and remainder.

The common case (affine) stays in this small normal form, which is cheap to build, hash and compare; `to_sympy` converts
where a proof needs more.  Order is always by name, so text and digests do not depend on the hash seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    import sympy

    from flagtree.ir.bounds import Bounds


@dataclass(frozen=True, slots=True)
class Quotient:
    """floor(num / den), den > 0."""

    num: Index
    den: Index

    def __str__(self) -> str:
        return f"{_operand(self.num)} // {_operand(self.den)}"


@dataclass(frozen=True, slots=True)
class Remainder:
    """num - den * floor(num / den), den > 0: in [0, den)."""

    num: Index
    den: Index

    def __str__(self) -> str:
        return f"{_operand(self.num)} % {_operand(self.den)}"


def _operand(index: Index) -> str:
    text = str(index)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


Atom = Union[str, Quotient, Remainder]
Monomial = tuple[Atom, ...]


@functools.lru_cache(maxsize=65536)
def _atom_key(atom: Atom) -> tuple[int, str]:
    return (0, atom) if isinstance(atom, str) else (1, str(atom))


def _monomial_key(m: Monomial) -> tuple:
    # constants last, longer products first, then by name: "s1*i0 + 4096*i1 + i2 + 3"
    return (-len(m), tuple(_atom_key(a) for a in m))


@dataclass(frozen=True, slots=True)
class Index:
    """Sum of `coefficient * product of atoms`; terms sorted, no zero coefficient, so equal values of this form are `==`."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(value: Index | int | str) -> Index:
        if isinstance(value, Index):
            return value
        if isinstance(value, str):
            return Index((((value,), 1),))
        return Index((((), int(value)),)) if value else ZERO

    @staticmethod
    def _make(terms: dict[Monomial, int]) -> Index:
        return Index(tuple(sorted(((m, c) for m, c in terms.items() if c), key=lambda t: _monomial_key(t[0]))))

    # -- arithmetic --------------------------------------------------------------------------------------------------
    def __add__(self, other: Index | int | str) -> Index:
        other = Index.of(other)
        if not other.terms:
            return self
        if not self.terms:
            return other
        out = dict(self.terms)
        for m, c in other.terms:
            out[m] = out.get(m, 0) + c
        return Index._make(out)

    __radd__ = __add__

    def __neg__(self) -> Index:
        return Index(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: Index | int | str) -> Index:
        return self + (-Index.of(other))

    def __rsub__(self, other: Index | int | str) -> Index:
        return Index.of(other) + (-self)

    def __mul__(self, other: Index | int | str) -> Index:
        other = Index.of(other)
        out: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in other.terms:
                m = tuple(sorted(m1 + m2, key=_atom_key)) if m1 and m2 else m1 or m2
                out[m] = out.get(m, 0) + c1 * c2
        return Index._make(out)

    __rmul__ = __mul__

    def __floordiv__(self, other: Index | int | str) -> Index:
        return floordiv(self, Index.of(other))

    def __mod__(self, other: Index | int | str) -> Index:
        return remainder(self, Index.of(other))

    # -- queries -----------------------------------------------------------------------------------------------------
    @property
    def constant(self) -> int | None:
        """The value when no name occurs, else None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and self.terms[0][0] == () else None

    @property
    def name(self) -> str | None:
        """The name when this is exactly one name, else None."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            atom = self.terms[0][0][0]
            return atom if isinstance(atom, str) else None
        return None

    def names(self) -> frozenset[str]:
        """Every axis, symbol and SSA name, those inside divisions included."""
        return _names(self)

    def coefficient(self, name: str) -> Index | None:
        """The factor of `name` when the expression is affine in it (no square, not inside a division), else None."""
        out: dict[Monomial, int] = {}
        for m, c in self.terms:
            if name in m:
                rest = list(m)
                rest.remove(name)
                if name in rest or any(not isinstance(a, str) and name in _atom_names(a) for a in rest):
                    return None
                out[tuple(rest)] = out.get(tuple(rest), 0) + c
            elif any(not isinstance(a, str) and name in _atom_names(a) for a in m):
                return None
        return Index._make(out)

    def substitute(self, values: Mapping[str, Index]) -> Index:
        """Replace names; divisions are rebuilt (structurally simplified, not by range)."""
        if not values or values.keys().isdisjoint(self.names()):
            return self
        out = ZERO
        for m, c in self.terms:
            product = Index.of(c)
            for atom in m:
                product = product * _substitute_atom(atom, values)
            out = out + product
        return out

    def rename(self, names: Mapping[str, str]) -> Index:
        return self.substitute({k: Index.of(v) for k, v in names.items()})

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The integer for concrete `values`; raises KeyError for a name that is missing."""
        total = 0
        for m, c in self.terms:
            for atom in m:
                if isinstance(atom, str):
                    c *= values[atom]
                elif isinstance(atom, Quotient):
                    c *= atom.num.evaluate(values) // atom.den.evaluate(values)
                else:
                    c *= atom.num.evaluate(values) % atom.den.evaluate(values)
            total += c
        return total

    def to_json(self) -> object:
        """Nested lists that the runtime evaluates without this module: int, name, [op, a, b, ...]."""
        def atom(a: Atom) -> object:
            if isinstance(a, str):
                return a
            return ["//" if isinstance(a, Quotient) else "%", a.num.to_json(), a.den.to_json()]

        def term(m: Monomial, c: int) -> object:
            if not m:
                return c
            factors = ([c] if c != 1 else []) + [atom(a) for a in m]
            return factors[0] if len(factors) == 1 else ["*", *factors]

        parts = [term(m, c) for m, c in self.terms]
        return 0 if not parts else parts[0] if len(parts) == 1 else ["+", *parts]

    def to_sympy(self) -> sympy.Expr:
        import sympy

        def atom(a: Atom) -> sympy.Expr:
            if isinstance(a, str):
                return symbol(a)
            n, d = a.num.to_sympy(), a.den.to_sympy()
            return sympy.floor(n / d) if isinstance(a, Quotient) else n - d * sympy.floor(n / d)

        return sympy.Add(*(sympy.Mul(c, *(atom(a) for a in m)) for m, c in self.terms))

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        out = ""
        for m, c in self.terms:
            body = "*".join(a if isinstance(a, str) else f"({a})" for a in m)
            if not m:
                body = str(abs(c))
            elif abs(c) != 1:
                body = f"{abs(c)}*{body}"
            out += (" - " if c < 0 else " + ") + body
        return "-" + out[3:] if out.startswith(" - ") else out[3:]

    __repr__ = __str__


ZERO = Index(())
ONE = Index((((), 1),))


@functools.lru_cache(maxsize=65536)
def _names(index: Index) -> frozenset[str]:
    out: set[str] = set()
    for m, _ in index.terms:
        for a in m:
            out |= _atom_names(a)
    return frozenset(out)


def _atom_names(atom: Atom) -> frozenset[str]:
    return frozenset((atom,)) if isinstance(atom, str) else atom.num.names() | atom.den.names()


def _substitute_atom(atom: Atom, values: Mapping[str, Index]) -> Index:
    if isinstance(atom, str):
        return values.get(atom, Index.of(atom))
    n, d = atom.num.substitute(values), atom.den.substitute(values)
    return floordiv(n, d) if isinstance(atom, Quotient) else remainder(n, d)


@functools.lru_cache(maxsize=4096)
def symbol(name: str) -> sympy.Symbol:
    """The one sympy symbol factory: equal names are equal symbols."""
    import sympy

    return sympy.Symbol(name, integer=True)


# -- division --------------------------------------------------------------------------------------------------------
def _divide_monomial(m: Monomial, d: Monomial) -> Monomial | None:
    rest = list(m)
    for atom in d:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def split_multiple(a: Index, d: Index) -> tuple[Index, Index]:
    """(q, r) with a == q*d + r, moving every term that `d` (one monomial) divides into q; floor(a/d) == q + floor(r/d)."""
    if len(d.terms) != 1:
        return (ONE, ZERO) if a == d else (ZERO, a)
    dm, dc = d.terms[0]
    q: dict[Monomial, int] = {}
    r: dict[Monomial, int] = {}
    for m, c in a.terms:
        rest = _divide_monomial(m, dm)
        if rest is None:
            r[m] = c
        elif c % dc == 0:
            q[rest] = q.get(rest, 0) + c // dc
        else:
            # floor semantics: c = dc*(c//dc) + c%dc keeps the remainder's coefficient in [0, dc)
            if c // dc:
                q[rest] = q.get(rest, 0) + c // dc
            r[m] = c % dc
    return Index._make(q), Index._make(r)


def floordiv(a: Index, d: Index, bounds: Bounds | None = None) -> Index:
    """floor(a / d) for d > 0, simplified structurally and, with `bounds`, by range."""
    if d.constant == 1:
        return a
    q, r = split_multiple(a, d)
    if r.constant is not None and d.constant is not None:
        return q + r.constant // d.constant
    if not r.terms:
        return q
    if bounds is not None and bounds.in_range(r, d):
        return q
    if bounds is not None and bounds.in_range(r - d, d):
        return q + 1  # a negative constant that the split above borrowed for
    if len(r.terms) == 1 and r.terms[0][1] == 1 and len(r.terms[0][0]) == 1 and isinstance(inner := r.terms[0][0][0], Quotient):
        return q + floordiv(inner.num, inner.den * d, bounds)  # (x // a) // b == x // (a*b)
    if bounds is not None and (split := _split_inside(r, d, bounds)) is not None:
        return q + floordiv(split[0], split[2], bounds)
    common = _common_factor(r, d)
    if common is not None:
        return q + floordiv(common[0], common[1], bounds)
    return q + Index((((Quotient(r, d),), 1),))


def remainder(a: Index, d: Index, bounds: Bounds | None = None) -> Index:
    """a mod d for d > 0, simplified structurally and, with `bounds`, by range."""
    if d.constant == 1:
        return ZERO
    _, r = split_multiple(a, d)
    if r.constant is not None and d.constant is not None:
        return Index.of(r.constant % d.constant)
    if len(r.terms) == 1 and r.terms[0][1] == 1 and len(r.terms[0][0]) == 1:
        inner = r.terms[0][0][0]
        if isinstance(inner, Remainder) and split_multiple(inner.den, d)[1] == ZERO:
            return remainder(inner.num, d, bounds)  # (x % (k*d)) % d == x % d
    if not r.terms or (bounds is not None and bounds.in_range(r, d)):
        return r
    if bounds is not None and bounds.in_range(r - d, d):
        return r - d
    if bounds is not None and (split := _split_inside(r, d, bounds)) is not None:
        outer, inner_part, rest_of_d = split
        factor = split_multiple(d, rest_of_d)[0]
        return remainder(outer, rest_of_d, bounds) * factor + inner_part
    return Index((((Remainder(r, d),), 1),))


def _split_inside(a: Index, d: Index, bounds: Bounds) -> tuple[Index, Index, Index] | None:
    """(x, y, e) with a == x*f + y, d == e*f and 0 <= y < f: then a // d == x // e and a % d == (x % e)*f + y."""
    if len(d.terms) != 1:
        return None
    dm, dc = d.terms[0]
    shared = {math.gcd(dc, c) for _, c in a.terms} - {1}
    factors = [Index.of(g) for g in sorted(shared, reverse=True) if dm or g != dc]
    factors += [Index._make({dm[:k] + dm[k + 1 :]: dc}) for k in range(len(dm)) if len(dm) > 1]
    for f in factors:
        x, y = split_multiple(a, f)
        if x.terms and y != a and bounds.in_range(y, f):
            return x, y, split_multiple(d, f)[0]
    return None


def _common_factor(a: Index, d: Index) -> tuple[Index, Index] | None:
    """Divide both by an integer that divides every coefficient: (2*x)//(2*y) is x//y."""
    g = functools.reduce(math.gcd, (c for _, c in a.terms + d.terms))
    if g <= 1:
        return None
    return Index(tuple((m, c // g) for m, c in a.terms)), Index(tuple((m, c // g) for m, c in d.terms))


# -- strided memory --------------------------------------------------------------------------------------------------
def contiguous_strides(shape: Iterable[Index]) -> tuple[Index, ...]:
    """Row-major strides in elements."""
    out: list[Index] = []
    step = ONE
    for extent in reversed(tuple(shape)):
        out.append(step)
        step = step * extent
    return tuple(reversed(out))


def flatten(index: Iterable[Index], strides: Iterable[Index]) -> Index:
    """Offset in elements of one element."""
    total = ZERO
    for i, s in zip(index, strides, strict=True):
        total = total + i * s
    return total


def unflatten(offset: Index, shape: tuple[Index, ...], bounds: Bounds) -> tuple[Index, ...]:
    """Per-dimension index of a row-major tensor for a flat `offset`: the inverse of `flatten` on contiguous strides."""
    out: list[Index] = []
    rest = offset
    strides = contiguous_strides(shape)
    for k, step in enumerate(strides):
        if shape[k].constant == 1:
            out.append(ZERO)
            continue
        out.append(floordiv(rest, step, bounds))
        rest = remainder(rest, step, bounds)
    return tuple(out)
