"""A server from its first graph to a strict start: recorded, compiled, found again, refused; the numbers are eager's at every size."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flagtree.artifact.recording import read_recorded
from flagtree.errors import BundleError, UntrustedBundle
from flagtree.graphs import compile_graphs
from flagtree.serve.callee import Eager, Handle, ServedGraph
from flagtree.serve.configuration import ServeSettings
from flagtree.serve.counts import COUNTS, line
from flagtree.serve.server import Server
from flagtree.settings import settings
from tests.serve.decoder import CACHES, Decoder, served, step

FACTS = (("model", "Decoder"), ("dtype", "float32"), ("tensor_parallel", "1"), ("max_tokens", "64"), ("vllm", "0.32.0"))


class Kept:
    """A backend that keeps what the server's compiler returned."""

    def __init__(self, server: Server) -> None:
        self.server, self.graphs = server, list[Any]()

    def __call__(self, module: torch.fx.GraphModule, inputs: list, **options: object) -> Any:
        self.graphs.append(self.server.graph(module, inputs))
        return self.graphs[-1]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a lenient first start writes: the graph of plain and, with the same key, of packed products."""
    path = tmp_path_factory.mktemp("recorded") / "graphs.jsonl"
    torch.manual_seed(0)
    model = Decoder(rank=0, handle=2)
    with settings.override(jobs=1):
        kept = Kept(Server(ServeSettings(record=str(path)), FACTS))
        check(served(model, kept), model)
    assert isinstance(kept.graphs[0], ServedGraph)
    return path


@pytest.fixture(scope="module")
def bundle(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    report = compile_graphs(read_recorded(recorded), ["cpu"], name="toy", out=tmp_path_factory.mktemp("bundles"), jobs=1)
    return report.bundles[0].path, report.bundles[0].digest


def check(compiled: Any, model: Decoder) -> None:
    for tokens in (6, 1, 9, 33):
        ids, positions = step(tokens, first=5)
        CACHES.clear()
        with torch.inference_mode():
            want = model(ids, positions)
            wrote = {name: [t.clone() for t in tensors] for name, tensors in CACHES.items()}
            CACHES.clear()
            have = compiled(ids, positions)
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
        assert wrote.keys() == CACHES.keys()
        for name, tensors in CACHES.items():
            torch.testing.assert_close(tensors, wrote[name], rtol=1e-5, atol=1e-5)


def strict(bundle: tuple[str, str], how: str = "start", facts: tuple = FACTS) -> Server:
    return Server(ServeSettings(bundle=bundle[0], strict=how), facts, bundle=bundle[0], digest=bundle[1])


@pytest.mark.parametrize(("packed", "rank", "handle"), [("", 0, 2), ("handle", 0, 3), ("tiles", 0, 3), ("handle", 1, 5)])
def test_one_bundle_serves_ranks_and_packed_weights(bundle: tuple[str, str], packed: str, rank: int, handle: int) -> None:
    model = Decoder(packed=packed, rank=rank, handle=handle)
    kept = Kept(strict(bundle))
    check(served(model, kept), model)
    assert (COUNTS.graphs_found, COUNTS.graphs_missing, COUNTS.graphs_compiled) == (1, 0, 0)
    assert COUNTS.externs["toyserver.attend.default"] == 2
    assert "aten.empty.memory_format" not in COUNTS.externs


def test_two_models_through_one_bundle_keep_their_weights(bundle: tuple[str, str]) -> None:
    first, second = Decoder(rank=0), Decoder(rank=0)
    compiled = served(first, Kept(strict(bundle))), served(second, Kept(strict(bundle)))
    check(compiled[1], second)
    with torch.no_grad():
        second.layers[0].before.weight.mul_(2)  # written in place, as a server loads new weights
    check(compiled[1], second)


def test_saved_bytes_name_the_bundle_and_hold_no_code(bundle: tuple[str, str]) -> None:
    model = Decoder(rank=1, handle=4)
    kept = Kept(strict(bundle))
    served(model, kept)
    data = ServedGraph.serialize_compile_artifacts(kept.graphs[0])
    assert data.startswith(b"{")
    assert bundle[1].encode() in data
    again = ServedGraph.deserialize_compile_artifacts(data)
    again.finalize_loading(None)
    assert again.handle == kept.graphs[0].handle
    assert COUNTS.loaded_warm == 1


INCOMPLETE = b'{"format":2,"bundle":"x","digest":"","key":"","stance":""}'


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format":1}', INCOMPLETE, b"\x80\x04K."])
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        Handle.decode(data)


def test_a_strict_start_refuses_and_says_what_differs(bundle: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="does not have") as raised:
        served(Decoder(layers=3, rank=0), Kept(strict(bundle)))
    text = str(raised.value)
    assert re.search(r"where: the whole graph, graph-(\w{16}), capture key \1\w{48}; .*toy", text)
    assert re.search(r"why: closest is graph-\w{16}, \d\d% of its lines equal; line \d+: the bundle has .*, the server ", text)
    assert '"record": "graphs.jsonl"' in text
    assert "flagtree compile --graphs graphs.jsonl --target cpu" in text
    assert "flagtree compile MODEL --for vllm" in text
    assert "flagtree: error: the server needs a graph" in capsys.readouterr().err
    assert COUNTS.graphs_missing == 1


def test_the_difference_names_the_line(bundle: tuple[str, str]) -> None:
    with pytest.raises(Exception, match="line ") as raised:
        served(Decoder(rank=0).to(torch.bfloat16), Kept(strict(bundle, facts=())))
    assert "bfloat16" in str(raised.value)


def test_a_start_without_a_bundle_builds_once(tmp_path: Path) -> None:
    model = Decoder(layers=1)
    lenient = Server(ServeSettings(), FACTS)
    with settings.override(jobs=1):
        check(served(model, Kept(lenient)), model)
        assert COUNTS.graphs_compiled == 1
        check(served(model, Kept(lenient)), model)
    assert (COUNTS.graphs_compiled, COUNTS.graphs_found) == (1, 2)


def test_a_recording_holds_what_an_earlier_start_built(tmp_path: Path) -> None:
    model, path = Decoder(layers=1), tmp_path / "graphs.jsonl"
    with settings.override(jobs=1):
        served(model, Kept(Server(ServeSettings(), FACTS)))
        COUNTS.graphs_compiled = 0
        for _ in range(2):
            served(model, Kept(Server(ServeSettings(record=str(path)), FACTS)))
    assert COUNTS.graphs_compiled == 0
    assert len(read_recorded(path)) == 1


def test_a_graph_that_no_program_carries_runs_as_it_is() -> None:
    class Complex(torch.nn.Module):
        def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.polar(ids.float(), positions.float()))

    kept = Kept(Server(ServeSettings(), FACTS))
    compiled = served(Complex(), kept)
    assert isinstance(kept.graphs[0], Eager)
    ids, positions = step(4)
    torch.testing.assert_close(compiled(ids, positions), Complex()(ids, positions))
    assert COUNTS.graphs_missing == 1


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("model", "Other", "another model"),
        ("dtype", "bfloat16", "element type"),
        ("tensor_parallel", "2", "degree"),
        ("vllm", "0.40.1", "release"),
    ],
)
def test_another_server_is_told_before_weights_are_loaded(bundle: tuple[str, str], name: str, value: str, what: str) -> None:
    facts = tuple((k, value if k == name else v) for k, v in FACTS)
    with pytest.raises(BundleError, match=what):
        strict(bundle, facts=facts).open()


def test_a_bundle_that_nobody_vouches_for_is_refused(bundle: tuple[str, str]) -> None:
    with pytest.raises(UntrustedBundle):
        Server(ServeSettings(bundle=bundle[0]), FACTS, bundle=bundle[0], digest="0" * 64).open()


def test_a_changed_bundle_is_not_loaded(bundle: tuple[str, str], tmp_path: Path) -> None:
    handle = Handle(str(tmp_path / "gone"), bundle[1], "0" * 64)
    with pytest.raises(BundleError):
        ServedGraph.deserialize_compile_artifacts(handle.encode())


def test_strict_serving_keeps_helpers_from_compiling(bundle: tuple[str, str]) -> None:
    model = Decoder(rank=0)
    served(model, Kept(strict(bundle, "serve")))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    helper = torch.compile(lambda x: x + 1, backend="eager")
    assert helper(torch.ones(2)).tolist() == [2.0, 2.0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_paranoid_serving_raises_where_a_helper_would_compile(bundle: tuple[str, str]) -> None:
    served(Decoder(rank=0), Kept(strict(bundle, "paranoid")))
    with pytest.raises(RuntimeError, match="recompile"):
        torch.compile(lambda x: x - 1, backend="eager")(torch.ones(2))


START = """
import sys
from tests.serve import watch
watch.install()
import torch
from flagtree.serve.callee import ServedGraph
from flagtree.serve.configuration import ServeSettings
from flagtree.serve.server import Server
from tests.serve.decoder import Decoder, served, step
path, digest = sys.argv[1:]
server, graphs = Server(ServeSettings(bundle=path, strict="start"), (("model", "Decoder"),), bundle=path, digest=digest), []
def backend(module, inputs, **options):
    graphs.append(server.graph(module, inputs))
    return graphs[0]
compiled = served(Decoder(rank=0), backend)
compiled(*step(9))
handle = ServedGraph.serialize_compile_artifacts(graphs[0])
ServedGraph.deserialize_compile_artifacts(handle).finalize_loading(None)
watch.check()
import sympy as asked_by_a_test  # and the hook sees what it is there for
exec(compile("import networkx", "x/flagtree/y.py", "exec"), {"__name__": "flagtree.serve.y"})
assert [line for line in watch.found() if "asks for networkx" in line] and not [line for line in watch.found() if "sympy" in line]
print("right")
"""


def test_a_start_with_a_whole_bundle_imports_no_compiler(bundle: tuple[str, str], repository: Path) -> None:
    """The first start, traced, looked up and run, and what the second one reads; no library that only a compiler needs is asked for."""
    run = subprocess.run([sys.executable, "-c", START, *bundle], cwd=repository, capture_output=True, text=True, check=False)
    assert run.stdout == "right\n", run.stderr


def damaged(bundle: tuple[str, str], folder: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy in which the first file that matches `name` is changed."""
    copy = folder / "damaged"
    shutil.copytree(bundle[0], copy)
    file = sorted(copy.glob(name))[0]
    file.write_bytes(change(file.read_bytes()))
    return copy


@pytest.mark.parametrize("name", ["lib/*.so", "launch/*.json", "graphs/*.txt"])
@pytest.mark.parametrize("how", ["truncated", "edited"])
def test_a_damaged_bundle_is_refused_when_it_is_opened(bundle: tuple[str, str], tmp_path: Path, name: str, how: str) -> None:
    """Before any code is mapped, so before weights are loaded."""
    change = {"truncated": lambda raw: raw[: len(raw) // 2], "edited": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])}[how]
    path = damaged(bundle, tmp_path, name, change)
    with pytest.raises(BundleError, match="damaged or was edited"):
        Server(ServeSettings(bundle=str(path)), FACTS, bundle=str(path), digest=bundle[1]).open()


def test_saved_bytes_and_a_bundle_that_changed(bundle: tuple[str, str], recorded: Path, tmp_path: Path) -> None:
    """vLLM then traces again and asks for the compiler's name, which says what differs (test_agreement.py)."""
    copy = tmp_path / "b"
    shutil.copytree(bundle[0], copy)
    handle = replace(served_handle(bundle), bundle=str(copy))
    ServedGraph.deserialize_compile_artifacts(handle.encode())
    manifest = copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"name":"toy"', b'"name":"joy"'))
    with pytest.raises(UntrustedBundle, match="not the one"):
        ServedGraph.deserialize_compile_artifacts(handle.encode())


def served_handle(bundle: tuple[str, str]) -> Handle:
    kept = Kept(strict(bundle))
    served(Decoder(rank=0), kept)
    return kept.graphs[0].handle


def test_compilations_after_the_start_are_counted(bundle: tuple[str, str]) -> None:
    compiled = served(Decoder(rank=0), Kept(strict(bundle)))
    compiled(*step(9))
    assert COUNTS.compilations == 0  # the graph's own trace was before
    torch.compile(lambda x: x + 2, backend="eager")(torch.ones(2))
    assert COUNTS.compilations == 1
    assert "1 since the start" in line()
