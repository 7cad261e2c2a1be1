"""One kernel at chosen points of its parallel axes: what it stores there, without computing or holding anything else.

The same meaning as `ir/walk.py` has for all points, so tensors may be of a size that only their touched elements exist.
Read by `check`, which executes a few blocks of a grid at the upper end of a symbol's range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flagtree.errors import IRError
from flagtree.ir.evaluate import Tensor
from flagtree.ir.index import Index
from flagtree.ir.program import Kernel, Program, Store
from flagtree.ir.walk import Walk

Reading = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored into one buffer: element offsets from its element 0, and the values there, both one-dimensional."""

    offsets: Tensor
    values: Tensor


def stores_at(
    program: Program, kernel: Kernel, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], points: Mapping[str, Tensor],
    precise: bool = False, reading: Reading | None = None,
) -> dict[str, Stored]:  # fmt: skip
    """What `kernel` stores at `points`: for each parallel axis an int64 tensor [P] of its coordinates; reduced axes run in full.

    `tensors` are read only, stores included.  `precise` as in `run_kernel`: the values are float64 and nothing is rounded.  `reading`
    is told (buffer, element offsets) before each load.  Raises IRError as `run_kernel`, and for a store that accumulates: its
    result depends on points that are not asked for.
    """
    walk = Sampled(kernel, tensors, symbols, precise, points, reading)
    walk.run(program.name)
    return {name: Stored(*(torch.cat(parts) for parts in zip(*found, strict=True))) for name, found in walk.found.items()}


class Sampled(Walk):
    """All parallel axes lie along the first dimension of every value, each reduced axis along its own."""

    def __init__(self, kernel: Kernel, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], precise: bool,
                 points: Mapping[str, Tensor], reading: Reading | None) -> None:  # fmt: skip
        super().__init__(kernel, tensors, symbols, precise)
        reduced = [a for a in kernel.axes if a.kind == "reduce"]
        self.points, self.reading = points, reading
        self.place = {a.name: 0 for a in kernel.axes if a.kind != "reduce"} | {a.name: k for k, a in enumerate(reduced, 1)}
        count = len(next(iter(points.values()))) if points else 1
        self.extents = [count, *(a.extent.evaluate(symbols) for a in reduced)]
        self.found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in kernel.writes}

    def integer(self, name: str) -> Tensor | int:
        if name in self.points:
            return self.points[name].view([-1] + [1] * (len(self.extents) - 1))
        return super().integer(name)

    def affine(self, index: Sequence[Index], tensor: Tensor) -> Tensor | None:
        return None  # chosen points have no stride

    def gather(self, buffer: str, offsets: Tensor, mask: Tensor | None) -> Tensor:
        if self.reading is not None:
            self.reading(buffer, offsets.flatten() if mask is None else torch.broadcast_tensors(offsets, mask)[0][_like(mask, offsets)])
        return super().gather(buffer, offsets, mask)

    def store(self, op: Store) -> None:
        if op.mode != "set":
            raise IRError("a store that accumulates has no value at chosen points", why="every point of the domain adds to it")
        mask = None if op.access.mask is None else self.values[op.access.mask]
        value = self.values[op.value]
        self.found[op.access.buffer].append(self.placed(op, mask, value))


def _like(mask: Tensor, offsets: Tensor) -> Tensor:
    return torch.broadcast_tensors(mask, offsets)[0]
