"""Towards a server on a GPU: what capturing its full decode graphs asks of us, over the recording driver.

No kernel runs and no vLLM: the driver records, the test says which stream is current and whether it is being captured.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flagtree.artifact.bundle import write_bundle
from flagtree.errors import BindError, BundleError
from flagtree.runtime import gpu
from flagtree.serve import opened
from flagtree.serve.callee import Handle, ServedGraph
from flagtree.serve.configuration import ServeSettings
from flagtree.serve.counts import COUNTS
from flagtree.serve.opened import open_for_serving
from flagtree.serve.server import Server
from tests.runtime.stand_in import TARGETS, Recording, StandIn, compile_launcher, kinds_of, toy
from tests.runtime.test_gpu_load import Kernel

# two kernels with a temporary between them, as a layer has them
PROGRAM = """
program step
  symbol s0 in 1..64 from dim x 0
  buffer x: f32[s0, 8] input
  buffer w: f32[8] weight
  buffer t: f32[s0, 8] temp
  buffer y: f32[s0, 8] temp
  kernel one {i0 < s0, i1 < 8}
    v0: f32 = load x[i0, i1]
    v1: f32 = load w[i1]
    v2: f32 = mul v0, v1
    store t[i0, i1] = v2
  kernel two {i0 < s0, i1 < 8}
    v0: f32 = load t[i0, i1]
    v1: f32 = neg v0
    store y[i0, i1] = v1
  outputs y
"""
KEY = "5" * 64
SHARED = {"cuda:sm90": 100_000}  # more than a kernel gets there without asking; elsewhere nobody has to ask


class Bench:
    """A bundle with one graph, served on a stand-in device."""

    def __init__(self, target: str, folder: Path, launcher: Path, patch: pytest.MonkeyPatch) -> None:
        self.target = target
        made = toy(PROGRAM, {"one": ["n0", 1, 1], "two": ["n0", 1, 1]}, shared=SHARED.get(target, 32768))
        graph = {"key": KEY, "facts": {"device": "cpu"}, "versions": {}, "results": [["buffer", 0]]}
        self.path, self.functions = folder / "bundle", made.functions()
        self.digest = write_bundle(
            self.path, name="step", target=target, parts={"graph": made.launch}, versions={"torch": torch.__version__},
            kernels=[Kernel(digest, record) for digest, record in made.records.items()], coverage={"graph": {"graph": graph}},
        )  # fmt: skip
        self.recording = Recording(target, folder)
        for record in made.records.values():
            self.recording.describe(record["function"], kinds_of(record))
        self.device = StandIn(self.recording.driver, "compiled", launcher)
        patch.setattr(gpu, "find_device", lambda name, tensors=None: self.device)
        self.graph = ServedGraph(Handle(str(self.path), self.digest, KEY, takes=(0, 1)), open_for_serving(self.path, self.digest))
        self.weight = torch.ones(8)
        self.x = torch.ones(64, 8)

    def lines(self, *first: str) -> list[str]:
        return self.recording.lines(*first)

    def call(self, tokens: int, stream: int, captures: bool = False) -> tuple[torch.Tensor, list[str]]:
        """The result of one step on a stream and what the driver was asked meanwhile."""
        before = len(self.recording.lines())
        self.device.stream, self.device.captures = stream, captures
        with torch.inference_mode():
            (y,) = self.graph(self.x[:tokens], self.weight)
        return y, self.recording.lines()[before:]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_launcher(tmp_path_factory.mktemp("launcher"))


@pytest.fixture(params=TARGETS)
def bench(request: pytest.FixtureRequest, tmp_path: Path, launcher: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(request.param, tmp_path, launcher, monkeypatch)


def launches(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines if line.startswith("launch")]


def streams(lines: list[str]) -> list[str]:
    return [line[line.index("stream") + 1] for line in launches(lines)]


def test_everything_is_loaded_before_the_first_call(bench: Bench) -> None:
    """Modules and what a kernel has to ask for: at the profile run, at warm-up and in a capture nothing is loaded any more."""
    assert len(bench.lines("function")) == 4  # two variants of each kernel
    assert bench.lines("launch") == []
    assert len(bench.lines("set_attribute")) == (4 if bench.target in SHARED else 0)
    before = bench.lines("load", "function", "set_attribute")
    for tokens, stream, captures in ((64, 1, False), (1, 1, False), (1, 9, True), (8, 9, True), (3, 1, False)):
        assert len(launches(bench.call(tokens, stream, captures)[1])) == 2
    assert bench.lines("load", "function", "set_attribute") == before
    assert COUNTS.graphs_found == 1


def test_a_decode_graph_is_captured_for_each_batch_size(bench: Bench) -> None:
    """As a server captures: one warm-up run a size, then the capture on a stream of its own; later steps run elsewhere again."""
    bench.call(64, 1)
    captured = []
    for tokens in (8, 4, 2, 1):
        assert streams(bench.call(tokens, 1)[1]) == ["1", "1"]
        y, asked = bench.call(tokens, 9, captures=True)
        assert streams(asked) == ["9", "9"]
        assert {line.split()[0] for line in asked} <= {"launch", "set_current"}  # nothing that a capture forbids
        assert isinstance(y, torch.Tensor)
        assert y.shape == (tokens, 8)
        captured.append(y)
    assert len({y.data_ptr() for y in captured}) == 4  # what a graph replays into is nobody else's
    frames = bench.graph._session._frames  # type: ignore[union-attr]
    assert {key[-1] for key in frames} == {1}  # and none of a capture's memory is kept for a later call
    assert streams(bench.call(4, 1)[1]) == ["1", "1"]


def test_streams_are_asked_for_at_each_call(bench: Bench) -> None:
    for stream in (1, 5, 1, 7):
        assert streams(bench.call(4, stream)[1]) == [str(stream)] * 2


def test_memory_is_torchs(bench: Bench) -> None:
    """Temporaries and results come from torch's allocator, so that a server's accounting and its graphs' pool see them; the driver
    allocates nothing, and weights and inputs are read where they lie."""
    y, asked = bench.call(4, 1)
    one, two = launches(asked)
    assert f"ptr:{bench.weight.data_ptr():x}" in one
    assert f"ptr:{bench.x.data_ptr():x}" in one
    assert f"ptr:{y.data_ptr():x}" in two
    (frame,) = bench.graph._session._frames.values()  # type: ignore[union-attr]
    temporary = f"ptr:{frame.arena.data_ptr():x}"
    assert temporary in one
    assert temporary in two


def test_a_call_outside_of_the_promise_launches_nothing(bench: Bench) -> None:
    bench.x = torch.ones(65, 8)
    before = len(bench.lines("launch"))
    with pytest.raises(BindError, match="out of range"):
        bench.call(65, 1)
    assert len(bench.lines("launch")) == before


def test_a_saved_graph_of_a_second_start_is_loaded_as_well(bench: Bench) -> None:
    data = ServedGraph.serialize_compile_artifacts(bench.graph)
    opened._opened.clear()
    graph = ServedGraph.deserialize_compile_artifacts(data)
    before = bench.lines("load", "function")
    bench.graph = graph
    bench.call(2, 3, captures=False)
    assert bench.lines("load", "function") == before


def test_a_server_on_another_device_is_refused(bench: Bench) -> None:
    server = Server(ServeSettings(bundle=str(bench.path)), (("device", "xpu"),), bundle=str(bench.path), digest=bench.digest)
    with pytest.raises(BundleError, match="the server on xpu"):
        server.open()
