"""Index expressions, their ranges and their text, under one import; the parts are expression, bounds and index_text.

Every dimension of a buffer, every access and every symbol's range is made of these.
"""

from __future__ import annotations

from flagtree.ir.bounds import Bounds
from flagtree.ir.expression import (
    ONE,
    ZERO,
    Atom,
    Index,
    Monomial,
    Quotient,
    Remainder,
    contiguous_strides,
    flatten,
    floordiv,
    remainder,
    split_multiple,
    symbol,
    unflatten,
)
from flagtree.ir.index_text import from_sympy, parse_index

__all__ = [
    "ONE",
    "ZERO",
    "Atom",
    "Bounds",
    "Index",
    "Monomial",
    "Quotient",
    "Remainder",
    "contiguous_strides",
    "flatten",
    "floordiv",
    "from_sympy",
    "parse_index",
    "remainder",
    "split_multiple",
    "symbol",
    "unflatten",
]
