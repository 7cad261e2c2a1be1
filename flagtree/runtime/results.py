"""What a compiled graph hands back, from the buffers of its launch list: tensors, sizes and plain values in the graph's own order."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

_OPERATIONS = {"+": operator.add, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}


def size(expression: Any, sizes: Mapping[str, Any]) -> Any:
    """An index expression as JSON over named sizes, which may be symbolic."""
    if isinstance(expression, str):
        return sizes[expression]
    if isinstance(expression, int):
        return expression
    op, *operands = expression
    values = [size(x, sizes) for x in operands]
    total = values[0]
    for value in values[1:]:
        total = _OPERATIONS[op](total, value)
    return total


class Results:
    """`results`: ["buffer", position in the outputs], ["index", expression] or ["value", a plain value] each; `symbols`: of the launch
    list, read from a call's arguments, which are called `names`."""

    def __init__(self, results: Sequence[Sequence[Any]], symbols: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
        self._results = results
        self._buffers = [k for kind, k in results if kind == "buffer"]
        self._only_buffers = len(self._buffers) == len(results)
        self.in_order = self._only_buffers and self._buffers == list(range(len(results)))
        place = {name: k for k, name in enumerate(names)}
        self._sources = {s["name"]: (place[s["source"][1]], s["source"]) for s in symbols if s["source"][1] in place}

    def __call__(self, outputs: tuple, args: Sequence[Any]) -> tuple:
        """The graph's results from the launch list's `outputs` and the call's `args`."""
        if self.in_order and len(outputs) == len(self._buffers):
            return outputs
        if self._only_buffers:
            return tuple([outputs[k] for k in self._buffers])
        values = {name: _read(source, args[k]) for name, (k, source) in self._sources.items()}
        pick = {"buffer": lambda k: outputs[k], "index": lambda e: size(e, values), "value": lambda v: v}
        return tuple(pick[kind](what) for kind, what in self._results)


def _read(source: Sequence[Any], value: Any) -> int:
    if source[0] == "scalar":
        return int(value)
    return value.shape[source[2]] if source[0] == "dim" else value.stride(source[2])
