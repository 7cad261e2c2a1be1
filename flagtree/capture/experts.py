"""Routing and experts of transformers' models as our operators, for models built by `capture/build.py`.

Invariant: one `flagtree::moe_route` and one `flagtree::fused_moe` a layer; a router that they do not compute is left as it is.
transformers asks its registry for the experts; routers are plain modules, whose forward is replaced on the instance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from flagtree.errors import CaptureError
from flagtree.runtime import operators as operators  # registers torch.ops.flagtree.*

EXPERTS_NAME = "flagtree"
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu"}


def register_experts() -> str:
    """Make the operator known to transformers; returns the name to put into `config._experts_implementation`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts)
    return EXPERTS_NAME


def experts(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts of one layer: hidden [T, H], ids and weights [T, K]; returns [T, H].  CaptureError for another activation."""
    kind = type(module.act_fn).__name__
    if kind not in _ACTIVATIONS:
        raise CaptureError(f"experts with the activation {kind}", where=type(module).__name__, hint=f"known: {', '.join(_ACTIVATIONS)}")
    if (scales := module._parameters.get("gate_up_proj_scale_inv")) is not None:  # capture/quantised.py
        return torch.ops.flagtree.fused_moe_scaled(
            hidden, module.gate_up_proj, scales, module.down_proj, module.down_proj_scale_inv, weights.to(torch.float32),
            ids.to(torch.int32), _ACTIVATIONS[kind],
        )  # fmt: skip
    return torch.ops.flagtree.fused_moe(
        hidden, module.gate_up_proj, module.down_proj, weights.to(torch.float32), ids.to(torch.int32), _ACTIVATIONS[kind]
    )


def _sigmoid_router(router: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """`MiniMaxM2TopKRouter`: sigmoid, chosen by score and bias, weights of the chosen divided by their sum."""

    def forward(hidden: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = functional.linear(hidden.reshape(-1, router.hidden_dim).to(router.weight.dtype), router.weight)
        return (logits, *torch.ops.flagtree.moe_route(logits, bias, router.top_k, "sigmoid", True))

    return forward


def _softmax_router(router: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """`Qwen3MoeTopKRouter`: softmax over all experts, weights of the chosen divided by their sum where the configuration says so, and
    rounded to the logits' type."""

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
        weights, ids = torch.ops.flagtree.moe_route(logits, None, router.top_k, "softmax", router.norm_topk_prob)
        return logits, weights.to(logits.dtype), ids

    return forward


ROUTERS: dict[str, Callable[[Any], Callable[..., tuple[torch.Tensor, ...]]]] = {
    "MiniMaxM2TopKRouter": _sigmoid_router,
    "Qwen3MoeTopKRouter": _softmax_router,
}


def take_routing(model: torch.nn.Module) -> None:
    """Give each router that we know the operator in the place of its own forward."""
    for module in model.modules():
        if (made := ROUTERS.get(type(module).__name__)) is not None:
            module.forward = made(module)
