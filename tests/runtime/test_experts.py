"""`torch.ops.flagtree.moe_route` and `fused_moe` against the formulas written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.errors import BindError
from flagtree.runtime import experts
from flagtree.runtime import operators as operators

moe_route, fused_moe = torch.ops.flagtree.moe_route, torch.ops.flagtree.fused_moe
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def routed(logits: list[float], bias: list[float], top_k: int, scoring: str, renormalise: bool, scaling: float) -> tuple[list, list]:
    """One token in Python's own floats: a score each, then the greatest left, top_k times."""
    if scoring == "softmax":
        parts = [math.exp(x - max(logits)) for x in logits]
        scores = [p / sum(parts) for p in parts]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    left = [s + b for s, b in zip(scores, bias, strict=True)]
    ids = sorted(range(len(left)), key=lambda e: (-left[e], e))[:top_k]
    total = sum(scores[e] for e in ids) if renormalise else 1.0
    return [scores[e] / total * scaling for e in ids], ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("scoring", experts.SCORINGS)
@pytest.mark.parametrize("biased", [True, False])
def test_the_route_of_each_token_is_the_formula(biased: bool, scoring: str, renormalise: bool, scaling: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = torch.randn(9, 12, dtype=dtype)
    bias = torch.randn(12) if biased else None
    weights, ids = moe_route(logits, bias, 4, scoring, renormalise, scaling)
    assert (weights.dtype, ids.dtype, weights.shape, ids.shape) == (torch.float32, torch.int32, (9, 4), (9, 4))
    for t in range(9):
        numbers, chosen = routed(logits[t].tolist(), [0.0] * 12 if bias is None else bias.tolist(), 4, scoring, renormalise, scaling)
        assert ids[t].tolist() == chosen
        torch.testing.assert_close(weights[t], torch.tensor(numbers), rtol=2e-6, atol=0)


def test_ties_go_to_the_lowest_index_and_nan_comes_first() -> None:
    bias = torch.tensor([0.0, math.nan, 0.0, -math.inf, -math.inf, 0.0])
    assert moe_route(torch.zeros(2, 6), None, 3, "softmax", True)[1].tolist() == [[0, 1, 2]] * 2
    assert moe_route(torch.zeros(1, 6), bias, 6, "sigmoid", False)[1].tolist() == [[1, 0, 2, 5, 3, 4]]
    weights, ids = moe_route(torch.tensor([[1.0, math.nan, 3.0]]), None, 2, "softmax", False)
    assert ids.tolist() == [[0, 1]] and weights.isnan().all()  # a softmax over NaN is all NaN
    weights, ids = moe_route(torch.tensor([[1.0, math.nan, 3.0]]), None, 2, "sigmoid", False)
    assert ids.tolist() == [[1, 2]] and weights[0, 0].isnan() and weights[0, 1] == torch.tensor(3.0).sigmoid()


def test_ids_agree_with_topk_where_no_two_scores_are_equal() -> None:
    torch.manual_seed(2)
    logits = torch.randn(64, 256)
    weights, ids = moe_route(logits, None, 8, "softmax", False)
    values, chosen = logits.softmax(-1).topk(8)
    assert torch.equal(ids.long(), chosen) and torch.equal(weights, values)


def plain(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, activation: str
) -> torch.Tensor:
    """Token by token and expert by expert, in float64."""
    half = down.shape[2]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            both = gate_up[expert].double() @ x[t].double()
            out[t] += weight * (down[expert].double() @ (experts.ACTIVATIONS[activation](both[:half]) * both[half:]))
    return out


def make(tokens: int, experts_: int, top_k: int, dtype: torch.dtype, hidden: int = 24, inner: int = 16, seed: int = 0):
    torch.manual_seed(seed)
    x = torch.randn(tokens, hidden, dtype=dtype)
    gate_up = torch.randn(experts_, 2 * inner, hidden, dtype=dtype) / 4
    down = torch.randn(experts_, hidden, inner, dtype=dtype) / 4
    ids = torch.stack([torch.randperm(experts_)[:top_k] for _ in range(tokens)]) if tokens else torch.zeros(0, top_k)
    return x, gate_up, down, torch.rand(tokens, top_k), ids.to(torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("activation", experts.ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "count", "top_k"), [(13, 6, 2), (1, 8, 3), (3, 32, 1), (0, 4, 2), (5, 1, 1)])
def test_the_experts_are_the_plain_loop(tokens: int, count: int, top_k: int, activation: str, dtype: torch.dtype) -> None:
    operands = make(tokens, count, top_k, dtype)
    found = fused_moe(*operands, activation)
    assert found.dtype == dtype and found.shape == operands[0].shape
    wanted = plain(*operands, activation)
    scale = wanted.abs().max().item() if tokens else 1.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("ids", [[[3, 3]] * 7, [[0, 3]] * 7, [[1, 1]] * 3 + [[2, 0]] * 4], ids=["one", "empty between", "twice"])
def test_all_tokens_may_choose_one_expert_or_one_twice(ids: list) -> None:
    x, gate_up, down, weights, _ = make(7, 4, 2, torch.float64)
    chosen = torch.tensor(ids, dtype=torch.int32)
    torch.testing.assert_close(fused_moe(x, gate_up, down, weights, chosen), plain(x, gate_up, down, weights, chosen, "silu"))


def test_each_is_one_node_of_an_export_with_a_free_number_of_tokens() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x, logits, gate_up, down):
            weights, ids = moe_route(logits, None, 2, "sigmoid", True)
            return fused_moe(x, gate_up, down, weights, ids)

    x, gate_up, down, _, _ = make(5, 6, 2, torch.float32)
    logits, tokens = torch.randn(5, 6), torch.export.Dim("tokens", min=1, max=64)
    exported = torch.export.export(Layer(), (x, logits, gate_up, down), dynamic_shapes=({0: tokens}, {0: tokens}, None, None))
    exported = exported.run_decompositions()
    called = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert [c for c in called if c.startswith("flagtree")] == ["flagtree.moe_route.default", "flagtree.fused_moe.default"]
    assert all(c.startswith("flagtree") or "getitem" in c for c in called)
    more, routes = torch.randn(9, 24), torch.randn(9, 6)
    assert torch.equal(exported.module()(more, routes, gate_up, down), Layer()(more, routes, gate_up, down))


BAD_ROUTES: dict[str, dict] = {
    "4 experts a token of 3": {"top_k": 4}, "0 experts a token": {"top_k": 0}, "unknown scoring 'max'": {"scoring": "max"},
    "one number an expert": {"bias": torch.zeros(2)}, "floats": {"logits": torch.zeros(2, 3, dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_ROUTES)
def test_a_router_that_cannot_be_is_refused(message: str) -> None:
    given = {"logits": torch.zeros(2, 3), "bias": None, "top_k": 1, "scoring": "softmax", "renormalise": True} | BAD_ROUTES[message]
    with pytest.raises(BindError, match=message):
        moe_route(**given)


def test_experts_that_do_not_fit_are_refused() -> None:
    x, gate_up, down, weights, ids = make(3, 4, 2, torch.float32)
    for operands, message in (
        ((x, gate_up, down.transpose(1, 2), weights, ids), "do not fit"),
        ((x, gate_up, down.bfloat16(), weights, ids), "do not fit"),
        ((x, gate_up, down, weights, ids.long()), "int64"),
        ((x, gate_up, down, weights[:2], ids), "do not fit"),
        ((x, gate_up, down, weights, ids + 2), "expert 5 of 4"),
        ((x, gate_up, down, weights, ids - 1), "expert -1 of 4"),
    ):
        with pytest.raises(BindError, match=message):
            fused_moe(*operands)
    with pytest.raises(BindError, match="unknown activation"):
        fused_moe(x, gate_up, down, weights, ids, "tanh")
