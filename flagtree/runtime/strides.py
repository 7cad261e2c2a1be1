"""Arguments in the strides and element types that a graph was compiled for: for graphs whose arguments other code makes.

Dynamo guards the strides of what a user passes.  What a backward graph takes was made by the forward graph, and what follows a call that
runs as it is was made by torch: there both are what tracing believed, and an operator's real result may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flagtree.runtime.index import same_strides
from flagtree.runtime.launch import Executable
from flagtree.runtime.prepare import Layout, read_symbol


class Restride:
    """Copies arguments that lie otherwise than declared.  None for a call whose written argument does."""

    def __init__(self, executable: Executable) -> None:
        prepared = executable.prepared
        position = {b.name: i for i, b in enumerate(executable.inputs)}
        self.symbols = [(s, position.get(s.buffer)) for s in prepared.symbols]
        self.tensors: list[tuple[int, Layout, tuple[int, ...] | None, bool]] = []
        for i, b in enumerate(executable.inputs):
            if b.role in ("scalar", "opaque"):
                continue
            layout = prepared.layouts[b.name]
            known = all(isinstance(e, int) for e in (*layout.shape, *(layout.strides or ())))
            self.tensors.append((i, layout, layout.at([])[1] if known else None, b.role == "state"))

    def __call__(self, args: Sequence[Any]) -> Sequence[Any] | None:
        values: list[int] | None = None
        out: list[Any] | None = None
        for i, layout, known, written in self.tensors:
            value = args[i]
            if known is None and values is None:
                values = [1 if at is None else read_symbol(s, args[at]) for s, at in self.symbols]
            want = known or layout.at(values or [])[1]
            same = value.stride() == want or same_strides(value.shape, value.stride(), want)
            if same and value.dtype is layout.dtype:
                continue
            if written:
                return None
            out = list(args) if out is None else out
            out[i] = torch.empty_strided(value.shape, want, dtype=layout.dtype, device=value.device).copy_(value)
        return args if out is None else out
