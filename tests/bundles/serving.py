"""Serving from a loaded bundle as a small engine does: a prefill, then one decode step a token.  Needs torch and the loader alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from flagtree.runtime.load import LoadedBundle

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def serve(
    bundle: LoadedBundle,
    weights: Mapping[str, torch.Tensor],
    ids: torch.Tensor,
    lengths: torch.Tensor,
    following: torch.Tensor,
    more: Callable[[int], Mapping[str, torch.Tensor]] = lambda step: {},
) -> torch.Tensor:
    """Logits [1 + steps, B, V].  The caches start as NaN: a row that no token has written would show in every logit.

    `more(step)`: further inputs of the prefill (step 0) and of each decode step.
    """
    prefill, decode = bundle.parts["prefill"].bind(weights), bundle.parts["decode"].bind(weights)
    rows = ids.shape[1] + following.shape[1] + 3
    caches = {}
    for name, declared in bundle.parts["prefill"].states.items():
        found = re.fullmatch(r"(\w+)\[batch, (\d+), context, (\d+)\]", declared)
        assert found is not None
        dtype, heads, width = found.groups()
        caches[name] = torch.full((len(ids), int(heads), rows, int(width)), float("nan"), dtype=DTYPES[dtype])
    (logits,) = prefill({"ids": ids, "start": torch.zeros_like(lengths), "last": lengths - 1, **more(0), **caches}).values()
    out = [logits]
    for step in range(following.shape[1]):
        given = {"ids": following[:, step : step + 1].contiguous(), "start": lengths + step, **more(step + 1)}
        (logits,) = decode({**given, **caches}).values()
        out.append(logits)
    return torch.stack(out)
