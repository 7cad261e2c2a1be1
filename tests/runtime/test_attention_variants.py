"""Attention over all keys, packed sequences, pages and sliding windows against the definition, row by row in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flagtree.errors import BindError
from flagtree.runtime import operators

ours = torch.ops.flagtree
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def one(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One query row [D] over the keys [n, D] that it sees; zeros where it sees none."""
    if not len(keys):
        return torch.zeros(values.shape[-1], dtype=torch.float64)
    return (keys.double() @ q.double() * scale).softmax(0) @ values.double()


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), want, rtol=TOLERANCE[found.dtype], atol=TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("lengths", [None, (5, 0, 9)], ids=["all keys", "some keys"])
def test_full_attention(lengths: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 7, 8, dtype=dtype), torch.randn(3, 2, 9, 8, dtype=dtype), torch.randn(3, 2, 9, 6, dtype=dtype)
    for b, n in enumerate(lengths or ()):
        k[b, :, n:], v[b, :, n:] = math.nan, math.nan
    found = ours.full_attention(q, k, v, None if lengths is None else torch.tensor(lengths), 0.3)
    want = torch.zeros(3, 7, 4, 6, dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(7)).tolist():
        n = 9 if lengths is None else lengths[b]
        want[b, t, h] = one(q[b, h, t], k[b, h // 2, :n], v[b, h // 2, :n], 0.3)
    close(found, want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("bounds", [(0, 11), (0, 4, 4, 5, 11), (2, 6, 9), (0,)], ids=str)
def test_varlen_attention(bounds: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(11, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    kind = torch.int32 if causal else torch.int64
    found = ours.varlen_attention(q, k, v, torch.tensor(bounds, dtype=kind), 0.3, causal)
    want = torch.zeros(11, 4, 8, dtype=torch.float64)
    for first, end in itertools.pairwise(bounds):
        for t, h in torch.cartesian_prod(torch.arange(first, end), torch.arange(4)).tolist():
            seen = slice(first, t + 1 if causal else end)
            want[t, h] = one(q[t, h], k[seen, h // 2], v[seen, h // 2], 0.3)
    close(found, want)


@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize("tokens", [1, 6])
def test_sliding_windows(tokens: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_MASK_ROWS", 4)
    torch.manual_seed(2)
    starts = [0, 7, 10]
    q = torch.randn(3, 4, tokens, 8)
    k, v = torch.randn(2, 3, 2, tokens, 8)
    caches = torch.randn(2, 3, 2, 16, 8)
    found = ours.attention(q, k, v, caches[0], caches[1], torch.tensor(starts), 0.3, window)
    want = torch.zeros(3, tokens, 4, 8, dtype=torch.float64)
    for b, t, h in torch.cartesian_prod(torch.arange(3), torch.arange(tokens), torch.arange(4)).tolist():
        place = starts[b] + t
        seen = slice(max(0, place - window + 1) if window else 0, place + 1)
        want[b, t, h] = one(q[b, h, t], caches[0, b, h // 2, seen], caches[1, b, h // 2, seen], 0.3)
    close(found, want)


@pytest.mark.parametrize("window", [0, 3])
def test_paged_attention_is_attention_over_the_pages_in_order(window: int) -> None:
    torch.manual_seed(3)
    pages = torch.randn(2, 9, 4, 2, 8)
    table, lengths = torch.tensor([[3, 8, 0], [5, 1, 7]], dtype=torch.int32), torch.tensor([9, 4])
    q = torch.randn(2, 4, 3, 8)
    found = ours.paged_attention(q, pages[0], pages[1], table, lengths, 0.3, window)
    rows = [p[table.long()].flatten(1, 2).transpose(1, 2) for p in pages]
    torch.testing.assert_close(found, ours.attend(q, *rows, lengths - 3, 0.3, window), rtol=1e-5, atol=1e-6)


def test_operators_pass_pytorchs_own_checks() -> None:
    q, k, pages = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(4, 2, 2, 8)
    table, lengths = torch.tensor([[0, 1], [2, 3]]), torch.tensor([4, 3])
    for operator, arguments in (
        (ours.full_attention, (q, k, k, lengths, 0.5)),
        (ours.full_attention, (q, k, k, None, 0.5)),
        (ours.varlen_attention, (q[0].transpose(0, 1), q[1].transpose(0, 1), q[1].transpose(0, 1), torch.tensor([0, 2, 3]), 0.5)),
        (ours.paged_attention, (q, pages, pages, table, lengths, 0.5)),
        (ours.attend, (q, k, k, torch.tensor([2, 0]), 0.5, 2)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ours.full_attention(x, x[:, :3], x[:, :3], None, 1.0), "4 query heads cannot share 3"),
        (lambda x: ours.full_attention(x, x, x, torch.tensor([6, 0]), 1.0), "sees 6 of 5 keys"),
        (lambda x: ours.full_attention(x, x, x, torch.tensor([1]), 1.0), "int64 .2,. is needed"),
        (lambda x: ours.full_attention(x, x.double(), x, None, 1.0), "keys torch.float64"),
        (lambda x: ours.varlen_attention(x[0], x[0], x[0], torch.tensor([0, 3, 2]), 1.0), "not ascending within 0..4"),
        (lambda x: ours.varlen_attention(x[0], x[0], x[0], torch.tensor([0, 9]), 1.0), "not ascending within 0..4"),
        (lambda x: ours.varlen_attention(x[0], x[0], x[0], torch.tensor([0.0]), 1.0), "int32 or int64"),
        (lambda x: ours.attend(x, x, x, torch.tensor([0, 0]), 1.0, -1), "a window of -1"),
        (lambda x: ours.paged_attention(x, x, x, torch.tensor([[7], [0]]), torch.tensor([5, 5]), 1.0), "do not fit|a page that is none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(BindError, match=message):
        call(torch.randn(2, 4, 5, 8))
