"""Functions with every kind of product that targets with warps have kernels for, and operands for them."""

from __future__ import annotations

import torch

flagtree = torch.ops.flagtree
E4M3 = torch.float8_e4m3fn


def grouped(x, w, scales):
    """Activations as they come, in groups of 128; weights in blocks of 128 x 128."""
    return flagtree.scaled_linear(*flagtree.quantise(x, 128, w.dtype), w, scales, x.dtype)


def rowwise(x, w, scales):
    """One scale a token and one a column of the result."""
    return flagtree.scaled_linear(*flagtree.quantise(x, 0, w.dtype), w, scales, x.dtype)


def experts(x, logits, gate_up, down):
    return flagtree.fused_moe(x, gate_up, down, *flagtree.moe_route(logits, None, 2, "sigmoid", True))


def experts_back(x, logits, gate_up, up_scales, down, down_scales):
    """Weights in blocks, taken back inside the products."""
    back = [flagtree.dequantise(w, s, 128, 128, x.dtype) for w, s in ((gate_up, up_scales), (down, down_scales))]
    return flagtree.fused_moe(x, *back, *flagtree.moe_route(logits, None, 2, "sigmoid", True))


def experts_scaled(x, logits, gate_up, up_scales, down, down_scales):
    """As MiniMax-M2's quantization_config says: weights in blocks, activations as they come."""
    weights, ids = flagtree.moe_route(logits, None, 2, "sigmoid", True)
    return flagtree.fused_moe_scaled(x, gate_up, up_scales, down, down_scales, weights, ids)


def _cases() -> dict:
    torch.manual_seed(4)
    hidden, inner, count, columns = 256, 128, 4, 192
    x, logits = torch.randn(5, hidden).bfloat16(), torch.randn(5, count)
    plain = [torch.randn(count, *size) / size[1] ** 0.5 for size in ((2 * inner, hidden), (hidden, inner))]
    blocks = [part for w in plain for part in ((w * 100).to(E4M3), torch.rand(count, w.shape[1] // 128, w.shape[2] // 128) / 100)]
    w = torch.randn(columns, hidden)
    return {
        "experts": (experts, (x, logits, *(p.bfloat16() for p in plain))),
        "experts, weights of e4m3fn": (experts_back, (x, logits, *blocks)),
        "experts, activations of e4m3fn": (experts_scaled, (x, logits, *blocks)),
        "e4m3fn in groups": (grouped, (x, w.to(E4M3), torch.rand(2, 2) / 8)),
        "rows of e4m3fn": (rowwise, (x, w.to(E4M3), torch.rand(columns, 1) / 8)),
        "int8": (rowwise, (x, (w * 30).to(torch.int8), torch.rand(columns, 1) / 8)),
    }


CASES = _cases()
