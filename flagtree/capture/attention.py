"""`torch.ops.flagtree.attention` as an attention implementation of transformers, for models built by `capture/model.py`.

Invariant: what the operator does not compute (soft caps, sinks, masks, dropout) is refused, never dropped.
transformers makes no mask for an attention without a mask function, so a captured graph holds none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flagtree.capture.cache import ExplicitCache
from flagtree.errors import CaptureError
from flagtree.runtime import operators as operators  # registers torch.ops.flagtree.*

ATTENTION_NAME = "flagtree"
PACKED_NAME = "flagtree_flash"  # transformers takes the path of packed sequences where the name says flash

# what transformers passes along that says nothing about the numbers
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal"})


def register_attention() -> str:
    """Make the operator known to transformers; returns the name to put into `config._attn_implementation`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, cached_attention)
    return ATTENTION_NAME


def take_packed_attention(tower: Any) -> None:
    """Give a vision tower of transformers the operator for packed sequences; its blocks then know their number."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PACKED_NAME, packed_attention)
    tower.config._attn_implementation_internal = PACKED_NAME  # the constructor takes none but names that it knows
    for number, block in enumerate(tower.blocks):
        block.attn.layer_idx = number


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flagtree_bounds: Sequence[torch.Tensor],
    scaling: float,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """One attention of a tower over sequences packed into one: all [1, H, T, D], `flagtree_bounds` one a block; returns [T, H, D]."""
    if attention_mask is not None or options.get("is_causal") is not False:
        raise CaptureError("the tower's attention is masked", where=type(module).__name__)
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    return torch.ops.flagtree.varlen_attention(*rows, flagtree_bounds[int(module.layer_idx)], float(scaling)), None  # type: ignore[arg-type]


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flagtree_cache: ExplicitCache | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """One attention call of transformers: query [B, H, S, D], key and value [B, HK, S, D]; returns [B, S, H, D].

    Raises CaptureError for anything beyond causal attention over the cache, or over its last `sliding_window` positions.
    """
    where = f"layer {module.layer_idx}, {type(module).__name__}"
    if attention_mask is not None:
        raise CaptureError("the model passes an attention mask", where=where, hint="only causal decoders without extra masks are captured")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise CaptureError("the model's attention is not causal", where=where)
    if flagtree_cache is None:
        raise CaptureError("the model class does not pass options on to its attention", where=where)
    for name, option in options.items():
        if name not in _HARMLESS and option is not None and option is not False and not (name == "dropout" and option == 0.0):
            raise CaptureError(
                f"the attention option '{name}' = {option!r} is not supported",
                where=where,
                why="flagtree::attention computes causal attention over the cache and sliding windows of it",
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = flagtree_cache.keys[layer], flagtree_cache.values[layer]
    if (key.shape[1], key.shape[3]) != (keys.shape[1], keys.shape[3]):
        raise CaptureError(
            f"the model has {key.shape[1]} key heads of {key.shape[3]}, its description {keys.shape[1]} of {keys.shape[3]}", where=where
        )
    window = (int(sliding_window),) if sliding_window else ()  # the default is left out, so that graphs without windows stay as they are
    return torch.ops.flagtree.attention(query, key, value, keys, values, flagtree_cache.start, scale, *window), None
