"""Index expressions as Triton text, 32 bits wide where the ranges prove that they fit and 64 bits where they may not.

Invariant: no intermediate of an expression overflows the width that it is computed in.
Place in the flow: called by codegen/triton.py for offsets, masks, loop bounds and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flagtree.codegen.triton_ops import closed
from flagtree.ir.index import Atom, Bounds, Index, Monomial, Quotient

INT32_MAX = 2**31 - 1


def largest(index: Index, bounds: Bounds) -> int | None:
    """A bound on the magnitude of every partial sum of `index`: the sum over its terms; None where a name is unbounded."""
    total = 0
    for monomial, coefficient in index.terms:
        lo, hi = bounds.interval(Index(((monomial, coefficient),)))
        if lo is None or hi is None:
            return None
        total += max(abs(lo), abs(hi))
    return total


def fits32(index: Index, bounds: Bounds) -> bool:
    """Proved: computing `index` with 32-bit integers cannot overflow."""
    bound = largest(index, bounds)
    return bound is not None and bound <= INT32_MAX


class IndexText:
    """Renders indices.  `widths` gives 32 or 64 for each name in scope (axes, symbols, SSA integers);
    `need` is told the helper functions that the text calls."""

    def __init__(self, bounds: Bounds, widths: Mapping[str, int], need: Callable[[str], None]) -> None:
        self.bounds, self.widths, self.need = bounds, widths, need

    def text(self, index: Index, wide: bool = False) -> str:
        """The sum as an expression; `wide` forces every term to 64 bits."""
        out = ""
        for monomial, coefficient in index.terms:
            term = self._term(monomial, abs(coefficient), wide)
            out += (" - " if coefficient < 0 else " + ") + term
        if not out:
            return "0"
        return "-" + out[3:] if out.startswith(" - ") else out[3:]

    def operand(self, index: Index, wide: bool = False) -> str:
        """The same, in parentheses unless it is one name or number."""
        text = self.text(index, wide)
        return text if text.isidentifier() or text.isdigit() or closed(text) else f"({text})"

    def is_wide(self, index: Index) -> bool:
        """Whether the expression must be computed in 64 bits."""
        return not fits32(index, self.bounds)

    def _term(self, monomial: Monomial, coefficient: int, wide: bool) -> str:
        if not monomial:
            return str(coefficient)
        factors = [self._atom(atom, wide and k == 0) for k, atom in enumerate(monomial)]
        if coefficient != 1:
            factors.append(str(coefficient))
        return " * ".join(factors)

    def _atom(self, atom: Atom, wide: bool) -> str:
        """One factor; `wide` casts it, and with it the product that it begins, to 64 bits."""
        if isinstance(atom, str):
            return f"{atom}.to(tl.int64)" if wide and self.widths[atom] == 32 else atom
        inner_wide = self.is_wide(atom.num) or self.is_wide(atom.den)
        text = self._division(atom, inner_wide)
        return f"{text}.to(tl.int64)" if wide and not inner_wide else text

    def _division(self, atom: Atom, wide: bool) -> str:
        assert not isinstance(atom, str)
        quotient = isinstance(atom, Quotient)
        if self.bounds.nonnegative(atom.num):  # Triton's // and % truncate: the same from zero up
            return f"({self.operand(atom.num, wide)} {'//' if quotient else '%'} {self.operand(atom.den, wide)})"
        name = "floor_div" if quotient else "floor_mod"
        self.need(name)
        return f"{name}({self.text(atom.num, wide)}, {self.text(atom.den, wide)})"
