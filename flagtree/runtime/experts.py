"""The torch operators of a mixture of experts: routing, and the experts with their combination.

Invariant: which experts a token gets is a function of its own scores alone, ties and NaN included, and of no other token.
Imports nothing but torch and our errors; importing the module registers the operators, once a process.

    flagtree::moe_route(logits, bias?, top_k, scoring, renormalise, scaling) -> (weights, ids)
        logits [T, E], a row a token; bias [E] or none; scoring "softmax" or "sigmoid", over the experts in f32.
        The choice is by score + bias, the greatest first; among equals the lowest index first, NaN before every number.
        weights f32 [T, top_k]: the chosen scores (without the bias), divided by their sum where `renormalise`, times `scaling`;
        ids int32 [T, top_k].  A sum of zero gives NaN, as the division does.
    flagtree::fused_moe(x, gate_up, down, weights, ids, activation) -> y
        x [T, H]; gate_up [E, 2I, H], the gate's I rows first; down [E, H, I]; weights f32 and ids int32 [T, K] (ids of a row need not
        differ); activation "silu" or "gelu".  y [T, H] of x's type:
        y[t] = sum over j of weights[t, j] * (act(g) * u) down[ids[t, j]]^T   with g, u = the halves of x[t] gate_up[ids[t, j]]^T
        Every product, the activation and its multiplication round to x's type, as the plain modules do; the weighted sum over j is
        taken in f32 in the order of j and rounded once.  A shared expert stays outside: an ordinary gated layer that is added.

Sources of the formulas: transformers' `MiniMaxM2TopKRouter`, `Qwen3MoeTopKRouter` and `Qwen3MoeExperts`; vLLM's `step3_text.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from flagtree.errors import BindError

ROUTE = "flagtree::moe_route"
FUSED = "flagtree::fused_moe"
SCORINGS = ("softmax", "sigmoid")
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {"silu": functional.silu, "gelu": functional.gelu}

_library = torch.library.Library("flagtree", "FRAGMENT")
_library.define(
    "moe_route(Tensor logits, Tensor? bias, int top_k, str scoring, bool renormalise, float scaling=1.0) -> (Tensor weights, Tensor ids)"
)
_library.define("fused_moe(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor ids, str activation='silu') -> Tensor")


def _check_route(logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: str) -> None:
    """BindError for what no router computes."""
    if logits.ndim != 2 or not logits.dtype.is_floating_point:
        raise BindError(f"moe_route: logits are {logits.dtype} {tuple(logits.shape)}, floats [tokens, experts] are needed")
    if not 1 <= top_k <= logits.shape[1]:
        raise BindError(f"moe_route: {top_k} experts a token of {logits.shape[1]}")
    if bias is not None and bias.shape != logits.shape[1:]:
        raise BindError(f"moe_route: the bias is {tuple(bias.shape)}, one number an expert ({logits.shape[1]}) is needed")
    if scoring not in SCORINGS:
        raise BindError(f"moe_route: unknown scoring '{scoring}'", hint=f"one of {', '.join(SCORINGS)}")


def _route(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: str, renormalise: bool, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_route(logits, bias, top_k, scoring)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    choice = scores if bias is None else scores + bias
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    if scaling != 1.0:
        weights = weights * scaling
    return weights.to(torch.float32), ids.to(torch.int32)


def _route_shape(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: str, renormalise: bool, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_route(logits, bias, top_k, scoring)
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _told(x: torch.Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"


def _check_experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, activation: str
) -> None:
    """BindError where the operands do not fit each other."""
    fits = x.ndim == 2 and gate_up.ndim == 3 and down.ndim == 3
    fits = fits and gate_up.shape[0] == down.shape[0] and gate_up.shape[1] == 2 * down.shape[2]
    if not fits or not gate_up.shape[2] == down.shape[1] == x.shape[1] or not x.dtype == gate_up.dtype == down.dtype:
        raise BindError(
            f"fused_moe: {_told(x)}, {_told(gate_up)} and {_told(down)} do not fit",
            hint="x [T, H], gate_up [E, 2I, H], down [E, H, I], of one type",
        )
    typed = (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    if not typed or ids.ndim != 2 or ids.shape[0] != x.shape[0] or weights.shape != ids.shape:
        raise BindError(
            f"fused_moe: weights {_told(weights)} and ids {_told(ids)} do not fit {tuple(x.shape)}",
            hint="weights float32 and ids int32, [T, K] each",
        )
    if activation not in ACTIVATIONS:
        raise BindError(f"fused_moe: unknown activation '{activation}'", hint=f"one of {', '.join(ACTIVATIONS)}")


def _experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, activation: str = "silu"
) -> torch.Tensor:
    _check_experts(x, gate_up, down, weights, ids, activation)

    def layer(rows: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = functional.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        return functional.linear(ACTIVATIONS[activation](gate) * up, down[expert])

    return combined("fused_moe", x, weights, ids, len(down), layer)


def combined(
    name: str, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, count: int, layer: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """The weighted sum over each token's experts of `layer(rows of x, expert)`.  BindError, in the name of an operator, for an id that is
    none of `count` experts."""
    chosen = ids.unique().tolist()
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        raise BindError(f"{name}: expert {chosen[0] if chosen[0] < 0 else chosen[-1]} of {count}")
    results = x.new_empty(*ids.shape, x.shape[1])
    for expert in chosen:
        token, place = torch.where(ids == expert)
        results[token, place] = layer(x[token], expert)
    total = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for k in range(ids.shape[1]):
        total += weights[:, k, None] * results[:, k]
    return total.to(x.dtype)


def _experts_shape(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, activation: str = "silu"
) -> torch.Tensor:
    _check_experts(x, gate_up, down, weights, ids, activation)
    return x.new_empty(x.shape)


# CompositeExplicitAutograd: built from ATen calls, so it serves every device; on an accelerator reading `ids` synchronises once
_library.impl("moe_route", _route, "CompositeExplicitAutograd")
_library.impl("fused_moe", _experts, "CompositeExplicitAutograd")
torch.library.register_fake(ROUTE, _route_shape, lib=_library)
torch.library.register_fake(FUSED, _experts_shape, lib=_library)
