"""The attention operators without a cache of fixed rows: over all keys, over packed sequences, over a paged cache.

Invariant: rows that no mask admits are never read, so whatever lies there (NaN included) never reaches a result; a query that sees
nothing gives zeros.  Imports nothing but torch and our errors; runtime/operators.py imports it, so that both register together.

    flagtree::full_attention    every query sees all keys, or the first lengths[b] of them: vision towers, padded batches, cross attention
    flagtree::varlen_attention  sequences packed one after the other: rows bounds[n]..bounds[n+1]-1 see each other only (causal: those
                                before them); windowed towers pass the bounds of their windows
    flagtree::paged_attention   the last S tokens of each sequence over a cache in pages, as servers keep it; always an extern

full:    q [B, H, S, D]; k [B, HK, L, D]; v [B, HK, L, E]; lengths int64 [B] or none, each 0..L; result [B, S, H, E]
varlen:  q [T, H, D]; k [T, HK, D]; v [T, HK, E]; bounds int32 or int64 [N + 1], not decreasing, within 0..T; result [T, H, E]; rows outside
         of every sequence are zero
paged:   q [B, H, S, D]; k_pages [P, R, HK, D]; v_pages [P, R, HK, E]; table int32 or int64 [B, M], page of each R rows of a sequence;
         lengths int64 [B], tokens in the cache, the S of this call included; result [B, S, H, E]
Strides are free; results are contiguous.  Query head h reads key head h // (H / HK).  BindError for operands that do not fit.
"""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention

from flagtree.errors import BindError

Tensor = torch.Tensor

_library = torch.library.Library("flagtree", "FRAGMENT")
_library.define("full_attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale) -> Tensor")
_library.define("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, float scale, bool causal=False) -> Tensor")
_library.define(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor lengths, float scale, int window=0) -> Tensor"
)


def grouped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, out: Tensor, causal: bool = False) -> None:
    """softmax(q k^T scale) v into out [B, S, H, E]: (batch, key head) becomes the batch and the group the heads, over which K and V
    are broadcast with stride 0, never repeated.  `mask` [S, L] is true where a row sees a position."""
    batch, heads, tokens, width = q.shape
    key_heads = keys.shape[1]
    group = heads // key_heads
    queries = q.reshape(batch, key_heads, group, tokens, width).flatten(0, 1)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for x in (keys, values))
    found = scaled_dot_product_attention(queries, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    out.copy_(found.unflatten(0, (batch, key_heads)).permute(0, 3, 1, 2, 4).reshape(out.shape))


def _fits(name: str, q: Tensor, k: Tensor, v: Tensor, heads: int, key_heads: int) -> None:
    """BindError where queries, keys and values of one call do not go together."""
    if k.ndim != q.ndim or v.shape[:-1] != k.shape[:-1] or k.shape[-1] != q.shape[-1]:
        raise BindError(f"{name}: keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit queries {tuple(q.shape)}")
    if not key_heads or heads % key_heads:
        raise BindError(f"{name}: {heads} query heads cannot share {key_heads} key heads evenly")
    if not q.dtype == k.dtype == v.dtype:
        raise BindError(f"{name}: queries are {q.dtype}, keys {k.dtype}, values {v.dtype}")


def _full(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    _fits("full_attention", q, k, v, q.shape[1], k.shape[1])
    if k.shape[0] != q.shape[0]:
        raise BindError(f"full_attention: {k.shape[0]} sequences of keys for {q.shape[0]} of queries")
    out = _full_shape(q, k, v, lengths, scale).zero_()
    if lengths is None:
        if out.numel() and k.shape[2]:
            grouped(q, k, v, None, scale, out)
        return out
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int64:
        raise BindError(f"full_attention: lengths is {lengths.dtype} {tuple(lengths.shape)}, int64 ({q.shape[0]},) is needed")
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= k.shape[2]:
            raise BindError(f"full_attention: sequence {b} sees {length} of {k.shape[2]} keys")
        if length and out[b].numel():
            grouped(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], None, scale, out[b : b + 1])
    return out


def _full_shape(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, causal: bool = False) -> Tensor:
    _fits("varlen_attention", q, k, v, q.shape[1], k.shape[1])
    if q.ndim != 3 or k.shape[0] != q.shape[0]:
        raise BindError(f"varlen_attention: {tuple(k.shape)} keys for queries {tuple(q.shape)}", hint="both are [tokens, heads, width]")
    if bounds.ndim != 1 or bounds.dtype not in (torch.int32, torch.int64) or not len(bounds):
        raise BindError(f"varlen_attention: bounds is {bounds.dtype} {tuple(bounds.shape)}, int32 or int64 (sequences + 1,) is needed")
    edges = bounds.tolist()
    if edges[0] < 0 or edges[-1] > len(q) or any(a > b for a, b in itertools.pairwise(edges)):
        raise BindError(f"varlen_attention: bounds are not ascending within 0..{len(q)}", why=f"they are {_shown(edges)}")
    out = _varlen_shape(q, k, v, bounds, scale).zero_()
    for first, end in itertools.pairwise(edges):
        if first < end and out.numel():
            queries, keys, values = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
            grouped(queries, keys, values, None, scale, out[first:end][None], causal)
    return out


def _varlen_shape(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, causal: bool = False) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _shown(edges: list[int]) -> str:
    return str(edges) if len(edges) <= 8 else f"{', '.join(map(str, edges[:4]))}, … {', '.join(map(str, edges[-2:]))}"


def _paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, scale: float, window: int = 0
) -> Tensor:
    if k_pages.ndim != 4 or v_pages.shape[:3] != k_pages.shape[:3] or k_pages.shape[3] != q.shape[3] or q.shape[1] % k_pages.shape[2]:
        raise BindError(
            f"paged_attention: pages {tuple(k_pages.shape)} and {tuple(v_pages.shape)} do not fit queries {tuple(q.shape)}",
            hint="pages are [pages, rows, key heads, head width]",
        )
    if table.ndim != 2 or table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise BindError(f"paged_attention: a table {tuple(table.shape)} and lengths {tuple(lengths.shape)} for {q.shape[0]} sequences")
    if window < 0:
        raise BindError(f"paged_attention: a window of {window} positions", hint="0 for all positions")
    rows, tokens = k_pages.shape[1], q.shape[2]
    out = _paged_shape(q, k_pages, v_pages, table, lengths, scale)
    for b, length in enumerate(lengths.tolist()):
        room = table.shape[1] * rows
        if not tokens <= length <= room:
            raise BindError(f"paged_attention: sequence {b} has {length} tokens", why=f"{tokens} are new, its table holds {room}")
        pages = table[b, : -(-length // rows)]
        if int(pages.min()) < 0 or int(pages.max()) >= k_pages.shape[0]:
            raise BindError(f"paged_attention: sequence {b} names a page that is none of the {k_pages.shape[0]}")
        keys, values = (p[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for p in (k_pages, v_pages))
        place, row_place = torch.arange(length, device=q.device), torch.arange(length - tokens, length, device=q.device)[:, None]
        mask = (place <= row_place) & (place > row_place - (window or length))
        grouped(q[b : b + 1], keys, values, mask, scale, out[b : b + 1])
    return out


def _paged_shape(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, scale: float, window: int = 0
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_pages.shape[3])


# CompositeExplicitAutograd: built from ATen calls, so they serve every device; on an accelerator lengths and bounds are read once
for _name, _run, _shape in (("full", _full, _full_shape), ("varlen", _varlen, _varlen_shape), ("paged", _paged, _paged_shape)):
    _library.impl(f"{_name}_attention", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flagtree::{_name}_attention", _shape, lib=_library)
