"""A stored launch list made to fit one rank: packed weights, and the marks of handles and group names, are put back.

The inverse of what `serve/graph.py` took out of the graph.  A launch list of a bundle is left as it is; a new one is returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flagtree.errors import BundleError

_LINEAR = "aten.linear.default"
_PACKED_LINEAR = "_C.onednn_mm.default"


def fitted(launch: Mapping[str, Any], packed: Sequence[str], marks: Mapping[int | str, int | str]) -> dict[str, Any]:
    """`launch` for a rank.  `packed`: weights that arrive as handles of packed ones; `marks`: what stands for what.

    BundleError when a packed weight is used by anything but a linear layer.
    """
    names = frozenset(packed)
    steps = [_step(step, names, marks) for step in launch["steps"]]
    left = {name for step in _calls(steps) for name in _buffers([step["args"], step["kwargs"]]) if step["extern"] != _PACKED_LINEAR}
    left |= {name for step in _kernels(steps) for name in step["buffers"]}
    if wrong := sorted(names & left):
        raise BundleError(f"'{wrong[0]}' arrives packed, and the bundle reads it", hint="compile the graph again")
    buffers = [{**b, "dtype": "i64", "shape": [], "strides": None} if b["name"] in names else b for b in launch["buffers"]]
    return {**launch, "buffers": buffers, "steps": steps}


def distinct_kernels(launch: Mapping[str, Any]) -> int:
    """How many generated kernels it launches, each counted once."""
    return len({step["kernel"] for step in _kernels(launch["steps"])})


def _step(step: Mapping[str, Any], packed: frozenset[str], marks: Mapping[int | str, int | str]) -> dict[str, Any]:
    if "repeat" in step:
        return {**step, "steps": [_step(s, packed, marks) for s in step["steps"]]}
    if "kernel" in step:
        above = step.get("above")
        if above is not None and packed.intersection(step["buffers"]):
            return _step(above["extern"], packed, marks)  # our product reads the plain weight; the library's takes any number of rows
        return dict(step)
    if step["extern"] == _LINEAR and _buffer(step["args"][1]) in packed:
        x, weight, *bias = step["args"]
        out = step["outputs"][0]
        args = [{"buffer": out}, x, bias[0] if bias else step["kwargs"].get("bias"), weight]
        return {**step, "extern": _PACKED_LINEAR, "args": args, "kwargs": {}, "outputs": [], "mutates": [out]}
    if marks:
        args = [_actual(a, marks) for a in step["args"]]
        return {**step, "args": args, "kwargs": {k: _actual(v, marks) for k, v in step["kwargs"].items()}}
    return dict(step)


def _actual(operand: Any, marks: Mapping[int | str, int | str]) -> Any:
    return marks.get(operand, operand) if isinstance(operand, (int, str)) and not isinstance(operand, bool) else operand


def _buffer(operand: Any) -> str | None:
    return operand.get("buffer") if isinstance(operand, dict) else None


def _calls(steps: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for step in steps:
        if "repeat" in step:
            yield from _calls(step["steps"])
        elif "extern" in step:
            yield step


def _kernels(steps: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for step in steps:
        if "repeat" in step:
            yield from _kernels(step["steps"])
        elif "kernel" in step:
            yield step


def _buffers(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and isinstance(value.get("buffer"), str):
        yield value["buffer"]
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _buffers(inner)
