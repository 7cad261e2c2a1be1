"""What torch.compile makes of a function for CUDA tensors, on a machine without a GPU: fake tensors over a recording driver."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flagtree.capture import dynamo
from flagtree.capture.dynamo import CompiledGraph
from flagtree.runtime import compile as entry
from flagtree.runtime import gpu
from flagtree.settings import settings
from tests.runtime.stand_in import Recording, StandIn, allow_fake_cuda


@dataclass(frozen=True)
class Captured:
    """A graph of torch.compile for fake CUDA tensors, what the recording driver saw while it was bound, and which of the tensors it takes,
    in its order (-1: none of them).  `graph` is None where it came from the store."""

    graph: CompiledGraph | None
    launch: dict
    loads: list[str]
    takes: list[int]


H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)


def capture(
    function: Callable[..., Any], tensors: Sequence[torch.Tensor], folder: Path, *, properties: object = H100, stay: Collection[int] = ()
) -> list[Captured]:
    """Through Dynamo, our backend and Triton, as a program with CUDA tensors goes; only the call of the result is left out, as fake
    tensors have no address.  The recording driver stands for the device to which the cubins are bound; the store is in `folder`.
    `properties`: what torch would tell of the device; `stay`: tensors that are left on the CPU."""
    allow_fake_cuda()
    graphs: list[Captured] = []
    compiled: list[CompiledGraph] = []
    recording = Recording("cuda:sm90", folder)
    real = dynamo.compile_graph

    def keep(*args: Any) -> CompiledGraph:
        compiled.append(real(*args))
        return compiled[-1]

    class NotCalled(entry.Callee):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            graph = next((c for c in compiled if c.launch is self.launch), None)
            self.captured = Captured(graph, self.launch, recording.lines("load"), [])
            graphs.append(self.captured)

        def __call__(self, *args: Any) -> tuple:
            self.captured.takes.extend(next((i for i, fake in enumerate(fakes) if fake is a), -1) for a in args)
            return self.eager(*args)

    fakes: list[torch.Tensor] = []
    stand_in = StandIn(recording.driver, "interpreted", folder)
    with pytest.MonkeyPatch.context() as patch, settings.override(cache_dir=folder / "store"):
        patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        patch.setattr(gpu, "find_device", lambda target, tensors: stand_in)
        patch.setattr(dynamo, "compile_graph", keep)
        patch.setattr(entry, "Callee", NotCalled)
        torch._dynamo.reset()
        with FakeTensorMode(), torch.no_grad():
            fakes += [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu" if i in stay else "cuda")
                      for i, t in enumerate(tensors)]  # fmt: skip
            torch.compile(function, backend=entry.backend, dynamic=False)(*fakes)
        torch._dynamo.reset()
    return graphs
