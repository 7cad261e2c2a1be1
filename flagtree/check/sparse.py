"""Chosen points of a kernel's domain at true sizes: inputs only where they read, and what they must store and nothing else.

Invariant: a point's inputs are a function of position and seed, so any choice of points sees the same tensors.  Shared by the runs at
the upper end of symbols' ranges: check/upper.py in the emulator, check/upper_native.py on this CPU.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flagtree.check.enclosure import Enclosed, enclose
from flagtree.check.execute import different
from flagtree.check.inputs import unwritten
from flagtree.check.points import kernel_of
from flagtree.check.positions import Positions
from flagtree.check.stated import Stated
from flagtree.check.upper_eager import Beside, Eager, eager_rows
from flagtree.check.upper_experts import eager_tiles
from flagtree.errors import FlagtreeError, IRError
from flagtree.ir import experts
from flagtree.ir.program import Buffer, Program
from flagtree.ir.sample import Stored, stores_at

Tensor = torch.Tensor
NOT_ASKED = Beside(why="no eager computation is known")


class Strays(FlagtreeError):
    """A kernel stored something else than it had to, or two ways to run them gave different bits."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was stored at chosen points, by buffer: `ours` executed, `own` by the interpreter in the kernel's dtypes, `truth` in float64;
    each one-dimensional, element for element; `enclosed`: where `ours` must lie (check/enclosure.py), empty where nothing is stated.
    `what`: the blocks that ran, or the points that were looked at.  `ways`: the variants or CPU levels that ran, all with these bits.
    `beside`: PyTorch's values of some of them (check/upper_eager.py)."""

    what: str
    ways: tuple[str, ...]
    ours: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    truth: Mapping[str, Tensor]
    enclosed: Mapping[str, Enclosed]
    beside: Beside = NOT_ASKED


class Expected:
    """Sparse buffers (`flat`: name to its elements in one dimension) filled where `points` of the domain read and NaN where they store,
    and what they must store: `own` by the interpreter in the kernel's dtypes, `truth` in float64."""

    def __init__(self, program: Program, symbols: Mapping[str, int], flat: Mapping[str, Tensor], points: Mapping[str, Tensor],
                 seed: int, stated: Stated, eager: Eager | None = None, kind: str = "ordinary") -> None:  # fmt: skip
        kernel = kernel_of(program)
        self.flat, positions = flat, Positions(program, symbols, seed, kind)
        tensors = {b.name: torch.as_strided(flat[b.name], *geometry(b, symbols)) for b in program.buffers}

        self.filled: list[tuple[str, Tensor, Tensor]] = []  # buffer, offsets, values

        def fill(buffer: str, offsets: Tensor) -> None:
            offsets = _distinct(offsets, len(next(iter(points.values()), ())))
            values = positions.at(buffer, offsets)
            self.flat[buffer][offsets] = values
            self.filled.append((buffer, offsets, values))

        self.own = stores_at(program, kernel, tensors, symbols, points, reading=fill)
        self.truth = stores_at(program, kernel, tensors, symbols, points, precise=True)
        self.enclosed: dict[str, Enclosed] = {}
        with contextlib.suppress(IRError):  # a combiner without a stated bound
            self.enclosed = enclose(program, kernel, tensors, symbols, points, stated)
        self.beside = NOT_ASKED if eager is None else _eager(program, tensors, symbols, points, self.own, eager)
        self.blank = [name for name in self.own if program.buffer(name).role == "temp"]
        self._start()

    def _start(self) -> None:
        """What the points only store is nothing yet."""
        for name in self.blank:
            self.flat[name][self.own[name].offsets] = unwritten(self.flat[name].dtype)
        self.before = self.stored()

    def elsewhere(self, flat: Mapping[str, Tensor]) -> Expected:
        """The same inputs in other memory, which is all zero."""
        other = copy.copy(self)
        other.flat = flat
        for buffer, offsets, values in self.filled:
            flat[buffer][offsets] = values
        other._start()
        return other

    def stored(self) -> dict[str, Tensor]:
        """What is now where the points store, by buffer."""
        return {name: self.flat[name][stored.offsets].clone() for name, stored in self.own.items()}

    def put_back(self) -> None:
        """Make what the points store what it was."""
        for name, stored in self.own.items():
            self.flat[name][stored.offsets] = self.before[name]

    def sampled(self, ours: Mapping[str, Tensor], what: str, ways: tuple[str, ...]) -> Sampled:
        """The record of what was executed."""
        own, truth = ({name: s.values for name, s in found.items()} for found in (self.own, self.truth))
        return Sampled(what, ways, ours, own, truth, self.enclosed, self.beside)


def _distinct(offsets: Tensor, points: int) -> Tensor:
    """Without those that several points read in the same way, as the points of a row of a product do."""
    if not points or len(offsets) % points or len(offsets) <= points:
        return offsets
    each = offsets.view(points, -1)
    first, of = torch.unique(each[:, 0], return_inverse=True)
    chosen = torch.empty(len(first), dtype=torch.int64)
    chosen[of] = torch.arange(points)
    return each[chosen].flatten() if torch.equal(each[chosen][of], each) else offsets


def _eager(
    program: Program, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], points: Mapping[str, Tensor],
    own: Mapping[str, Stored], eager: Eager,
) -> Beside:  # fmt: skip
    kernel = kernel_of(program)
    if (known := experts.known(program, kernel)) is not None:
        return eager_tiles(program, known, tensors, points, eager)
    return eager_rows(program, kernel, tensors, symbols, points, own, eager)


def geometry(buffer: Buffer, symbols: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides in elements."""
    shape, strides = (tuple(e.evaluate(symbols) for e in part) for part in (buffer.shape, buffer.layout))
    return shape, strides


def elements(buffer: Buffer, symbols: Mapping[str, int]) -> int:
    """Elements from the first to the last of a buffer, the holes of its strides included."""
    shape, strides = geometry(buffer, symbols)
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str:
    """The first buffer in which two runs differ, "" when there is none."""
    return next((n for n, v in first.items() if different(v, second[n])), "")
