"""The torch operators `torch.ops.flagtree.*` that captured graphs, launch lists and eager programs share.

Invariant: no kernel here reads a cache row beyond `start + S`, so whatever lies there (NaN included) never reaches a result.
Imports nothing but torch, our errors and the modules of further operators; importing it registers all of them, once a process.

    flagtree::attention   writes this call's keys and values into the cache in place, then attends over the cache
    flagtree::attend      the second half alone, for programs whose cache write is a kernel of their own
    flagtree::grouped_attention   one query token over all rows of k and v under a mask [B or 1, 1, 1, C] that the heads share; result
                                  [B, H, 1, D]: `scaled_dot_product_attention` without repeated key heads

Shapes: q [B, H, S, D]; k, v [B, HK, S, D] with HK dividing H (any strides); k_cache, v_cache [B, HK, C, D]; start int64 [B], the
number of tokens already in the cache of each sequence; result [B, S, H, D], contiguous, so that the head transpose costs nothing.
Query head h reads key head h // (H / HK).  Token t of sequence b sits at position start[b] + t and attends to positions 0..start[b] + t;
with a `window` above 0 to the last `window` of them only.  What has no cache (vision towers, paged caches) stands in attention_variants.py.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from flagtree.errors import BindError
from flagtree.runtime import attention_variants as attention_variants  # registers the operators without a cache of this form
from flagtree.runtime import collectives as collectives  # registers what ranks say to each other,
from flagtree.runtime import expert_products as expert_products  # the products of a mixture of experts,
from flagtree.runtime import experts as experts  # the whole of it,
from flagtree.runtime import quantised as quantised  # quantisation,
from flagtree.runtime import quantised_products as quantised_products  # products of what is quantised,
from flagtree.runtime import refusals as refusals  # and what refuses a bad index
from flagtree.runtime.attention_variants import grouped

ATTENTION = "flagtree::attention"
ATTEND = "flagtree::attend"

# rows of a chunked prefill that share one mask: bounds the mask to 512 x context elements
_MASK_ROWS = 512

_library = torch.library.Library("flagtree", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor start, float scale, int window=0) -> Tensor"
)
_library.define("attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor start, float scale, int window=0) -> Tensor")
_library.define("grouped_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale) -> Tensor")


def _starts(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: torch.Tensor) -> list[int]:
    """The start positions as integers; BindError where shapes disagree or the tokens do not fit into the cache."""
    batch, heads, tokens, width = q.shape
    if k_cache.ndim != 4 or v_cache.shape[:3] != k_cache.shape[:3] or k_cache.shape[0] != batch or k_cache.shape[3] != width:
        raise BindError(
            f"attention: caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)} do not fit queries {tuple(q.shape)}",
            hint="caches are [batch, key heads, context, head width]",
        )
    if heads % k_cache.shape[1]:
        raise BindError(f"attention: {heads} query heads cannot share {k_cache.shape[1]} key heads evenly")
    if start.shape != (batch,) or start.dtype != torch.int64:
        raise BindError(f"attention: start is {start.dtype} {tuple(start.shape)}, int64 ({batch},) is needed")
    starts = start.tolist()
    for sequence, first in enumerate(starts):
        if first < 0 or first + tokens > k_cache.shape[2]:
            raise BindError(
                f"attention: sequence {sequence} would use cache rows {first}..{first + tokens - 1} of {k_cache.shape[2]}",
                hint="allocate the cache for the longest sequence, prompt and answer together",
            )
    return starts


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: torch.Tensor, scale: float,
    window: int = 0,
) -> torch.Tensor:  # fmt: skip
    starts, tokens = _starts(q, k_cache, v_cache, start), q.shape[2]
    for cache, rows in ((k_cache, k), (v_cache, v)):
        if rows.shape != (*cache.shape[:2], tokens, cache.shape[3]) or rows.dtype != cache.dtype:
            raise BindError(
                f"attention: new rows {rows.dtype} {tuple(rows.shape)} do not fit the cache {cache.dtype} {tuple(cache.shape)}",
                why=f"{tokens} tokens a sequence are written",
            )
        for sequence, first in _equal_starts(starts):
            cache[sequence, :, first : first + tokens].copy_(rows[sequence])
    return _attend_at(q, k_cache, v_cache, starts, scale, window)


def _attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    return _attend_at(q, k_cache, v_cache, _starts(q, k_cache, v_cache, start), scale, window)


def _equal_starts(starts: list[int]) -> list[tuple[slice, int]]:
    """Runs of neighbouring sequences with one start: each is one call, and no call reads rows that another sequence lacks."""
    runs: list[tuple[slice, int]] = []
    for b, first in enumerate(starts):
        if runs and runs[-1][1] == first:
            runs[-1] = (slice(runs[-1][0].start, b + 1), first)
        else:
            runs.append((slice(b, b + 1), first))
    return runs


def _attend_at(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, starts: list[int], scale: float, window: int
) -> torch.Tensor:
    if window < 0:
        raise BindError(f"attention: a window of {window} positions", hint="0 for all positions")
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v_cache.shape[3])
    if not out.numel():
        return out
    for run, first in _equal_starts(starts):
        end = first + tokens
        seen_from = max(0, end - window) if window and tokens == 1 else 0
        keys, values = k_cache[run, :, seen_from:end], v_cache[run, :, seen_from:end]
        if tokens == 1:
            _one_token(q[run], keys, values, scale, out[run])
        elif first == 0 and not 0 < window < end:
            grouped(q[run], keys, values, None, scale, out[run], causal=True)
        else:
            for row in range(0, tokens, _MASK_ROWS):
                rows = slice(row, min(row + _MASK_ROWS, tokens))
                low, seen = max(0, first + row - window + 1) if window else 0, first + rows.stop
                place, row_place = torch.arange(low, seen, device=q.device), torch.arange(first + row, seen, device=q.device)[:, None]
                mask = place <= row_place
                if window:
                    mask &= place > row_place - window
                grouped(q[run, :, rows], keys[:, :, low:seen], values[:, :, low:seen], mask, scale, out[run, rows])
    return out


def _one_token(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Decode: the query heads of a group become the query rows of one head, so K and V are read once and no mask is needed."""
    batch, heads, _, width = q.shape
    group = q.reshape(batch, keys.shape[1], heads // keys.shape[1], width)
    found = scaled_dot_product_attention(group, keys, values, scale=scale)
    out.copy_(found.reshape(batch, 1, heads, values.shape[3]))


def _one_token_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    batch, heads, tokens, width = q.shape
    key_heads = k.shape[1]
    if tokens != 1 or heads % key_heads:
        raise BindError(f"grouped_attention: {heads} query heads of {tokens} tokens over {key_heads} key heads", hint="one token is taken")
    group = q.reshape(batch, key_heads, heads // key_heads, width)
    found = scaled_dot_product_attention(group, k, v, attn_mask=mask, scale=scale)
    return found.reshape(batch, heads, 1, v.shape[3])


def _one_token_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], 1, v.shape[3])


def _attention_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: torch.Tensor, scale: float,
    window: int = 0,
) -> torch.Tensor:  # fmt: skip
    return _attend_shape(q, k_cache, v_cache, start, scale)


def _attend_shape(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_cache.shape[3])


# CompositeExplicitAutograd: built from ATen calls, so it serves every device; on an accelerator reading `start` synchronises once
_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attend", _attend, "CompositeExplicitAutograd")
_library.impl("grouped_attention", _one_token_masked, "CompositeExplicitAutograd")
torch.library.register_fake("flagtree::grouped_attention", _one_token_shape, lib=_library)
torch.library.register_fake(ATTENTION, _attention_shape, lib=_library)
torch.library.register_fake(ATTEND, _attend_shape, lib=_library)
