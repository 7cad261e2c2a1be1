"""Depth costs nothing after capture: equal layers are taken out of a server's graph and put back as one repeat, with the same numbers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import fx

from flagtree.artifact.bundle import open_bundle
from flagtree.artifact.recording import RecordedGraph, read_recorded
from flagtree.capture.periods import find_periods
from flagtree.capture.recorded import record_served
from flagtree.errors import BundleError
from flagtree.graphs import compile_graphs
from flagtree.ir.parse import parse_program
from flagtree.serve.callee import ServedGraph
from flagtree.serve.configuration import ServeSettings
from flagtree.serve.graph import key_of, served_graph
from flagtree.serve.server import Server
from flagtree.settings import settings
from tests.serve.decoder import Decoder, graph_of, served
from tests.serve.test_server import FACTS, Kept, check


@functools.cache
def recording(layers: int) -> RecordedGraph:
    found = served_graph(graph_of(Decoder(layers=layers, rank=0)))
    inputs = [torch.nn.Parameter(torch.ones(1))] * 1000
    return record_served(found, key_of(found), inputs, most=64)


def test_few_layers_stay_as_they_are() -> None:
    assert recording(5).layers == []


def test_the_recorded_program_is_the_same_at_any_depth() -> None:
    six, nine = recording(6), recording(9)
    assert (len(six.layers), len(nine.layers)) == (3, 6)
    assert len(parse_program(six.program).steps) == len(parse_program(nine.program).steps)
    assert len({name for layer in nine.layers for name in layer}) == sum(map(len, nine.layers))
    assert set(nine.arguments).issuperset(name for layer in nine.layers for name in layer)
    assert six.key != nine.key


def chain(how: str) -> fx.GraphModule:
    """Seven layers of which one may differ: in what it computes, in the weight that it takes, in its size, or in where an operand is
    made."""
    graph, width = fx.Graph(), 8
    first = x = graph.placeholder("x")
    weights = [graph.placeholder(f"w{i}") for i in range(7)]
    for i, node in enumerate([x, *weights]):
        node.meta["example_value"] = torch.empty(width, 9 if how == "size" and i == 4 else width)
    for i in range(7):
        y = graph.call_function(torch.matmul, (x, weights[2] if how == "weight" and i == 4 else weights[i]))
        y = graph.call_function(torch.sin if how == "operator" and i == 3 else torch.cos, (y,))
        x = graph.call_function(torch.add, (y, first if how == "operand" and i == 3 else x))
    graph.output((x,))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(("how", "found"), [("none", 4), ("operator", 0), ("operand", 0), ("weight", 0), ("size", 0)])
def test_a_layer_that_differs_is_not_taken_out(how: str, found: int) -> None:
    module = chain(how)
    before = str(module.graph)
    periods = find_periods(module, [n.name for n in module.graph.nodes if n.op == "placeholder"])
    assert (0 if periods is None else len(periods.layers)) == found
    assert str(module.graph) == before
    if periods is not None:
        assert periods.layers == (("w2",), ("w3",), ("w4",), ("w5",))
        periods.module.graph.lint()
        assert [n.name for n in periods.module.graph.nodes if n.op == "placeholder"] == ["x", "w0", "w1", "w2", "w3", "w6"]


def test_a_deep_decoder_is_one_repeat_and_equals_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(layers=7, rank=1, handle=3, packed="handle")
    path = tmp_path / "graphs.jsonl"
    with settings.override(jobs=1):
        kept = Kept(Server(ServeSettings(record=str(path)), FACTS))
        check(served(model, kept), model)
        (graph,) = read_recorded(path)
        bundle = compile_graphs([graph], ["cpu"], name="deep", out=tmp_path, jobs=1).bundles[0]
    assert isinstance(kept.graphs[0], ServedGraph)
    (part,) = bundle.parts
    assert part.bytes_before_per_layer > part.bytes_after_per_layer > 0
    launch = open_bundle(Path(bundle.path)).part(part.name)
    assert [step["repeat"] for step in launch["steps"] if "repeat" in step] == [4]
    strict = Server(ServeSettings(bundle=bundle.path, strict="start"), FACTS, bundle=bundle.path, digest=bundle.digest)
    other = Decoder(layers=7, rank=0, handle=5, packed="tiles")
    check(served(other, Kept(strict)), other)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"arguments": []},
        {"layers": [["a"], ["b"], ["c"]]},
        {"arguments": ["a", "b"]},
    ],
)
def test_layers_that_are_not_the_programs_are_refused(change: dict, tmp_path: Path) -> None:
    graph = recording(6).model_copy(update=change)
    with pytest.raises(BundleError, match="no valid program"):
        compile_graphs([graph], ["cpu"], out=tmp_path, jobs=1)
