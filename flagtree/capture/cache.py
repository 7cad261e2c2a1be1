"""The key/value cache as transformers sees it during capture: plain tensors that the caller owns, one pair a layer.

Invariant: `update` hands back what it is given and writes nothing; `flagtree::attention` writes the rows, in place.
Used by `capture/model.py` in the place of transformers' Cache, and read by `capture/attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class ExplicitCache:
    """Keys and values of every layer, each [batch, key heads, context, head width]; `start` int64 [batch] rows are filled."""

    is_compileable = True

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], start: torch.Tensor) -> None:
        self.keys, self.values, self.start = tuple(keys), tuple(values), start

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' hook between the projections and the attention: nothing happens here."""
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers asks for it only to derive positions and masks; we pass positions, and there is no mask."""
        return 0
