"""Compile a gated block with a residual norm in a program: `backend="flagtree"` is all it takes, no import.

Runs three sequence lengths through one compiled function and compares each with eager PyTorch.
"""

import torch
from torch import nn


class Block(nn.Module):
    """Residual add, RMS norm and a gated feed-forward layer, as decoders have them."""

    def __init__(self, width: int = 64, hidden: int = 192) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual
        scale = torch.rsqrt(residual.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        x = self.weight * (residual.float() * scale).to(residual.dtype)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x)), residual


def main() -> None:
    torch.manual_seed(0)
    block = Block().to(torch.bfloat16).eval()
    compiled = torch.compile(block, backend="flagtree", dynamic=True)
    with torch.no_grad():
        for tokens in (1, 7, 33):
            x, residual = torch.randn(2, 2, tokens, 64, dtype=torch.bfloat16)
            for ours, eager in zip(compiled(x, residual), block(x, residual)):
                torch.testing.assert_close(ours, eager)
            print(f"{tokens} tokens: equal to eager")


if __name__ == "__main__":
    main()
