"""Integer index expressions: polynomials over axes, symbols and SSA integers, with floor division and remainder.

The common case (affine) stays in this small normal form, which is cheap to build, hash and compare;
`to_sympy`/`from_sympy` convert both ways where a proof needs more.  Order is always by name, so text and digests
do not depend on the hash seed.  `Bounds` knows the range of every name and drives all simplification.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from flagtree.errors import IRError

if TYPE_CHECKING:
    import sympy


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
    (dm, dc), q, r = d.terms[0], {}, {}
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


# -- ranges ----------------------------------------------------------------------------------------------------------
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
        return low is not None and low >= 0

    def equal(self, a: Index, b: Index) -> bool:
        return a == b or self.simplify(a - b) == ZERO

    def minimum(self, value: Index) -> int | None:
        """A lower bound over all assignments, None when there is none: axes go to the end that their sign asks for, then symbols."""
        # axes first: an axis that runs over x // d cancels against a x // d beside it, which naming divisions would hide
        value = self._eliminate_axes(value)
        if value is None:
            return None
        value, ranges = self._name_divisions(value)
        value = ranges._eliminate_axes(value)
        if value is None:
            return None
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


# -- text and sympy --------------------------------------------------------------------------------------------------
_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.]*)|(//|[-+*%()]))")


def parse_index(text: str) -> Index:
    """Inverse of `str(Index)`.  Its own grammar, never Python's: + - * // % ( ) integers names."""
    tokens: list[str] = []
    pos = 0
    while pos < len(text.rstrip()):
        m = _TOKEN.match(text, pos)
        if not m:
            raise IRError(f"cannot read the index '{text}'", where=f"column {pos + 1}")
        tokens.append(m.group().strip())
        pos = m.end()
    tokens.append("")
    cursor = 0

    def peek() -> str:
        return tokens[cursor]

    def take() -> str:
        nonlocal cursor
        cursor += 1
        return tokens[cursor - 1]

    def factor() -> Index:
        token = take()
        if token == "(":
            value = total()
            if take() != ")":
                raise IRError(f"cannot read the index '{text}'", why="a parenthesis is not closed")
            return value
        if token == "-":
            return -factor()
        if not token or not (token[0].isalnum() or token[0] == "_"):
            raise IRError(f"cannot read the index '{text}'", why=f"unexpected '{token or 'end'}'")
        return Index.of(int(token) if token.isdigit() else token)

    def product() -> Index:
        value = factor()
        while peek() in ("*", "//", "%"):
            op, right = take(), factor()
            if op != "*" and (right.constant is not None and right.constant <= 0):
                raise IRError(f"cannot read the index '{text}'", why="a divisor is zero or negative")
            value = value * right if op == "*" else floordiv(value, right) if op == "//" else remainder(value, right)
        return value

    def total() -> Index:
        value = product()
        while peek() in ("+", "-"):
            value = value + product() if take() == "+" else value - product()
        return value

    result = total()
    if peek():
        raise IRError(f"cannot read the index '{text}'", why=f"unexpected '{peek()}'")
    return result


def from_sympy(expr: sympy.Expr, rename: Callable[[str], str] = lambda n: n) -> Index | None:
    """An Index for a sympy integer expression (torch's shape expressions included); None for a form we do not carry."""
    import sympy

    if isinstance(expr, (int, sympy.Integer)):
        return Index.of(int(expr))
    if isinstance(expr, sympy.Symbol):
        return Index.of(rename(expr.name))
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        parts = [from_sympy(a, rename) for a in expr.args]
        if any(p is None for p in parts):
            return None
        return functools.reduce((lambda a, b: a + b) if isinstance(expr, sympy.Add) else (lambda a, b: a * b), parts)
    if isinstance(expr, sympy.Pow) and isinstance(expr.exp, sympy.Integer) and 0 < int(expr.exp) <= 8:
        base = from_sympy(expr.base, rename)
        return None if base is None else functools.reduce(lambda a, b: a * b, [base] * int(expr.exp))
    kind = type(expr).__name__
    if kind in ("FloorDiv", "CleanDiv", "Mod", "PythonMod") and len(expr.args) == 2:
        a, b = (from_sympy(x, rename) for x in expr.args)
        if a is None or b is None:
            return None
        return floordiv(a, b) if kind in ("FloorDiv", "CleanDiv") else remainder(a, b)
    if isinstance(expr, sympy.floor):
        num, den = expr.args[0].as_numer_denom()
        a, b = from_sympy(num, rename), from_sympy(den, rename)
        return None if a is None or b is None else floordiv(a, b)
    return None
