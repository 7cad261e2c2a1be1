"""vLLM's compile mode 3: a decoder split at attention, each piece from a bundle, found again by what vLLM keeps of it.

The split is torch's own, as vLLM uses it; the truth is the decoder itself.  The class over the real vLLM: test_doors_engine.py.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.passes.split_module import split_module

from flagtree.artifact.recording import read_recorded
from flagtree.errors import FlagtreeError
from flagtree.graphs import compile_graphs
from flagtree.serve import compiler
from flagtree.serve.callee import Eager, ServedGraph
from flagtree.serve.compiler import Pieces
from flagtree.serve.counts import COUNTS
from flagtree.settings import settings
from tests.serve.conftest import Current
from tests.serve.decoder import CACHES, Decoder, served, step

SPLIT_AT = ("toyserver.update", "toyserver.attend")


class Split:
    """vLLM's own part of mode 3: splits the graph, asks for each piece, keeps the handles as text, runs the whole."""

    def __init__(self, pieces: Pieces, kept: dict[int, tuple[str, str]] | None = None) -> None:
        self.pieces, self.kept, self.graphs = pieces, kept, list[Any]()
        self.handles: dict[int, Any] = {}

    def __call__(self, module: fx.GraphModule, inputs: list, **options: object) -> Callable[..., Any]:
        part, parts = 0, dict[fx.Node, int]()
        for node in module.graph.nodes:
            if node.op not in ("placeholder", "output"):
                at = str(node.target).removesuffix(".default") in SPLIT_AT
                part += at != (part % 2 == 1)
                parts[node] = part
        split = split_module(module, None, parts.__getitem__, keep_original_order=True)  # type: ignore[arg-type]
        for name, piece in split.named_children():
            number = int(name.rpartition("_")[2])
            if number % 2:
                continue
            fakes = [n.meta["example_value"] for n in piece.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
            sizes = SimpleNamespace(start=1, end=64)
            if self.kept is None:
                found, handle = self.pieces.compile(piece, fakes, {}, sizes, f"artifact_compile_range_1_64_subgraph_{number}")
                self.handles[number] = handle
            else:
                found = self.pieces.load(self.kept[number], piece, fakes, number, sizes)
            self.graphs.append(found)
            single = not isinstance(next(n for n in piece.graph.nodes if n.op == "output").args[0], (tuple, list))  # type: ignore[union-attr]
            setattr(split, name, _Piece(found, single))
        return split.forward


class _Piece(torch.nn.Module):
    def __init__(self, run: Callable[..., Any], single: bool) -> None:
        super().__init__()
        self.run, self.single = run, single

    def forward(self, *args: Any) -> Any:
        result = self.run(*args)
        return result[0] if self.single and isinstance(result, (tuple, list)) else result


def check(compiled: Any, model: Decoder) -> None:
    for tokens in (6, 1, 33):
        ids, positions = step(tokens, first=5)
        CACHES.clear()
        with torch.inference_mode():
            want = model(ids, positions)
            CACHES.clear()
            torch.testing.assert_close(compiled(ids, positions), want, rtol=1e-5, atol=1e-5)


def test_pieces_are_recorded_compiled_and_found_again(current: Current, tmp_path: Any) -> None:
    model, recorded = Decoder(layers=3), tmp_path / "graphs.jsonl"
    current({"record": str(recorded)}, mode=3)
    pieces = Pieces()
    current.none()  # type: ignore[attr-defined]  # nothing is current when the pieces come
    with settings.override(jobs=1):
        first = Split(pieces)
        check(served(model, first), model)
    assert len(first.graphs) == 4
    assert len(read_recorded(recorded)) == COUNTS.graphs_compiled == 3  # first, middle and last: equal layers are one piece
    report = compile_graphs(read_recorded(recorded), ["cpu"], out=tmp_path, jobs=1).bundles[0]

    config = current({"bundle": report.path, "digest": report.digest, "strict": "serve"}, mode=3)
    pieces = Pieces()
    assert COUNTS.doors == {compiler.DOOR: f"from {report.path}, strict 'serve'"}
    current.none()  # type: ignore[attr-defined]
    strict = Split(pieces)
    check(served(model, strict), model)
    assert all(isinstance(g, ServedGraph) for g in strict.graphs)
    # vLLM keeps each handle as Python text and looks at two strings of it
    kept = ast.literal_eval(repr(strict.handles))
    assert all(isinstance(text, str) for handle in kept.values() for text in handle)
    again = Split(pieces, kept)
    torch.compiler.set_stance("default")
    check(served(model, again), model)
    assert COUNTS.loaded_warm == 4
    # a bundle that is gone is asked again, and the named one answers
    gone = {k: (handle.replace(report.digest, "0" * 64), key) for k, (handle, key) in kept.items()}
    torch.compiler.set_stance("default")
    check(served(model, Split(pieces, gone)), model)
    assert COUNTS.loaded_warm == 4
    torch.compiler.set_stance("default")
    with pytest.raises(Exception, match=r"piece 0 for .*graph-.*capture key") as raised:
        served(model.to(torch.bfloat16), Split(pieces))
    assert "does not have" in str(raised.value)
    assert f"--target {report.target}" in str(raised.value)
    other = current({"bundle": report.path, "digest": report.digest, "strict": "start"}, mode=3)
    assert Pieces().compute_hash(config) != Pieces().compute_hash(other)


def test_a_piece_that_runs_call_by_call_is_not_kept(current: Current) -> None:
    class Complex(torch.nn.Module):
        def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.polar(ids.float(), positions.float()))

    current({}, mode=3)
    split = Split(Pieces())
    compiled = served(Complex(), split)
    assert isinstance(split.graphs[0], Eager)
    assert split.handles == {0: None}
    torch.testing.assert_close(compiled(*step(4)), Complex()(*step(4)))


@pytest.mark.parametrize(
    ("changes", "says"), [({"mode": 2}, "mode is not 3"), ({"custom_ops": ["all"]}, "operators are on"), ({"lora": 1}, "LoRA is on")]
)
def test_what_pieces_cannot_work_with_is_said_at_model_build(current: Current, changes: dict[str, Any], says: str) -> None:
    current({}, **{"mode": 3, **changes})
    with pytest.raises(FlagtreeError, match=says):
        Pieces()


def test_pieces_without_a_configuration(current: Current) -> None:
    with pytest.raises(FlagtreeError, match="where vLLM builds a model"):
        Pieces().compile(fx.GraphModule({}, fx.Graph()), [], {}, None, None)
    with pytest.raises(AttributeError):
        _ = compiler.anything


def test_another_contract_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class CompilerInterface:
        def compile(self, graph: Any, example_inputs: Any, compiler_config: Any, runtime_shape: Any, key: Any) -> None: ...

    module = ModuleType("vllm.compilation.compiler_interface")
    for name in ("vllm", "vllm.compilation"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    compiler._compiler.cache_clear()
    with pytest.raises(FlagtreeError, match="no compiler interface"):
        _ = compiler.Compiler
    module.CompilerInterface = CompilerInterface  # type: ignore[attr-defined]
    with pytest.raises(FlagtreeError, match="compile takes no compile_range"):
        _ = compiler.Compiler
    compiler._compiler.cache_clear()
