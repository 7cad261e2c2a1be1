"""Sizes of the trace (ints and SymInts) as indices of the IR, and the symbols of a program.

One spelling for sizes that the trace's guards equate, so that equal extents are equal indices.  Between torch's shape
environment, which owns the guards, and `lowering.py`, which declares buffers with these indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min

from flagtree.ir.index import Index, Quotient, from_sympy
from flagtree.ir.program import UNBOUNDED, Symbol
from flagtree.lower.builder import NotLowered


class Sizes:
    """`names`: the shape environment's name of each symbol met to the program's; `declared`: those with a source."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.names: dict[str, str] = dict(names or {})
        self.declared: dict[str, Symbol] = {}
        self._equalities: dict[Any, Any] | None = None
        self._multiples: dict[str, int] = {}

    def index(self, value: object) -> Index:
        """Index of an int or SymInt; raises NotLowered for an expression that indices do not carry."""
        if isinstance(value, int):
            return Index.of(value)
        if isinstance(value, torch.SymInt):
            found = from_sympy(_decided(self._expression(value), value.node.shape_env), self.name)
            if found is None:
                raise NotLowered(f"size {value.node.expr} is no polynomial with floor divisions")
            return self._divisible(found)
        raise NotLowered(f"{value!r} is not an integer")

    def stride(self, value: object) -> Index:
        """As `index`; torch writes Max(1, n) for sizes inside strides, which differs from n only in a tensor without elements."""
        if isinstance(value, torch.SymInt):
            expr = self._expression(value).replace(_is_floor_of_one, lambda e: next(a for a in e.args if a != 1))
            found = from_sympy(expr, self.name)
            if found is not None:
                return self._divisible(found)
        return self.index(value)

    def name(self, name: str) -> str:
        """The program's name of a symbol of the shape environment."""
        return self.names.setdefault(name, f"s{len(self.names)}")

    def declare(self, value: torch.SymInt, source: tuple) -> None:
        """`value` is known from `source`; the first source of a symbol counts, an expression of symbols tells nothing."""
        expr = self._expression(value)
        if expr.is_Symbol and (name := self.name(expr.name)) not in self.declared:
            lo, hi = _range_of(value.node.shape_env, expr, -UNBOUNDED if source[0] == "scalar" else 0)
            self.declared[name] = Symbol(name, lo, hi, source)

    def _divisible(self, index: Index) -> Index:
        """A size n that a guard made a multiple of k is written k * (n // k), so that its parts cancel."""
        exact = {}
        for symbol, k in self._multiples.items():
            size = Index.of(self.name(symbol))
            exact[self.name(symbol)] = k * Index((((Quotient(size, Index.of(k)),), 1),))
        return index.substitute(exact)

    def _expression(self, value: torch.SymInt) -> Any:
        """The size with everything that the trace's guards equate replaced by one spelling."""
        if self._equalities is None:
            self._equalities, self._multiples = _equalities(value.node.shape_env)
        return value.node.expr.xreplace(self._equalities)


def _is_floor_of_one(expr: Any) -> bool:
    return type(expr).__name__ == "Max" and len(expr.args) == 2 and 1 in expr.args


def _decided(expr: Any, shape_env: Any) -> Any:
    """Min and Max of sizes by what holds for the example: the shape environment guards on it."""
    while True:
        choice = next((e for e in expr.atoms(Min, Max) if e.free_symbols), None)
        if choice is None:
            return expr
        found, *others = choice.args
        for other in others:
            if bool(shape_env.evaluate_expr(found <= other)) != isinstance(choice, Min):
                found = other
        expr = expr.xreplace({choice: found})


def _equalities(shape_env: Any) -> tuple[dict[Any, Any], dict[str, int]]:
    """(symbol -> expression, symbol's name -> divisor) from guards that torch did not already turn into replacements."""
    out: dict[Any, Any] = {}
    multiples: dict[str, int] = {}
    for guard in shape_env.guards:
        expr = shape_env.replace(guard.expr).xreplace(out)
        if not expr.is_Equality:
            continue
        for a, b in (expr.args, expr.args[::-1]):
            if type(a).__name__ in ("Mod", "PythonMod") and b == 0 and a.args[0].is_Symbol and a.args[1].is_Integer:
                multiples[a.args[0].name] = int(a.args[1])
            elif b.is_Mul and b.args[0].is_Integer:  # n == 2 * (n // 2): torch infers the size 2 of view(-1, 2) as n // (n // 2)
                out[FloorDiv(a, b / b.args[0])] = b.args[0]
            if a.is_Symbol and not b.has(a):
                out = {k: v.xreplace({a: b}) for k, v in out.items()} | {a: b}
                break
        else:
            solved = _solved(expr.lhs - expr.rhs)
            if solved is None and expr.rhs.is_Integer:  # Max(1, n - 5) == 1
                solved = {expr.lhs: expr.rhs}
            if solved is None:  # n // 2 + (n + 1) // 2 == n: nothing to solve, but one spelling for both
                solved = next(({b: a} for a, b in (expr.args, expr.args[::-1]) if a.is_Symbol), None)
            if solved is not None:
                out = {k: v.xreplace(solved) for k, v in out.items()} | solved
    return out, multiples


def _solved(zero: Any) -> dict[Any, Any] | None:
    """A symbol that stands alone with factor 1 or -1 in what is zero: n - 5 - 1 == 0 gives n = 6."""
    zero = zero.expand()
    for symbol in sorted(zero.free_symbols, key=lambda s: s.name):
        factor = zero.coeff(symbol)
        rest = zero - factor * symbol
        if factor in (1, -1) and not rest.has(symbol):
            return {symbol: -rest / factor}
    return None


def _range_of(shape_env: Any, symbol: Any, least: int) -> tuple[int, int]:
    """Inclusive; never below `least`: a size is not negative, a number argument may be."""
    found = shape_env.var_to_range.get(symbol)
    if found is None:
        return least, UNBOUNDED
    lo = int(found.lower) if found.lower.is_Integer else least
    hi = int(found.upper) if found.upper.is_Integer else UNBOUNDED
    return max(lo, least), min(hi, UNBOUNDED)
