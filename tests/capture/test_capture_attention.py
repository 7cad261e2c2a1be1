"""The adapter between transformers' attention hook and the operator: layer, cache and scale reach it, anything else is refused."""

from __future__ import annotations

import pytest
import torch

from flagtree.capture.attention import ATTENTION_NAME, cached_attention, register_attention
from flagtree.capture.cache import ExplicitCache
from flagtree.errors import CaptureError


def make() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, ExplicitCache]:
    torch.manual_seed(1)
    module = torch.nn.Module()
    module.layer_idx, module.is_causal = 1, True
    q, k, v = (torch.randn(2, heads, 3, 8) for heads in (4, 2, 2))
    cache = ExplicitCache([torch.zeros(2, 2, 6, 8) for _ in range(2)], [torch.zeros(2, 2, 6, 8) for _ in range(2)], torch.tensor([0, 2]))
    return module, q, k, v, cache


def test_the_layers_own_cache_is_written_and_read() -> None:
    module, q, k, v, cache = make()
    assert cache.update(k, v, 1) == (k, v)
    found, weights = cached_attention(module, q, k, v, None, scaling=0.5, dropout=0.0, position_ids=torch.zeros(1), flagtree_cache=cache)
    keys, values = torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8)
    assert weights is None
    assert torch.equal(found, torch.ops.flagtree.attention(q, k, v, keys, values, cache.start, 0.5))
    assert torch.equal(cache.keys[1], keys)
    assert torch.equal(cache.values[1], values)
    assert not cache.keys[0].any()


def test_the_usual_scale_is_taken_where_none_is_given() -> None:
    module, q, k, v, cache = make()
    without, _ = cached_attention(module, q, k, v, None, flagtree_cache=cache)
    given, _ = cached_attention(module, q, k, v, None, scaling=8**-0.5, flagtree_cache=cache)
    assert torch.equal(without, given)


def test_a_sliding_window_reaches_the_operator() -> None:
    module, q, k, v, cache = make()
    found, _ = cached_attention(module, q, k, v, None, scaling=0.5, flagtree_cache=cache, sliding_window=2)
    caches = torch.zeros(2, 2, 2, 6, 8)
    assert torch.equal(found, torch.ops.flagtree.attention(q, k, v, *caches, cache.start, 0.5, 2))
    assert not torch.equal(found, torch.ops.flagtree.attention(q, k, v, *caches, cache.start, 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 30.0}, "'softcap' = 30.0"),
        ({"s_aux": 1.0}, "'s_aux'"),
        ({"dropout": 0.1}, "'dropout' = 0.1"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_what_the_operator_does_not_compute_is_refused(options: dict[str, object], message: str) -> None:
    module, q, k, v, cache = make()
    with pytest.raises(CaptureError, match=message):
        cached_attention(module, q, k, v, None, flagtree_cache=cache, **options)
    assert not cache.keys[1].any()


def test_a_mask_and_a_bidirectional_module_are_refused() -> None:
    module, q, k, v, cache = make()
    with pytest.raises(CaptureError, match=r"attention mask[\s\S]*layer 1"):
        cached_attention(module, q, k, v, torch.zeros(2, 1, 3, 6), flagtree_cache=cache)
    module.is_causal = False
    with pytest.raises(CaptureError, match="not causal"):
        cached_attention(module, q, k, v, None, flagtree_cache=cache)


def test_a_cache_of_other_heads_or_none_at_all_is_refused() -> None:
    module, q, k, v, cache = make()
    with pytest.raises(CaptureError, match="does not pass options on"):
        cached_attention(module, q, k, v, None)
    with pytest.raises(CaptureError, match="4 key heads of 8, its description 2 of 8"):
        cached_attention(module, q, q, q, None, flagtree_cache=cache)


def test_transformers_knows_the_name_and_makes_no_mask_for_it() -> None:
    assert register_attention() == ATTENTION_NAME
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] is cached_attention
    assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
