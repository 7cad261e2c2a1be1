"""torch.compile on what encoders are made of: attention of PyTorch's own call, and added embeddings, whose indices are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flagtree.runtime.compile import backend, observed
from tests.runtime.equal_to_eager import check

Tensor = torch.Tensor


def heads(x: Tensor, count: int) -> Tensor:
    """[B, S, H * D] as [B, H, S, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    out = F.scaled_dot_product_attention(heads(q, 4), heads(k, 4), heads(v, 4), mask, **options)
    return out, out.transpose(1, 2).flatten(2) + 1


def steps_of(function: Callable[..., Any], *args: Any) -> list[str]:
    """Operators that the launch list still calls."""
    torch._dynamo.reset()
    with observed() as graphs, torch.no_grad():
        torch.compile(function, backend=backend)(*args)
    return [step["extern"] for graph in graphs for step in graph.launch["steps"] if "extern" in step]


def operands(batch: int, tokens: int, keys: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, n, 4 * width, dtype=dtype) for n in (tokens, keys, keys)]


@pytest.mark.parametrize("sizes", [(2, 70, 70, 8), (1, 1, 1, 64), (3, 5, 130, 24), (2, 0, 4, 16), (2, 3, 0, 16), (0, 3, 3, 16)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_is_a_kernel(sizes: tuple[int, int, int, int], causal: bool, kind: torch.dtype) -> None:
    args = operands(*sizes, kind)
    check(lambda *a: attend(*a, is_causal=causal), *args)
    assert not steps_of(lambda *a: attend(*a, is_causal=causal), *args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_under_masks(dynamic: bool, kind: torch.dtype) -> None:
    args, allowed = operands(2, 9, 67, 16, kind), torch.rand(2, 1, 9, 67) < 0.7
    allowed[1, 0, 4] = False  # a row that sees nothing
    added, row = torch.randn(4, 9, 67, dtype=kind), torch.randn(1, 1, 1, 67, dtype=kind)
    for mask in (allowed, allowed[:1], allowed[:, :, :1].expand(-1, 4, 9, -1), added, row):
        check(attend, *args, mask, dynamic=dynamic)
    for mask in (allowed, allowed[:, :, :1].expand(-1, 4, 9, -1), row):
        assert not steps_of(attend, *args, mask)


def test_sdpa_of_several_calls_and_sizes() -> None:
    """One compiled function at sizes that grow, and keys shared by heads."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: attend(*a)[1], backend=backend, dynamic=True)
    with torch.no_grad():
        for n in (3, 64, 129, 1):
            args = operands(2, n, n + 1, 32)
            torch.testing.assert_close(compiled(*args), attend(*args)[1])
    q, k = torch.randn(2, 8, 11, 16), torch.randn(2, 2, 11, 16)
    check(lambda q, k: F.scaled_dot_product_attention(q, k, k, scale=0.3, enable_gqa=True), q, k)


def test_what_is_left_to_sdpa() -> None:
    assert steps_of(attend, *operands(2, 9, 9, 16, torch.float16)) == ["aten.scaled_dot_product_attention.default"]
    q = torch.randn(2, 4, 9, 16)
    assert steps_of(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), q) == ["aten.scaled_dot_product_attention.default"]


# -- embeddings ------------------------------------------------------------------------------------------------------------
class Embeddings(nn.Module):
    """As BERT's: words, positions and segments, then layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(50, 32, padding_idx=0), nn.Embedding(20, 32), nn.Embedding(2, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None]
        return self.norm(self.words(ids) + self.kinds(kinds) + self.places(places))


def inputs(*shape: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 50, shape, dtype=dtype), torch.randint(0, 2, shape, dtype=dtype)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (2, 0), (0, 3)], ids=str)
def test_added_embeddings(shape: Sequence[int], kind: torch.dtype) -> None:
    check(Embeddings().to(kind), *inputs(*shape), dynamic=kind is torch.bfloat16)


def test_added_embeddings_are_one_kernel_and_a_check() -> None:
    model = Embeddings()
    with observed() as graphs, torch.no_grad():
        torch._dynamo.reset()
        torch.compile(model, backend=backend)(*inputs(2, 7))
    (graph,) = graphs
    assert [s["extern"] for s in graph.launch["steps"] if "extern" in s] == ["flagtree.refuse_outside.default"]
    table = next(b["name"] for b in graph.launch["buffers"] if b["shape"] == [50, 32])
    assert sum(table in s.get("buffers", ()) for s in graph.launch["steps"]) == 1
    check(model, *inputs(2, 7, dtype=torch.int32))


@pytest.mark.parametrize(("row", "bad"), [(0, 50), (0, -1), (1, 2), (1, 2**40), (0, -(2**62))])
def test_a_bad_index_raises_what_eager_raises(row: int, bad: int) -> None:
    model = Embeddings().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        good = inputs(2, 7)
        torch.testing.assert_close(compiled(*good), model(*good))
        wrong = tuple(t.clone() for t in good)
        wrong[row][1, 3] = bad
        for called in (model, compiled):
            with pytest.raises(IndexError, match="index out of range in self"):
                called(*wrong)
        torch.testing.assert_close(compiled(*good), model(*good))


def test_gradients_of_added_embeddings() -> None:
    model = Embeddings()
    torch._dynamo.reset()
    compiled, found = torch.compile(model, backend=backend), []
    ids = inputs(2, 7)
    for called in (model, compiled):
        model.zero_grad()
        called(*ids).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for want, have in zip(*found, strict=True):
        torch.testing.assert_close(have, want)
