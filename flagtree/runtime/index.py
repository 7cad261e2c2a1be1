"""Index expressions of a launch list as closures: JSON in, an integer or a function of the symbols' values out.

No text is evaluated; an expression that is not of the known form is refused.  Used by everything in the runtime that
needs a size, a stride or an offset.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Union

from flagtree.errors import BundleError

Values = Sequence[int]  # the symbols' values, in the order of the launch list
Expression = Union[int, Callable[[Values], int]]

_MAX_DEPTH = 32
_OPERATORS = {"+": operator.add, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}


def compile_index(json: object, places: Mapping[str, int], depth: int = 0) -> Expression:
    """An int where no symbol occurs, else a function of the values; `places` gives each symbol's position in them.
    BundleError for an unknown form or symbol."""
    if isinstance(json, int) and not isinstance(json, bool):
        return json
    if isinstance(json, str):
        if json not in places:
            raise BundleError(f"an index names an unknown symbol '{json[:80]}'", why=f"symbols: {', '.join(places) or 'none'}")
        return operator.itemgetter(places[json])
    if not isinstance(json, list) or len(json) < 3 or json[0] not in _OPERATORS or depth > _MAX_DEPTH:
        raise BundleError("an index expression is not of the known form", where=repr(json)[:200])
    apply = _OPERATORS[json[0]]
    if json[0] in ("//", "%") and len(json) != 3:
        raise BundleError("a division takes two operands", where=repr(json)[:200])
    result = compile_index(json[1], places, depth + 1)
    for item in json[2:]:
        result = _combine(apply, result, compile_index(item, places, depth + 1))
    return result


def _combine(apply: Callable[[int, int], int], a: Expression, b: Expression) -> Expression:
    if isinstance(a, int):
        if isinstance(b, int):
            try:
                return apply(a, b)
            except ZeroDivisionError:
                raise BundleError("an index expression divides by zero") from None
        return lambda v: apply(a, b(v))
    if isinstance(b, int):
        return lambda v: apply(a(v), b)
    return lambda v: apply(a(v), b(v))


def evaluate(expression: Expression, values: Values) -> int:
    """The integer for the symbols' values."""
    return expression if isinstance(expression, int) else expression(values)


def symbols_of(json: object) -> set[str]:
    """The names in an expression, or in a list of them."""
    if isinstance(json, str):
        return set() if json in _OPERATORS else {json}
    return set().union(*map(symbols_of, json)) if isinstance(json, (list, tuple)) else set()


def row_major(shape: Iterable[int]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor: products of the sizes to the right."""
    strides, step = [], 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def same_strides(sizes: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Do two strides reach the same elements?  Those of dimensions of size 1, and of empty tensors, do not matter."""
    return 0 in sizes or all(n == 1 or a == b for n, a, b in zip(sizes, one, other))
