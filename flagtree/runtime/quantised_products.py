"""Matrix products of quantised activations and quantised weights as torch operators: a linear layer, and the experts of a mixture.

Invariant: the products of one block are summed alone and scaled once, in f32 (int8: in int32, which is exact), then the blocks are added.
Registered by `operators.py`; `lower/quantised_products.py` takes them apart, `passes/scaled_products.py` makes kernels of the products.

    flagtree::scaled_linear(q, scales, w, w_scales, dtype) -> y       q [..., K] and w [N, K] of one type, float8_e4m3fn or int8;
        scales f32 [..., B] for B equal groups of K; w_scales f32 [N / r, B], rounded up, r rows of w to a scale (128 for
        MiniMax-M2's blocks, 1 for a scale a row).  y [..., N] of `dtype`:
        y[t, n] = sum over b of (scales[t, b] * w_scales[n // r, b]) * (sum over k in b of q[t, k] * w[n, k])
    flagtree::experts_up_scaled(q, scales, w, w_scales, order, starts, top_k, dtype) -> y
    flagtree::experts_down_scaled(q, scales, w, w_scales, order, starts, top_k, dtype) -> y
        as experts_up and experts_down (expert_products.py), each row times its expert's weight by the formula above; w [E, N, K],
        w_scales [E, N / 128, K / 128].
    flagtree::fused_moe_scaled(x, gate_up, gate_up_scales, down, down_scales, weights, ids, activation) -> y
        fused_moe (experts.py) with weights in e4m3fn, a scale for each block of 128 x 128, and activations quantised as they come, in
        groups of 128 (quantised.py): x before the first product, the gated result, rounded to x's type, before the second.

Source of the formula: transformers' `finegrained_fp8.py` (`w8a8_block_fp8_matmul`), which MiniMax-M2's quantization_config asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from flagtree.errors import BindError
from flagtree.runtime.experts import ACTIVATIONS, combined
from flagtree.runtime.quantised import LIMITS

BLOCK = 128

_library = torch.library.Library("flagtree", "FRAGMENT")
_library.define("scaled_linear(Tensor q, Tensor scales, Tensor w, Tensor w_scales, ScalarType dtype) -> Tensor")
for _name in ("up", "down"):
    _library.define(
        f"experts_{_name}_scaled(Tensor q, Tensor scales, Tensor w, Tensor w_scales, Tensor order, Tensor starts, int top_k, "
        "ScalarType dtype) -> Tensor"
    )
_library.define(
    "fused_moe_scaled(Tensor x, Tensor gate_up, Tensor gate_up_scales, Tensor down, Tensor down_scales, Tensor weights, Tensor ids, "
    "str activation='silu') -> Tensor"
)


def rows_of_scale(w: torch.Tensor, w_scales: torch.Tensor) -> int:
    """Rows of a weight [..., N, K] that share a scale: 1, or 128."""
    return 1 if w_scales.shape[-2] == w.shape[-2] else BLOCK


def _check(q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor) -> None:
    """BindError where the operands do not fit each other."""
    blocks = scales.shape[-1] if scales.ndim else 0
    fits = q.ndim >= 1 and w.ndim >= 2 and q.dtype == w.dtype and q.dtype in LIMITS and q.shape[-1] == w.shape[-1]
    fits = fits and scales.shape[:-1] == q.shape[:-1] and blocks > 0 and q.shape[-1] % blocks == 0
    rows = rows_of_scale(w, w_scales) if w_scales.ndim == w.ndim else 0
    if not fits or not rows or w_scales.shape != (*w.shape[:-2], -(-w.shape[-2] // rows), blocks):
        told = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (q, scales, w, w_scales))
        raise BindError(f"scaled product: {told} do not fit", hint="q [..., K] and w [N, K] of one type, scales [..., B] and [N / 128, B]")


def _product(q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q [T, K] times w [N, K]."""
    blocks, wide = scales.shape[-1], torch.float64 if q.dtype == torch.int8 else torch.float32
    spread = w_scales.repeat_interleave(rows_of_scale(w, w_scales), -2)[: w.shape[0]]
    size = q.shape[-1] // blocks
    total = torch.zeros(len(q), len(w), dtype=torch.float32, device=q.device)
    for block in range(blocks):
        k = slice(block * size, (block + 1) * size)
        part = q[:, k].to(wide) @ w[:, k].to(wide).t()
        total += part.to(torch.float32) * (scales[:, block, None] * spread[None, :, block])
    return total.to(dtype)


def _linear(q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _check(q, scales, w, w_scales)
    flat = q.reshape(-1, q.shape[-1]), scales.reshape(-1, scales.shape[-1])
    return _product(*flat, w, w_scales, dtype).view(*q.shape[:-1], w.shape[0])


def _linear_shape(q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _check(q, scales, w, w_scales)
    return q.new_empty((*q.shape[:-1], w.shape[0]), dtype=dtype)


def _sorted(
    q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, starts: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows sorted by expert times the weights of their experts."""
    ends: list[int] = starts.tolist()
    if len(ends) != len(w) + 1 or ends[0] != 0 or ends[-1] != len(q):
        raise BindError(f"experts: of {len(q)} choices {ends[-1] - ends[0]} are of one of {len(w)} experts", why="an index is out of range")
    y = scales.new_empty((len(q), w.shape[1]), dtype=dtype)
    for expert, (first, end) in enumerate(pairwise(ends)):
        if end > first:
            y[first:end] = _product(q[first:end], scales[first:end], w[expert], w_scales[expert], dtype)
    return y


def _taken(t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor; by their bytes where the type is one byte, for which torch has no indexing on every device."""
    return t.view(torch.uint8).index_select(0, rows).view(t.dtype) if t.dtype.itemsize == 1 else t.index_select(0, rows)


def _up(
    q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, top_k: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    _check(q, scales, w[0], w_scales[0])
    token = order.div(top_k, rounding_mode="floor")
    return _sorted(_taken(q, token), _taken(scales, token), w, w_scales, starts, dtype)


def _down(
    q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, top_k: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    _check(q, scales, w[0], w_scales[0])
    y = _sorted(q, scales, w, w_scales, starts, dtype)
    return torch.empty_like(y).index_copy_(0, order.long(), y).view(len(q) // top_k, top_k, w.shape[1])


def _up_shape(
    q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, top_k: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty((order.shape[0], w.shape[1]), dtype=dtype)


def _down_shape(
    q: torch.Tensor, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, top_k: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty((q.shape[0] // top_k, top_k, w.shape[1]), dtype=dtype)


def _experts(
    x: torch.Tensor, gate_up: torch.Tensor, gate_up_scales: torch.Tensor, down: torch.Tensor, down_scales: torch.Tensor,
    weights: torch.Tensor, ids: torch.Tensor, activation: str = "silu",
) -> torch.Tensor:  # fmt: skip
    quantise = torch.ops.flagtree.quantise
    if activation not in ACTIVATIONS:
        raise BindError(f"fused_moe_scaled: unknown activation '{activation}'", hint=f"one of {', '.join(ACTIVATIONS)}")

    def layer(rows: torch.Tensor, expert: int) -> torch.Tensor:
        q, scales = quantise(rows, BLOCK, gate_up.dtype)
        gate, up = _linear(q, scales, gate_up[expert], gate_up_scales[expert], x.dtype).chunk(2, dim=-1)
        q, scales = quantise(ACTIVATIONS[activation](gate) * up, BLOCK, down.dtype)
        return _linear(q, scales, down[expert], down_scales[expert], x.dtype)

    return combined("fused_moe_scaled", x, weights, ids, len(down), layer)


def _experts_shape(
    x: torch.Tensor, gate_up: torch.Tensor, gate_up_scales: torch.Tensor, down: torch.Tensor, down_scales: torch.Tensor,
    weights: torch.Tensor, ids: torch.Tensor, activation: str = "silu",
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape)


_OPERATORS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "scaled_linear": (_linear, _linear_shape), "experts_up_scaled": (_up, _up_shape), "experts_down_scaled": (_down, _down_shape),
    "fused_moe_scaled": (_experts, _experts_shape),
}  # fmt: skip
for _name, (_meaning, _shape) in _OPERATORS.items():
    _library.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flagtree::{_name}", _shape, lib=_library)
