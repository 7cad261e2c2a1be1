"""The weights of one rank, read from a published checkpoint: only the ranges that the bundle's manifest names for the rank.

Invariant: what is read lies inside the tensors of the checkpoint, and every weight has the size that the bundle says.  The map is made by
`capture/shares.py`; `load` and `Part.bind` take what this returns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from flagtree.artifact.bundle import Bundle
from flagtree.errors import BindError


class Checkpoint(Protocol):
    """Named tensors of which a range of one dimension can be read."""

    def read(self, name: str, dim: int, begin: int, end: int) -> torch.Tensor: ...


class Safetensors:
    """The `*.safetensors` files of a folder.  BindError for a folder without any, a tensor that none has and a range beyond its size."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BindError("the folder holds no checkpoint", where=str(folder), why="it has no *.safetensors file")
        self.folder = folder
        self._file_of = {name: file for file in (safe_open(path, "pt") for path in files) for name in list(file.keys())}

    def read(self, name: str, dim: int, begin: int, end: int) -> torch.Tensor:
        if name not in self._file_of:
            raise BindError(f"the checkpoint has no '{name}'", where=str(self.folder))
        found: Any = self._file_of[name].get_slice(name)
        shape = found.get_shape()
        if not 0 <= begin <= end <= (shape[dim] if dim < len(shape) else 0):
            raise BindError(f"'{name}' {shape} has no range {begin} to {end}", where=str(self.folder), why=f"along dimension {dim}")
        return found[tuple(slice(begin, end) if d == dim else slice(None) for d in range(len(shape)))]


def rank_weights(bundle: Bundle, names: Iterable[str], checkpoint: Checkpoint, rank: int) -> dict[str, torch.Tensor]:
    """The weights `names` of the bundle as rank `rank` has them, contiguous.

    BindError: the bundle is for one process, has no such rank, or does not say what one of the weights is.
    """
    ranks: Mapping[str, Any] = bundle.manifest.ranks
    count = ranks.get("count", 1)
    if not ranks or not 0 <= rank < count:
        why = f"it is for {count} rank{'s' if count != 1 else ''}"
        raise BindError(f"the bundle has no part for rank {rank}", where=str(bundle.path), why=why, hint="flagtree compile MODEL --tp N")
    known = [(re.compile(re.escape(name).replace(r"\{layer\}", r"(\d+)")), entry) for name, entry in ranks["weights"].items()]
    return {name: _weight(name, known, checkpoint, rank) for name in names}


def _weight(name: str, known: Iterable[tuple[re.Pattern[str], Mapping[str, Any]]], checkpoint: Checkpoint, rank: int) -> torch.Tensor:
    found, entry = next(((found, entry) for pattern, entry in known if (found := pattern.fullmatch(name))), (None, {}))
    if found is None:
        raise BindError(f"the bundle does not say what of '{name}' a rank loads")
    layer = found[1] if found.re.groups else ""
    pieces = [(source.replace("{layer}", layer), begin, end) for source, begin, end in entry["ranks"][rank]]
    if "experts" not in entry:
        return _joined(pieces, entry, checkpoint)
    each = range(entry["experts"])
    return torch.stack([_joined([(s.replace("{expert}", str(e)), b, c) for s, b, c in pieces], entry, checkpoint) for e in each])


def _joined(pieces: Iterable[tuple[str, int, int]], entry: Mapping[str, Any], checkpoint: Checkpoint) -> torch.Tensor:
    dim, own = entry["dim"], entry["own"]
    parts = [checkpoint.read(source, dim, begin, end) for source, begin, end in pieces]
    if (missing := own - sum(part.shape[dim] for part in parts)) > 0:
        parts.append(parts[0].new_zeros([missing if d == dim else size for d, size in enumerate(parts[0].shape)]))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()
