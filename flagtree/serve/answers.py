"""vLLM's layers and their arguments turned into formulas: one answer an operator, whichever door asks.

An answer returns what the layer returns, or NotImplemented for a case that no formula covers and that stays with vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flagtree.serve.operators import Operators

Answer = Callable[..., Any]


def rms_norm(layer: Any, run: Operators, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    """`RMSNorm`: the norm, or with a residual the norm of the sum and the sum."""
    if getattr(layer, "variance_size_override", None) is not None:
        return NotImplemented
    has_weight = getattr(layer, "has_weight", True)
    has_weight = getattr(layer, "pass_weight" if residual is None else "pass_weight_add", has_weight)
    weight = layer.weight.data if has_weight else None
    if residual is None:
        return run("rms_norm", [x], [weight], [float(layer.variance_epsilon)])[0]
    return run("add_rms_norm", [x, residual], [weight], [float(layer.variance_epsilon)])


def silu_and_mul(layer: Any, run: Operators, x: torch.Tensor) -> Any:
    """`SiluAndMul`."""
    return run("silu_and_mul", [x])[0]


def gelu_and_mul(layer: Any, run: Operators, x: torch.Tensor) -> Any:
    """`GeluAndMul`."""
    return run("gelu_and_mul", [x], numbers=[str(layer.approximate)])[0]


def rotary(layer: Any, run: Operators, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
    """`RotaryEmbedding`: query [tokens, heads x head size] and key turned."""
    if positions.dim() != 1 or query.dim() != 2:
        return NotImplemented
    table = layer._match_cos_sin_cache_dtype(query)
    numbers = [int(layer.head_size), int(layer.rotary_dim), bool(layer.is_neox_style)]
    turned = [x if x is None else run("rotary", [positions, x], [table], numbers)[0] for x in (query, key)]
    return turned[0], turned[1]
