"""Bytes before fusion: counted by hand for small graphs, and Qwen3-8B against the published measurement."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flagtree.capture.captured import CapturedModel
from flagtree.capture.model import capture
from flagtree.capture.model_spec import ModelSpec, load_spec
from flagtree.capture.traffic import count_traffic, tensor_bytes


@pytest.fixture(scope="module")
def decode(small_spec: Callable[..., ModelSpec]) -> CapturedModel:
    return capture(small_spec(dtype="bfloat16"), "decode", layers=2)


def test_views_and_repeated_elements_are_free() -> None:
    x = torch.empty(4, 1, 8, dtype=torch.bfloat16)
    assert tensor_bytes(x) == 64
    assert tensor_bytes(x.expand(4, 100, 8)) == 64
    assert tensor_bytes(x[:, :, :2]) == 16
    assert tensor_bytes(torch.empty((), dtype=torch.int64)) == 8


def test_each_kind_of_call_in_a_decode_step(decode: CapturedModel) -> None:
    """Width 32, 4 query and 2 key heads of 16, bf16, batch 1: every number below is the rule applied by hand."""
    traffic = count_traffic(decode, context=10)
    by_layer = [call for call in traffic.calls if call.layer == 1]
    gemms = [(call.read, call.written) for call in by_layer if call.target == "aten.linear.default"]
    q, k, o, gate, down = (64 * 32, 64), (32 * 32, 32), (32 * 64, 32), (48 * 32, 48), (32 * 48, 32)
    inputs = [32, 32, 32, 64, 32, 32, 48]
    assert gemms == [(2 * (w + i), 2 * out) for (w, out), i in zip([q, k, k, o, gate, gate, down], inputs, strict=True)]
    (attention,) = [call for call in by_layer if call.target == "flagtree.attention.default"]
    assert attention.read == 2 * 4 * 16 + 2 * (10 * 2 * 16) * 2 + 8  # q, every key and value once, start
    assert attention.written == 2 * 4 * 16 + 2 * (2 * 16) * 2  # the result and one new row of K and V
    (embedding,) = [call for call in traffic.calls if call.target == "aten.embedding.default"]
    assert (embedding.read, embedding.written) == (64 + 8, 64)  # one row and its number, not the table
    powers = [(call.read, call.written) for call in by_layer if call.target == "aten.pow.Tensor_Scalar"]
    assert powers == [(128, 128), (256, 256), (128, 128), (128, 128)]  # in float32, before each norm
    silu = [call.target for call in by_layer if call.node == next(c.node for c in by_layer if "sigmoid" in c.target)]
    assert silu == ["aten._to_copy.default", "aten.sigmoid.default", "aten.mul.Tensor", "aten._to_copy.default"]
    assert not {call.target for call in traffic.calls} & {"aten.view.default", "aten.transpose.int", "aten.slice.Tensor"}


def test_bytes_by_node_and_by_layer_add_up(decode: CapturedModel) -> None:
    traffic = count_traffic(decode, context=10)
    nodes = {node.name for node in decode.graph_module.graph.nodes}
    assert set(traffic.node_bytes()) <= nodes
    total = sum(call.bytes for call in traffic.calls)
    assert sum(traffic.node_bytes().values()) == total
    assert traffic.layer_bytes(0) == traffic.layer_bytes(1) > 0
    outside = total - 2 * traffic.layer_bytes(1)
    assert traffic.model_bytes(decode) == outside + 4 * traffic.layer_bytes(1)


def test_the_batch_reads_its_weights_once(decode: CapturedModel) -> None:
    weights = {p.qualified: tensor_bytes(p.value) for p in decode.placeholders if p.role == "weight"}
    inside = sum(size for name, size in weights.items() if name.startswith("model.layers.1."))
    one, three = (count_traffic(decode, context=10, batch=b).layer_bytes() for b in (1, 3))
    assert three - inside == pytest.approx(3 * (one - inside), rel=0.02)  # norm weights are read once as well, hence not exact


def test_more_tokens_than_positions_are_refused(decode: CapturedModel) -> None:
    with pytest.raises(ValueError, match="5 tokens do not fit into 4"):
        count_traffic(decode, context=4, sequence=5)


@pytest.mark.parametrize(
    ("part", "sizes", "megabytes"),
    [("prefill", {"sequence": 2048, "context": 2048}, 3024.0), ("decode", {"context": 2048}, 395.5)],
)
def test_qwen3_8b_moves_what_was_measured(part: str, sizes: dict[str, int], megabytes: float) -> None:
    """research: one layer at batch 1, attention whole, no repeat_kv and no functional cache write; within 2%."""
    captured = capture(load_spec("qwen3"), part)
    traffic = count_traffic(captured, **sizes)
    assert traffic.layer_bytes(1) / 1e6 == pytest.approx(megabytes, rel=0.02)
    assert traffic.layer_bytes(0) == traffic.layer_bytes(1) == traffic.layer_bytes(2)
