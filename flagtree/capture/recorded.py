"""A server's graph as a recording: normalised, lowered and written down, for a compile here or elsewhere.

The server has dropped the guards of its trace, so sizes start at one and end at what the recording promises.  Called on a miss only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from flagtree.artifact.recording import RecordedGraph
from flagtree.capture.dynamo import fake_mode_of, placeholder_names, result_of
from flagtree.capture.normalise import normalise
from flagtree.errors import CaptureError
from flagtree.ir.program import Program, Symbol
from flagtree.ir.text import print_program
from flagtree.lower.decompositions import DECOMPOSITIONS
from flagtree.lower.lowering import lower, lowers
from flagtree.runtime.capture_key import CaptureKey, example_value

LEAST_PROMISE = 8192  # sizes that every recording covers: the widest step of usual servers


def record(
    module: fx.GraphModule,
    key: CaptureKey,
    *,
    most: int,
    is_weight: Callable[[int], bool] = lambda position: False,
    versions: Mapping[str, str] | None = None,
    facts: Mapping[str, str] | None = None,
) -> RecordedGraph:
    """The recording of `module`, whose key is `key`.

    `most`: the largest size that the server will bring; `is_weight` tells which arguments stay the same from call to call.  Raises
    CaptureError when no program carries the graph, or it holds tensors of its own.
    """
    names = placeholder_names(module)
    values = [example_value(n) for n in module.graph.nodes if n.op == "placeholder"]
    normal = normalise(module, names, values, lowers, DECOMPOSITIONS, fake_mode_of(values))
    if normal.constants:
        shapes = ", ".join(str(tuple(t.shape)) for t in normal.constants.values())
        raise CaptureError("the graph holds tensors of its own, and a recording carries none", why=f"shapes {shapes}")
    roles = {name: "weight" for k, name in enumerate(names) if isinstance(values[k], torch.Tensor) and is_weight(k)}
    lowered = lower(normal.graph, f"graph_{key.digest[:16]}", roles)
    program = _unguarded(lowered.program, max(most, LEAST_PROMISE))
    return RecordedGraph(
        key=key.digest,
        text=key.text,
        program=print_program(program),
        results=[tuple(result_of(r, program)) for r in lowered.results],
        versions=dict(versions or {}),
        facts=dict(facts or {}),
    )


def _unguarded(program: Program, most: int) -> Program:
    """Sizes from 1: the trace saw at least 2, since it takes 0 and 1 apart, and the server calls it with 1 all the same."""
    return program.with_(symbols=tuple(_promise(s, most) for s in program.symbols))


def _promise(symbol: Symbol, most: int) -> Symbol:
    if symbol.lo < 0:
        return symbol  # a rank's own number
    return replace(symbol, lo=min(symbol.lo, 1), hi=symbol.hi if symbol.source[0] == "stride" else min(symbol.hi, most))


def weights_among(example_inputs: Sequence[object], names: Sequence[str]) -> Callable[[int], bool]:
    """Parameters and buffers of the model: the tensors that a server passes anew in each call without changing them."""
    return lambda k: isinstance(example_inputs[k], torch.nn.Parameter) or "_buffers_" in names[k]
