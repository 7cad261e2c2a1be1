"""A formula in torch as a recording: traced on fake tensors with a free number of rows.

What `capture/recorded.py` does for a graph, for one operator that a server calls by itself.  Called on a miss only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from flagtree.artifact.files import sha256
from flagtree.artifact.recording import RecordedGraph
from flagtree.capture.recorded import free_size, record
from flagtree.runtime.capture_key import CaptureKey

ROWS_HINT = 6  # any number that no width has: the trace must not take the rows for something else


def record_formula(
    formula: Callable[..., Any],
    text: str,
    rows: Sequence[torch.Tensor],
    dense: Sequence[bool],
    fixed: Sequence[torch.Tensor | None],
    numbers: tuple,
    *,
    most: int,
    versions: Mapping[str, str],
    facts: Mapping[str, str],
) -> RecordedGraph:
    """The recording of `formula(*rows, *fixed, *numbers)`.  The graph takes the tensors; the number of rows is free, and so is the
    distance of the rows of each of `rows` that is not `dense`.  `text` is its canonical text."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    count = free_size(env, "rows", ROWS_HINT)
    graph = fx.Graph()
    arguments: list[Any] = []

    def placeholder(name: str, value: Any) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    with mode:
        for k, x in enumerate(rows):
            inner = torch.empty(x.shape[1:]).stride()
            stride = math.prod(x.shape[1:]) if dense[k] else free_size(env, f"stride_{k}", x.stride(0))
            value = torch.empty_strided((count, *x.shape[1:]), (stride, *inner), dtype=x.dtype, device=x.device)
            arguments.append(placeholder(f"x{k}", value))
        for k, w in enumerate(fixed):
            arguments.append(None if w is None else placeholder(f"w{k}", torch.empty(w.shape, dtype=w.dtype, device=w.device)))
    graph.output(graph.call_function(formula, (*arguments, *numbers)))
    key = CaptureKey(sha256(text.encode()), text, {}, {})
    return record(fx.GraphModule({}, graph), key, most=most, versions=versions, facts=facts)
