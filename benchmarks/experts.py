"""A mixture of experts on this CPU: `torch.compile(backend="flagtree")` beside the plain loop over experts, alternating, in CPU seconds.

    python benchmarks/experts.py [--repeats 9] [--out FILE]

One thread.  Each row is one size: median CPU milliseconds of a call of the loop and of ours, and their quotient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from flagtree.runtime import operators as operators  # registers torch.ops.flagtree.*
from flagtree.runtime.compile import backend

# tokens, experts, experts a token, hidden, inner
SIZES = [(1, 64, 8, 1024, 512), (8, 64, 8, 1024, 512), (64, 64, 8, 1024, 512), (256, 16, 2, 1024, 512)]


def layer(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int) -> torch.Tensor:
    weights, ids = torch.ops.flagtree.moe_route(logits, None, top_k, "softmax", True)
    return torch.ops.flagtree.fused_moe(x, gate_up, down, weights, ids)


def measured(size: tuple[int, ...], dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """Median CPU milliseconds of the plain loop and of ours."""
    tokens, experts, top_k, hidden, inner = size
    torch.manual_seed(0)
    operands = (
        torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, experts),
        (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).to(dtype), (torch.randn(experts, hidden, inner) / inner**0.5).to(dtype),
    )  # fmt: skip
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*operands, top_k), layer(*operands, top_k), rtol=2e-2, atol=2e-2)
        for _ in range(repeats):
            for function, spent in zip((layer, compiled), times, strict=True):
                start = time.process_time()
                function(*operands, top_k)
                spent.append(time.process_time() - start)
    loop, ours = (statistics.median(t) * 1e3 for t in times)
    return loop, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| tokens | experts | a token | hidden | inner | dtype | loop ms | ours ms | ours / loop |", "|" + "---|" * 9]
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            loop, ours = measured(size, dtype, options.repeats)
            row = (*size, str(dtype).removeprefix("torch."), f"{loop:.2f}", f"{ours:.2f}", f"{ours / loop:.2f}")
            lines.append("| " + " | ".join(map(str, row)) + " |")
            print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
