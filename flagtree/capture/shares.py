"""What the ranks of tensor parallelism have of each weight, and the map by which a rank loads it from the published checkpoint.

Invariant: the ranges of a weight's ranks cover it; what several ranks have is the same.  `capture/ranks.py` makes shares, the manifest
holds the map, `runtime/shares.py` reads it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flagtree.capture.architectures import architecture
from flagtree.errors import CaptureError
from flagtree.runtime.collectives import TENSOR_PARALLEL

if TYPE_CHECKING:
    from flagtree.capture.captured import CapturedModel
    from flagtree.capture.model_spec import ModelSpec

_VOCABULARY_STEP = 64  # vLLM pads a divided vocabulary to a multiple of it (DEFAULT_VOCAB_PADDING_SIZE)
EXPERT = "{expert}"
LAYER = "{layer}"

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Share:
    """What the ranks have of one weight: of dimension `dim`, `ranges` [begin, end) side by side for each rank, then zeros up to `own`."""

    dim: int
    own: int
    ranges: tuple[Ranges, ...]


def divided(size: int, ranks: int, what: str, dim: int = 0, pieces: int = 1) -> Share:
    """Each of `pieces` equal parts (query, key and value; gate and up) divided evenly.  CaptureError where it does not divide."""
    piece = size // pieces
    if piece % ranks:
        raise CaptureError(f"{what} cannot be divided over {ranks} ranks", why=f"{piece} is no multiple of {ranks}")
    step = piece // ranks
    firsts = [[p * piece + r * step for p in range(pieces)] for r in range(ranks)]
    return Share(dim, step * pieces, tuple(tuple((first, first + step) for first in each) for each in firsts))


def by_key_heads(size: int, heads: int, ranks: int, what: str) -> Share:
    """Whole key heads: divided evenly, or one a rank, the same one on neighbours."""
    if heads >= ranks:
        return divided(size, ranks, what)
    width = size // heads
    return Share(0, width, tuple((((r * heads // ranks) * width, (r * heads // ranks + 1) * width),) for r in range(ranks)))


def padded(size: int, ranks: int) -> Share:
    """Rows of a vocabulary, padded so that every rank has as many."""
    step = math.lcm(_VOCABULARY_STEP, ranks)
    own = math.ceil(size / step) * step // ranks
    return Share(0, own, tuple(((min(r * own, size), min((r + 1) * own, size)),) for r in range(ranks)))


def on_the_first(size: int, ranks: int) -> Share:
    """What is added once: the first rank has it, the others zeros."""
    return Share(0, size, (((0, size),), *((((0, 0),),) * (ranks - 1))))


# -- for whoever loads -----------------------------------------------------------------------------------------------------
def rank_map(spec: ModelSpec, parts: Iterable[CapturedModel]) -> dict[str, Any]:
    """JSON for the manifest; empty for a model that is not divided.

    `weights` maps the name of each weight of the bundle, `{layer}` in the place of a layer's number, to `dim`, `own` and `ranks`: for each
    rank the tensors of the published checkpoint with begin and end along `dim`, which stand side by side and are padded with zeros to
    `own`.  With `experts` a name holds `{expert}`, and the tensors of that many experts are stacked.
    """
    if spec.capture.ranks == 1:
        return {}
    weights: dict[str, Any] = {}
    for captured in parts:
        for p in (p for p in captured.placeholders if p.role == "weight"):
            name = captured.at_layer(p.qualified, LAYER)
            if name not in weights:
                share = captured.shares.get(p.qualified)
                weights[name] = _loading(spec, name, share, p.value.shape)
    return {"count": spec.capture.ranks, "group": TENSOR_PARALLEL, "weights": weights}


def _loading(spec: ModelSpec, name: str, share: Share | None, shape: Sequence[int]) -> dict[str, Any]:
    """One weight of the map; `shape` is a rank's."""
    parts, joined = _published(spec, name)
    if share is None:
        share = Share(joined, int(shape[joined]), (((0, int(shape[joined])),),) * spec.capture.ranks)
    assert len(parts) == 1 or share.dim == joined, "only whole weights and the joined dimension are divided"
    size = max(end for ranges in share.ranges for _, end in ranges) // len(parts)
    stacked = EXPERT in parts[0]
    ranks = [[piece for begin, end in ranges for piece in _pieces(parts, size, begin, end)] for ranges in share.ranges]
    found: dict[str, Any] = {"dim": share.dim - stacked, "own": share.own, "ranks": ranks}
    return {**found, "experts": int(shape[0])} if stacked else found


def _pieces(parts: Sequence[str], size: int, begin: int, end: int) -> list[list[Any]]:
    """A range of a weight as ranges of the tensors of `size` that it is joined of; an empty one is one of the last of them."""
    if len(parts) == 1 or begin == end:
        return [[parts[-1], begin - (len(parts) - 1) * size, end - (len(parts) - 1) * size]]
    cut = [(part, max(begin - k * size, 0), min(end - k * size, size)) for k, part in enumerate(parts)]
    return [[part, low, high] for part, low, high in cut if low < high]


def _published(spec: ModelSpec, name: str) -> tuple[tuple[str, ...], int]:
    """The tensors of the checkpoint that a weight is made of, and the dimension along which they are joined."""
    known = architecture(spec.architecture)
    rules = list(known.published)
    if known.reference is not None:
        module = importlib.import_module(f"flagtree.capture.references.{known.reference}")
        rules += [(rule.ours, rule.parts, rule.dim) for rule in module.CHECKPOINT]
    for ours, parts, dim in rules:
        if name.endswith(ours):
            return tuple(name.removesuffix(ours) + part for part in parts), dim
    return (name,), 0
