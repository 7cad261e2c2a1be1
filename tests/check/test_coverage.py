"""Counting ATen calls: what counts, and the targets on one block in inference and training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flagtree.check.coverage import aten_calls, coverage


def test_views_allocations_and_detach_do_not_count() -> None:
    x = torch.randn(3, 4, requires_grad=True)

    def run() -> None:
        y = x.t().reshape(2, 6).detach()[1:] + torch.empty(6).expand(1, 6)
        y.mul_(2)

    assert aten_calls(run) == {"aten.clone.default": 1, "aten.add.Tensor": 1, "aten.mul_.Tensor": 1}


def test_backward_counts() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    calls = aten_calls(lambda: torch.tanh(x).sum().backward())  # type: ignore[no-untyped-call]
    assert calls == {"aten.tanh.default": 1, "aten.sum.default": 1, "aten.ones_like.default": 1, "aten.tanh_backward.default": 1}


def test_an_extern_counts_on_both_sides() -> None:
    x = torch.randn(3, 4)
    found = coverage(lambda: x.sort()[0].sort(0)[0] * 2, lambda called: called())
    assert found.left == {"aten.sort.default": 2} and found.eager.total() == 3 and found.kernels == 1
    assert sum(found.externs.values()) == 2 and all(reason for _, reason in found.externs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.down = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy((x @ self.embed.weight.t()).view(-1, 20), ids.view(-1))


def test_a_block_is_within_the_targets() -> None:
    model, ids = Block(), torch.randint(20, (3, 5))

    def infer(called: Callable[..., Any]) -> None:
        with torch.no_grad():
            called(ids)

    def train(called: Callable[..., Any]) -> None:
        model.zero_grad()
        called(ids).backward()

    inference, training = coverage(model, infer), coverage(model, train)
    assert inference.share <= 0.5 and training.share <= 0.6
    extern = {"aten.mm", "aten.addmm", "aten.embedding"}
    assert _operators(inference.left) <= extern
    assert _operators(training.left) <= extern | {"aten.ones_like"}  # autograd's own seed


def _operators(calls: Counter[str]) -> set[str]:
    """Without overloads: a product may write into memory that is given."""
    return {name.rsplit(".", 1)[0] for name in calls}
