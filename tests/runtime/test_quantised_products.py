"""Products of quantised operands: what the definitions mean, and that a compiled program gives the same for any number of rows."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.errors import BindError
from flagtree.runtime.compile import backend
from tests.products import CASES, E4M3

flagtree = torch.ops.flagtree


def back(q: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
    """In float64."""
    columns = q.shape[-1] // scales.shape[-1]
    spread = scales.double().repeat_interleave(rows, -2)[..., : q.shape[-2], :].repeat_interleave(columns, -1)
    return q.double() * spread


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """One rounding to bf16, and sums in f32."""
    assert (found.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


@pytest.mark.parametrize("case", ["e4m3fn in groups", "rows of e4m3fn", "int8"])
def test_a_linear_layer_is_the_product_of_what_its_operands_stand_for(case: str) -> None:
    _, (x, w, w_scales) = CASES[case]
    group = 128 if case == "e4m3fn in groups" else 0
    q, scales = flagtree.quantise(x, group, w.dtype)
    y = flagtree.scaled_linear(q, scales, w, w_scales, torch.bfloat16)
    close(y, back(q, scales, 1) @ back(w, w_scales, 128 if group else 1).t())
    exact = flagtree.scaled_linear(q, scales, w, w_scales, torch.float32)
    assert torch.equal(exact.bfloat16(), y) and y.shape == (5, 192)
    leading = flagtree.scaled_linear(q.unflatten(0, (1, 5)), scales.unflatten(0, (1, 5)), w, w_scales, torch.bfloat16)
    assert torch.equal(leading[0], y)


def test_int8_products_are_summed_exactly() -> None:
    q, w = torch.full((1, 7168), 127, dtype=torch.int8), torch.full((2, 7168), 127, dtype=torch.int8)
    w[1, 0] = 126
    y = flagtree.scaled_linear(q, torch.ones(1, 1), w, torch.ones(2, 1), torch.float32)
    assert y.tolist() == [[float(torch.tensor(127 * 127 * 7168).float()), float(torch.tensor(127 * 127 * 7168 - 127).float())]]


def test_a_zero_row_and_a_nan_stay_in_their_row() -> None:
    x = torch.randn(3, 256)
    x[0], x[1, 5] = 0.0, math.nan
    w, scales = torch.randn(64, 256).to(E4M3), torch.rand(1, 2)
    y = flagtree.scaled_linear(*flagtree.quantise(x, 128, E4M3), w, scales, torch.float32)
    assert not y[0].any() and y[1].isnan().all() and y[2].isfinite().all()


def test_experts_quantise_what_comes_and_what_the_gate_leaves() -> None:
    """Against each token's own experts in float64, with the quantisations of the definition."""
    function, (x, logits, gate_up, up_scales, down, down_scales) = CASES["experts, activations of e4m3fn"]
    weights, ids = flagtree.moe_route(logits, None, 2, "sigmoid", True)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for place, expert in enumerate(ids[token].tolist()):
            first = back(*flagtree.quantise(x[token, None], 128, E4M3), 1) @ back(gate_up[expert], up_scales[expert], 128).t()
            gate, up = first.bfloat16().chunk(2, -1)
            gated = flagtree.quantise(torch.nn.functional.silu(gate) * up, 128, E4M3)
            second = back(*gated, 1) @ back(down[expert], down_scales[expert], 128).t()
            total[token] += weights[token, place].double() * second[0]
    close(function(*CASES["experts, activations of e4m3fn"][1]), total)


@pytest.mark.parametrize("case", CASES)
def test_compiled_for_the_cpu_a_product_is_its_definition(case: str) -> None:
    function, operands = CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for rows in (5, 3):
        given = tuple(t[:rows] if t.ndim == 2 and len(t) == 5 else t for t in operands)
        with torch.no_grad():
            found, wanted = compiled(*given), function(*given)
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7 * wanted.abs().max().item())


def test_operands_that_do_not_fit_are_refused() -> None:
    q, w = torch.zeros(2, 256, dtype=torch.int8), torch.zeros(64, 256, dtype=torch.int8)
    good = (q, torch.ones(2, 2), w, torch.ones(1, 2))
    flagtree.scaled_linear(*good, torch.float32)
    for position, other in ((0, q[:, :128]), (1, torch.ones(3, 2)), (2, w.to(E4M3)), (3, torch.ones(2, 2)), (3, torch.ones(1, 1))):
        with pytest.raises(BindError, match="do not fit"):
            flagtree.scaled_linear(*(other if k == position else t for k, t in enumerate(good)), torch.float32)
    operands = CASES["experts, activations of e4m3fn"][1]
    with pytest.raises(BindError, match="unknown activation"):
        flagtree.fused_moe_scaled(operands[0], *operands[2:], torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.int32), "relu")
    with pytest.raises(BindError, match="expert 9"):
        flagtree.fused_moe_scaled(operands[0], *operands[2:], torch.zeros(5, 2), torch.full((5, 2), 9, dtype=torch.int32))
