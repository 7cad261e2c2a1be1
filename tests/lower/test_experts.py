"""Routing and experts as generated kernels and grouped products: equal to the operators' plain definitions, which stand in eager."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.errors import BindError
from flagtree.runtime.compile import backend
from tests.runtime.test_experts import make

moe_route, fused_moe = torch.ops.flagtree.moe_route, torch.ops.flagtree.fused_moe


def compiled(function, *operands: torch.Tensor):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend=backend, fullgraph=True)(*operands)


ROWS = torch.stack([
    torch.zeros(20), torch.arange(20.0), -torch.arange(20.0), torch.full((20,), -math.inf).index_fill(0, torch.tensor([3, 11]), 1.0),
    torch.tensor([0.5, -0.5] * 10), torch.full((20,), 1e30), torch.zeros(20).index_fill(0, torch.tensor([7, 9]), math.nan),
    torch.tensor([2.0] * 5 + [1.0] * 5 + [-0.0, 0.0] * 5),
])  # fmt: skip
ROUTES = [
    ("softmax", False, False, 1.0, torch.float32), ("softmax", True, False, 1.0, torch.bfloat16),
    ("sigmoid", True, True, 1.0, torch.float32), ("sigmoid", False, True, 2.5, torch.float32), ("softmax", True, True, 0.5, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("scoring", "renormalise", "biased", "scaling", "dtype"), ROUTES)
def test_a_route_is_the_definition(scoring: str, renormalise: bool, biased: bool, scaling: float, dtype: torch.dtype) -> None:
    """Ties, infinities and NaN among the scores, and where the bias alone makes them, included."""
    torch.manual_seed(3)
    logits = torch.cat([ROWS, torch.randn(9, 20)]).to(dtype)
    bias = torch.tensor([0.0, -math.inf, math.nan, -1.0] + [0.0] * 16) if biased else None

    def route(x):
        return moe_route(x, bias, 6, scoring, renormalise, scaling)

    weights, ids = compiled(route, logits)
    wanted, chosen = route(logits)
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, wanted, rtol=2e-6, atol=1e-9, equal_nan=True)


def test_of_a_route_one_result_may_be_used_alone() -> None:
    logits = torch.randn(5, 12)
    ids = compiled(lambda x: moe_route(x, None, 2, "softmax", True)[1] + 1, logits)
    assert torch.equal(ids, moe_route(logits, None, 2, "softmax", True)[1] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_experts_are_the_plain_loop_for_any_number_of_tokens(activation: str, dtype: torch.dtype) -> None:
    """One, none, all choices of one expert, experts without a choice: one compilation, sizes of the call."""
    torch._dynamo.reset()
    call = torch.compile(lambda *operands: fused_moe(*operands, activation), backend=backend, fullgraph=True, dynamic=True)
    for tokens, seed in ((13, 0), (4, 1), (2, 2)):
        x, gate_up, down, weights, ids = make(tokens, 6, 3, dtype, seed=seed)
        for chosen in (ids, torch.full_like(ids, 5), torch.zeros_like(ids)):
            with torch.no_grad():
                found = call(x, gate_up, down, weights, chosen)
            wanted = fused_moe(x, gate_up, down, weights, chosen, activation)
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 2**-7 * wanted.abs().max().item()}
            torch.testing.assert_close(found, wanted, **tolerance)
    for tokens in (1, 0):
        operands = make(tokens, 6, 3, dtype, seed=4)
        torch.testing.assert_close(compiled(fused_moe, *operands), fused_moe(*operands), rtol=2e-2, atol=2e-2)


def test_a_shared_expert_outside_joins_the_weighted_sum() -> None:
    """The sum of both is one kernel: nothing else reads what the weighted sum would have written."""
    x, gate_up, down, weights, ids = make(6, 4, 2, torch.float32)

    def layer(x, shared, gate_up, down, weights, ids):
        return fused_moe(x, gate_up, down, weights, ids) + shared

    shared = torch.randn_like(x)
    found = compiled(layer, x, shared, gate_up, down, weights, ids)
    torch.testing.assert_close(found, layer(x, shared, gate_up, down, weights, ids), rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_not_there_is_refused() -> None:
    x, gate_up, down, weights, ids = make(3, 4, 2, torch.float32)
    for wrong in (4, -1):
        with pytest.raises(BindError, match="an index is out of range"):
            compiled(fused_moe, x, gate_up, down, weights, ids.clone().fill_(wrong))
