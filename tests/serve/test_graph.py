"""The key of a server's graph: packed products, ranks, layer names and handles do not enter it, and everything that computes does."""

from __future__ import annotations

import pytest
import torch

from flagtree.runtime.capture_key import CaptureKey, capture_key
from flagtree.serve.graph import MARK, served_graph
from tests.serve.decoder import VOCABULARY, Decoder, graph_of


def key_of(model: torch.nn.Module) -> CaptureKey:
    return capture_key(served_graph(graph_of(model)).module, {}, inference=True)


@pytest.mark.parametrize(("packed", "dtype", "shape"), [("handle", "i64", ()), ("tiles", "f64", (64, 64))])
def test_packed_products_have_the_key_of_plain_ones(packed: str, dtype: str, shape: tuple[int, ...]) -> None:
    served = served_graph(graph_of(Decoder(packed=packed)))
    assert len(served.packed) == (10 if packed == "tiles" else 8)  # the bias of each layer is of another type beside tiles
    assert {p.dtype for p in served.packed} == {dtype}
    assert shape in {p.shape for p in served.packed}
    assert not {"onednn_mm", "weight_packed_linear"} & {str(getattr(n.target, "__name__", "")) for n in served.module.graph.nodes}
    assert capture_key(served.module, {}, inference=True).text == key_of(Decoder()).text


def test_a_bias_that_was_met_before_its_weight_gives_the_same_key() -> None:
    plain, other = graph_of(Decoder()), graph_of(Decoder())
    linear = next(n for n in other.graph.nodes if n.target is torch._C._nn.linear and n.args[2] is not None)
    linear.args[1].prepend(linear.args[2])
    other.recompile()
    first, second = served_graph(plain), served_graph(other)
    assert capture_key(first.module, {}, inference=True).text == capture_key(second.module, {}, inference=True).text
    names = [[n.name for n in module.graph.nodes if n.op == "placeholder"] for module in (plain, other)]
    assert names[0] != names[1]
    assert [names[0][k] for k in first.takes] == [names[1][k] for k in second.takes], "each argument is handed over as what it is"


def test_ranks_and_processes_have_one_key() -> None:
    ranks = [served_graph(graph_of(Decoder(rank=r, handle=h))) for r, h in ((0, 3), (1, 9))]
    keys = [capture_key(r.module, {}, inference=True).digest for r in ranks]
    assert keys[0] == keys[1]
    half = VOCABULARY // 2
    assert sorted(set(ranks[0].extra)) == [0, half]
    assert sorted(set(ranks[1].extra)) == [half, VOCABULARY]
    # a handle, and the rank that each layer's operator is told: one mark for all of them
    assert [r.marks for r in ranks] == [((MARK, 3), (MARK + 1, 0)), ((MARK, 9), (MARK + 1, 1))]


def test_names_of_layers_do_not_enter() -> None:
    assert key_of(Decoder(prefix="model.layers")).digest == key_of(Decoder(prefix="language_model.blocks")).digest


@pytest.mark.parametrize("other", [Decoder(layers=1), Decoder().to(torch.bfloat16), Decoder(rank=0)])
def test_another_computation_has_another_key(other: Decoder) -> None:
    assert key_of(Decoder()).digest != key_of(other).digest


def test_the_graph_that_came_is_left_as_it_is() -> None:
    module = graph_of(Decoder(packed="handle", rank=1))
    before = str(module.graph)
    served_graph(module)
    assert str(module.graph) == before
