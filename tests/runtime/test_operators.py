"""`torch.ops.flagtree.attention` and `attend` against the definition of attention, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.errors import BindError
from flagtree.runtime import operators

attention, attend = torch.ops.flagtree.attention, torch.ops.flagtree.attend
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def plain(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: list[int], scale: float) -> torch.Tensor:
    """Token by token: softmax(q . k * scale) . v over the positions up to the token's own; [B, S, H, D] in float64."""
    batch, heads, tokens, _ = q.shape
    group = heads // keys.shape[1]
    out = torch.empty(batch, tokens, heads, values.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                seen = starts[b] + t + 1
                scores = keys[b, h // group, :seen].double() @ q[b, h, t].double() * scale
                out[b, t, h] = scores.softmax(0) @ values[b, h // group, :seen].double()
    return out


def make(dtype: torch.dtype, starts: list[int], tokens: int, heads: int, key_heads: int, context: int, width: int = 16, seed: int = 0):
    """Queries and new rows as transposed views (as a model makes them), caches filled up to start and NaN beyond."""
    torch.manual_seed(seed)
    batch = len(starts)
    q = torch.randn(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(batch, tokens, key_heads, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    caches = torch.full((2, batch, key_heads, context, width), math.nan, dtype=dtype)
    for b, first in enumerate(starts):
        caches[:, b, :, :first] = torch.randn(2, key_heads, first, width, dtype=dtype)
    return q, k, v, caches[0], caches[1], torch.tensor(starts)


CASES = {
    "prefill": ([0, 0, 0], 7),
    "one token into an empty cache": ([0], 1),
    "decode, equal starts": ([5, 5], 1),
    "decode, different starts": ([0, 12, 3, 3], 1),
    "chunk after a prompt": ([6], 5),
    "chunks, different starts": ([0, 6, 6, 11], 4),
    "to the last row": ([9], 7),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_definition(case: str, heads: int, key_heads: int, dtype: torch.dtype) -> None:
    starts, tokens = CASES[case]
    q, k, v, keys, values, start = make(dtype, starts, tokens, heads, key_heads, context=16)
    before = keys.clone(), values.clone()
    found = attention(q, k, v, keys, values, start, 0.3)
    assert found.shape == (len(starts), tokens, heads, 16)
    assert found.is_contiguous()
    assert found.dtype == dtype
    for cache, old, rows in zip((keys, values), before, (k, v), strict=True):
        for b, first in enumerate(starts):  # the new rows, and nothing else
            old[b, :, first : first + tokens] = rows[b]
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.double(), plain(q, keys, values, starts, 0.3), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(attend(q, keys, values, start, 0.3), found)


def test_chunks_give_what_the_whole_prompt_gives_across_mask_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_MASK_ROWS", 4)
    q, k, v, keys, values, start = make(torch.float32, [0, 0], 19, 4, 2, context=19)
    whole = attention(q, k, v, keys, values, start, 0.25)
    keys, values = torch.full_like(keys, math.nan), torch.full_like(values, math.nan)
    parts = []
    for first, last in ((0, 3), (3, 4), (4, 19)):
        new = slice(first, last)
        parts.append(attention(q[:, :, new], k[:, :, new], v[:, :, new], keys, values, start + first, 0.25))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


def test_keys_and_values_are_not_repeated_for_grouped_heads() -> None:
    """A cache far larger than everything else: the memory that one decode step asks for stays far below one copy of it."""
    q, k, v, keys, values, start = make(torch.float32, [1999], 1, 8, 2, context=2000, width=64)
    for tokens_q, tokens_k, tokens_v, first in ((q, k, v, start), *[(*make(torch.float32, [0], 1999, 8, 2, 2000, 64)[:3], start * 0)]):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profile:
            attention(tokens_q, tokens_k, tokens_v, keys, values, first, 0.125)
        copied = [e for e in profile.events() if e.name in ("aten::repeat_interleave", "aten::clone", "aten::contiguous")]
        assert not [e.input_shapes for e in copied if e.input_shapes and math.prod(e.input_shapes[0]) >= keys.numel() // 2]


def test_operators_pass_pytorchs_own_checks() -> None:
    arguments = make(torch.float32, [0, 2], 3, 4, 2, context=8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention.default, (*arguments, 0.5), test_utils=checks)
    q, filled = arguments[0], torch.randn(2, 2, 2, 8, 16)
    torch.library.opcheck(attend.default, (q, filled[0], filled[1], arguments[5], 0.5), test_utils=checks)


def test_fake_shapes_stay_symbolic() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = []
    for x in make(torch.float32, [0, 2], 3, 4, 2, context=8):
        kinds = [DimDynamic.DYNAMIC if d in (0, 2) else DimDynamic.STATIC for d in range(x.ndim)]
        fake.append(mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds)))
    with mode:
        found = attention(*fake, 0.5)
    assert [isinstance(size, torch.SymInt) for size in found.shape] == [True, True, False, False]
    assert not mode.shape_env.guards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": torch.tensor([6])}, "rows 6..8 of 8"),
        ({"start": torch.tensor([-1])}, "rows -1..1"),
        ({"start": torch.tensor([0], dtype=torch.int32)}, "int64"),
        ({"start": torch.tensor([0, 0])}, "int64 .1,. is needed"),
        ({"k": torch.zeros(1, 2, 2, 16)}, "3 tokens a sequence"),
        ({"v": torch.zeros(1, 2, 3, 16, dtype=torch.float16)}, "do not fit the cache"),
        ({"q": torch.zeros(1, 3, 3, 16)}, "3 query heads cannot share 2"),
        ({"q": torch.zeros(1, 4, 3, 8)}, "do not fit queries"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_cache_alone(change: dict[str, torch.Tensor], message: str) -> None:
    names = ("q", "k", "v", "k_cache", "v_cache", "start")
    arguments = dict(zip(names, make(torch.float32, [0], 3, 4, 2, context=8), strict=True)) | change
    with pytest.raises(BindError, match=message):
        attention(*arguments.values(), 0.5)
    if "v" not in change:
        assert torch.cat((arguments["k_cache"], arguments["v_cache"])).isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("masked", [True, False])
def test_grouped_attention_is_attention_with_repeated_heads(masked: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    q, (k, v) = torch.randn(3, 6, 1, 16, dtype=dtype), torch.randn(2, 3, 2, 9, 16, dtype=dtype)
    mask = torch.rand(3, 1, 1, 9) < 0.6 if masked else None
    if mask is not None:
        mask[..., 0] = True
    found = torch.ops.flagtree.grouped_attention(q, k, v, mask, 0.3)
    scores = torch.einsum("bgqd,bgcd->bgqc", q.double().view(3, 2, 3, 16), k.double()) * 0.3
    weights = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    want = (weights @ v.double()).view(3, 6, 1, 16)
    torch.testing.assert_close(found.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    with pytest.raises(BindError, match="one token"):
        torch.ops.flagtree.grouped_attention(q.expand(-1, -1, 2, -1), k, v, None, None)
