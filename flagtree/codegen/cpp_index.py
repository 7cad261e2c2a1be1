"""Index expressions as C++ over i64, and what is known of their divisibility."""

from __future__ import annotations

from collections.abc import Mapping

from flagtree.ir.index import Bounds, Index, Quotient, Remainder


def index_text(index: Index, names: Mapping[str, str], bounds: Bounds) -> str:
    """The expression, each name spelled as `names` says (else as itself); floor division as C's where nothing is negative."""
    if not index.terms:
        return "0"
    out = ""
    for monomial, c in index.terms:
        factors = [names.get(a, a) if isinstance(a, str) else _division(a, names, bounds) for a in monomial]
        if abs(c) != 1 or not factors:
            factors.insert(0, str(abs(c)))
        out += (" - " if c < 0 else " + ") + " * ".join(factors)
    return "-" + out[3:] if out.startswith(" - ") else out[3:]


def operand_text(index: Index, names: Mapping[str, str], bounds: Bounds) -> str:
    """Like `index_text`, in parentheses unless it is one name or number."""
    text = index_text(index, names, bounds)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def _division(atom: Quotient | Remainder, names: Mapping[str, str], bounds: Bounds) -> str:
    num, den = operand_text(atom.num, names, bounds), operand_text(atom.den, names, bounds)
    if bounds.nonnegative(atom.num):
        return f"({num} {'/' if isinstance(atom, Quotient) else '%'} {den})"
    return f"floor_{'quotient' if isinstance(atom, Quotient) else 'remainder'}({num}, {den})"


def is_multiple(index: Index, of: int, multiples: Mapping[str, int]) -> bool:
    """Proved: divisible by `of`, where each symbol is a multiple of `multiples[name]`."""
    for monomial, c in index.terms:
        for atom in monomial:
            c *= multiples.get(atom, 1) if isinstance(atom, str) else 1
        if c % of:
            return False
    return True
