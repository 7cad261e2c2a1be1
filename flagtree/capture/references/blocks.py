"""Building blocks that the references share: RMS norm, gated layer, rotary positions, what a call returns.

Invariant: each rounds where PyTorch's own modules of these names round, so that a reference in bf16 is what eager serving computes.
Sources: transformers `LlamaRMSNorm`, `LlamaMLP`, `LlamaRotaryEmbedding`; vLLM 0.32 `layernorm.py`, `rotary_embedding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Output:
    """What a text model returns."""

    logits: torch.Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in f32, rounded to x's type, times the weight; over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GatedLayer(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Rotary(nn.Module):
    """Tables of cos and sin [B, S, width] for positions [B, S]: angle p / theta^(2i / width), the halves equal; computed in f32."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        exponents = torch.arange(0, config.width, 2, dtype=torch.float32) / config.width
        self.inv_freq = nn.Buffer(1.0 / config.theta**exponents, persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].to(torch.float32) * self.inv_freq
        both = torch.cat((angles, angles), -1)
        return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, H, S, width] turned by the angles: (a, b) of the two halves becomes (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def heads(x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, S, H * width] as [B, H, S, width], without a copy."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)
