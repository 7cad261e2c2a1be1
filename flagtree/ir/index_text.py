"""Index expressions from text and from sympy; the way out is `str(index)` and `index.to_sympy()`.

The grammar is this file's own, never Python's: + - * // % ( ) integers names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from flagtree.errors import IRError
from flagtree.ir.expression import Index, floordiv, remainder

if TYPE_CHECKING:
    import sympy

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.]*)|(//|[-+*%()]))")


def parse_index(text: str) -> Index:
    """Inverse of `str(Index)`.  Raises IRError with what stands in the way."""
    reader = _Reader(text)
    value = reader.total()
    if reader.tokens[reader.cursor]:
        raise reader.error(f"unexpected '{reader.tokens[reader.cursor]}'")
    return value


class _Reader:
    """Recursive descent over the tokens of one expression; an empty token ends them."""

    def __init__(self, text: str) -> None:
        self.text, self.cursor = text, 0
        self.tokens: list[str] = []
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if not match:
                raise IRError(f"cannot read the index '{text}'", where=f"column {position + 1}")
            self.tokens.append(match.group().strip())
            position = match.end()
        self.tokens.append("")

    def error(self, why: str) -> IRError:
        return IRError(f"cannot read the index '{self.text}'", why=why)

    def take(self) -> str:
        self.cursor += 1
        return self.tokens[self.cursor - 1]

    def total(self) -> Index:
        value = self.product()
        while self.tokens[self.cursor] in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Index:
        value = self.factor()
        while self.tokens[self.cursor] in ("*", "//", "%"):
            op, right = self.take(), self.factor()
            if op != "*" and right.constant is not None and right.constant <= 0:
                raise self.error("a divisor is zero or negative")
            value = value * right if op == "*" else floordiv(value, right) if op == "//" else remainder(value, right)
        return value

    def factor(self) -> Index:
        token = self.take()
        if token == "(":
            value = self.total()
            if self.take() != ")":
                raise self.error("a parenthesis is not closed")
            return value
        if token == "-":
            return -self.factor()
        if not token or not (token[0].isalnum() or token[0] == "_"):
            raise self.error(f"unexpected '{token or 'end'}'")
        return Index.of(int(token) if token.isdigit() else token)


def from_sympy(expr: sympy.Expr, rename: Callable[[str], str] = lambda n: n) -> Index | None:
    """An Index for a sympy integer expression (torch's shape expressions included); None for a form we do not carry."""
    import sympy

    if isinstance(expr, (int, sympy.Integer)):
        return Index.of(int(expr))
    if isinstance(expr, sympy.Symbol):
        return Index.of(rename(expr.name))
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        parts = [p for a in expr.args if (p := from_sympy(a, rename)) is not None]
        if len(parts) != len(expr.args):
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
