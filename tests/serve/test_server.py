"""A server from its first graph to a strict start: recorded, compiled, found again, refused; the numbers are eager's at every size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flagtree.artifact.recording import read_recorded
from flagtree.errors import BundleError, UntrustedBundle
from flagtree.graphs import compile_graphs
from flagtree.serve.callee import Eager, Handle, ServedGraph
from flagtree.serve.configuration import ServeSettings
from flagtree.serve.counts import COUNTS, Counts
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


@pytest.fixture(autouse=True)
def _fresh_counts() -> Iterator[None]:
    vars(COUNTS).update(vars(Counts()))
    yield
    torch.compiler.set_stance("default")


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


@pytest.mark.parametrize(("packed", "rank", "handle"), [(False, 0, 2), (True, 0, 3), (True, 1, 5)])
def test_one_bundle_serves_ranks_and_packed_weights(bundle: tuple[str, str], packed: bool, rank: int, handle: int) -> None:
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


INCOMPLETE = b'{"format":1,"bundle":"x","digest":"","key":"","stance":""}'


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format":2}', INCOMPLETE, b"\x80\x04K."])
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        Handle.decode(data)


def test_a_strict_start_refuses_and_says_what_differs(bundle: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="does not have") as raised:
        served(Decoder(layers=3, rank=0), Kept(strict(bundle)))
    text = str(raised.value)
    assert "graph-" in text
    assert "% of its lines equal" in text
    assert "flagtree compile --graphs" in text
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


WARM = """
import sys
import torch
from flagtree.serve.callee import ServedGraph
from tests.serve.decoder import Decoder, served
data = open(sys.argv[1], "rb").read()
graph = ServedGraph.deserialize_compile_artifacts(data)
compiler = ("capture", "ir", "lower", "passes", "codegen", "toolchain")
bad = [m for m in sys.modules if m.startswith("flagtree.") and m.split(".")[1] in compiler]
assert not bad, bad
print("right")
"""


def test_a_second_process_imports_no_compiler(bundle: tuple[str, str], tmp_path: Path, repository: Path) -> None:
    kept = Kept(strict(bundle))
    served(Decoder(rank=0), kept)
    path = tmp_path / "saved"
    path.write_bytes(ServedGraph.serialize_compile_artifacts(kept.graphs[0]))
    run = subprocess.run([sys.executable, "-c", WARM, str(path)], cwd=repository, capture_output=True, text=True, check=False)
    assert run.stdout == "right\n", run.stderr
