"""Weights of a reference and of its public checkpoint: the same names, but for tensors that one side keeps joined.

Invariant: `to_checkpoint` and `from_checkpoint` are inverse for every weight of the model; no other tensor is touched.
A map is ordered rules (our name's end, the checkpoint's ends, the dimension along which those are joined into ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flagtree.errors import BindError


@dataclass(frozen=True, slots=True)
class Joined:
    """Our weight whose name ends in `ours` holds the checkpoint's `parts`, equal in size, one after the other along `dim`."""

    ours: str
    parts: tuple[str, ...]
    dim: int


def to_checkpoint(weights: Mapping[str, torch.Tensor], rules: tuple[Joined, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with these weights."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        rule = next((rule for rule in rules if name.endswith(rule.ours)), None)
        if rule is None:
            out[name] = tensor
            continue
        stem = name.removesuffix(rule.ours)
        for part, piece in zip(rule.parts, tensor.chunk(len(rule.parts), rule.dim), strict=True):
            out[stem + part] = piece.contiguous()
    return out


def from_checkpoint(tensors: Mapping[str, torch.Tensor], rules: tuple[Joined, ...]) -> dict[str, torch.Tensor]:
    """The weights of the model from a checkpoint's tensors.  BindError where the other part of a joined weight is missing."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        rule = next((rule for rule in rules if name.endswith(rule.parts)), None)
        if rule is None:
            out[name] = tensor
            continue
        stem = name.removesuffix(next(part for part in rule.parts if name.endswith(part)))
        if missing := [part for part in rule.parts if stem + part not in tensors]:
            raise BindError(f"the checkpoint has '{name}' but no '{stem + missing[0]}'")
        if name.endswith(rule.parts[0]):
            out[stem + rule.ours] = torch.cat([tensors[stem + part] for part in rule.parts], rule.dim)
    return out
