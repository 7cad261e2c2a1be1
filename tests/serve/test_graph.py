"""The key of a server's graph: packed products, ranks, layer names and handles do not enter it, and everything that computes does."""

from __future__ import annotations

import pytest
import torch

from flagtree.runtime.capture_key import CaptureKey, capture_key
from flagtree.serve.graph import HANDLE_MARK, served_graph
from tests.serve.decoder import VOCABULARY, Decoder, graph_of


def key_of(model: torch.nn.Module) -> CaptureKey:
    return capture_key(served_graph(graph_of(model)).module, {}, inference=True)


def test_packed_products_have_the_key_of_plain_ones() -> None:
    packed = served_graph(graph_of(Decoder(packed=True)))
    assert len(packed.packed) == 8
    assert "onednn" not in str(packed.module.graph)
    assert capture_key(packed.module, {}, inference=True).text == key_of(Decoder(packed=False)).text


def test_ranks_and_processes_have_one_key() -> None:
    ranks = [served_graph(graph_of(Decoder(rank=r, handle=h))) for r, h in ((0, 3), (1, 9))]
    keys = [capture_key(r.module, {}, inference=True).digest for r in ranks]
    assert keys[0] == keys[1]
    half = VOCABULARY // 2
    assert sorted(set(ranks[0].extra)) == [0, half]
    assert sorted(set(ranks[1].extra)) == [half, VOCABULARY]
    assert [r.marks for r in ranks] == [((HANDLE_MARK, 3),), ((HANDLE_MARK, 9),)]


def test_names_of_layers_do_not_enter() -> None:
    assert key_of(Decoder(prefix="model.layers")).digest == key_of(Decoder(prefix="language_model.blocks")).digest


@pytest.mark.parametrize("other", [Decoder(layers=1), Decoder().to(torch.bfloat16), Decoder(rank=0)])
def test_another_computation_has_another_key(other: Decoder) -> None:
    assert key_of(Decoder()).digest != key_of(other).digest


def test_the_graph_that_came_is_left_as_it_is() -> None:
    module = graph_of(Decoder(packed=True, rank=1))
    before = str(module.graph)
    served_graph(module)
    assert str(module.graph) == before
