"""A stored launch list made to fit one rank: packed weights, and the marks of handles and group names, are put back.

The inverse of what `serve/graph.py` took out of the graph.  A launch list of a bundle is left as it is; a new one is returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flagtree.errors import BundleError
from flagtree.serve.graph import ONEDNN, TILED, Packed

_LINEAR = "aten.linear.default"
_PACKED_LINEARS = (f"{ONEDNN}.default", f"{TILED}.default")


def fitted(launch: Mapping[str, Any], packed: Mapping[str, Packed], marks: Mapping[int | str, int | str]) -> dict[str, Any]:
    """`launch` for a rank.  `packed`: weights and biases that arrive in another form; `marks`: what stands for what.

    BundleError when a packed weight is used by anything but a linear layer.
    """
    names = {**packed, **_formals(launch["steps"], packed)}
    steps = [_step(step, names, marks) for step in launch["steps"]]
    left = {name for step in _calls(steps) for name in _buffers([step["args"], step["kwargs"]]) if step["extern"] not in _PACKED_LINEARS}
    left |= {name for step in _kernels(steps) for name in step["buffers"]}
    if wrong := sorted(left.intersection(names)):
        raise BundleError(f"'{wrong[0]}' arrives packed, and the bundle reads it", hint="compile the graph again")
    buffers = [_arriving(b, names[b["name"]]) if b["name"] in names else b for b in launch["buffers"]]
    return {**launch, "buffers": buffers, "steps": steps}


def _formals(steps: Sequence[Mapping[str, Any]], packed: Mapping[str, Packed]) -> dict[str, Packed]:
    """What repeats call packed weights.  BundleError where only some layers have it packed, or in different ways."""
    found = {}
    for step in steps:
        for formal, actual in step.get("bindings", {}).items():
            forms = {packed[n].form if n in packed else None for n in actual}
            if forms != {None}:
                if len(forms) > 1:
                    what = f"'{actual[0]}' arrives packed in some layers only, and one step serves all"
                    raise BundleError(what, hint="compile the graph again")
                found[formal] = packed[actual[0]]
    return found


def distinct_kernels(launch: Mapping[str, Any]) -> int:
    """How many generated kernels it launches, each counted once."""
    return len({step["kernel"] for step in _kernels(launch["steps"])})


def _arriving(buffer: Mapping[str, Any], packed: Packed) -> dict[str, Any]:
    return {**buffer, "dtype": packed.dtype, "shape": list(packed.shape), "strides": None}


def _step(step: Mapping[str, Any], packed: Mapping[str, Packed], marks: Mapping[int | str, int | str]) -> dict[str, Any]:
    if "repeat" in step:
        return {**step, "steps": [_step(s, packed, marks) for s in step["steps"]]}
    if "kernel" in step:
        above = step.get("above")
        if above is not None and not packed.keys().isdisjoint(step["buffers"]):
            return _step(above["extern"], packed, marks)  # our product reads the plain weight; the library's takes any number of rows
        return dict(step)
    if step["extern"] == _LINEAR and (form := packed.get(_buffer(step["args"][1]) or "")) is not None:
        x, weight, *rest = step["args"]
        out, bias = step["outputs"][0], rest[0] if rest else step["kwargs"].get("bias")
        args = [{"buffer": out}, x, bias, weight] if form.callee == ONEDNN else [{"buffer": out}, x, weight, bias, True]
        return {**step, "extern": f"{form.callee}.default", "args": args, "kwargs": {}, "outputs": [], "mutates": [out]}
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
