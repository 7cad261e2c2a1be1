"""Eager at the upper end: rows that were looked at, moved together into small tensors, and PyTorch run on those.

Invariant: the small problem is the same one, since the interpreter must store the same bits in it as at the true sizes; where it does not,
nothing is compared and the reason is kept.  Called by check/sparse.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from flagtree.check.execute import different
from flagtree.check.inputs import lower_ends
from flagtree.check.recipe import NoEager
from flagtree.errors import IRError
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Buffer, Kernel, Program
from flagtree.ir.sample import Stored, stores_at
from flagtree.ir.walk import flat

Tensor = torch.Tensor
Eager = Callable[[Mapping[str, Tensor], Mapping[str, int]], dict[str, Tensor]]
POINTS, ROWS = 1 << 20, 16  # of the small domain, reduced elements included; rows along one axis
LARGEST = 1 << 23  # elements of one small tensor


class Unlike(Exception):
    """The chosen rows make no problem of their own."""


@dataclass(frozen=True, slots=True)
class Beside:
    """By stored buffer: which of the looked-at elements were compared, and PyTorch's values of them.  `why`: none were."""

    places: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    why: str = ""


def eager_rows(
    program: Program, kernel: Kernel, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], points: Mapping[str, Tensor],
    own: Mapping[str, Stored], eager: Eager,
) -> Beside:  # fmt: skip
    """PyTorch's values of what `kernel` stores at some of `points`, whose values by the interpreter are `own`; `tensors` and `symbols` are
    of the true sizes, `eager` as in check.certify.Subject."""
    try:
        rows = _rows(kernel, symbols, points)
        kept = {name: at[_member(rows, points)] for name, at in points.items()}
        sizes = _sizes(program, kernel, symbols, rows)
        read: list[tuple[str, Tensor]] = []
        there = stores_at(program, kernel, tensors, symbols, kept, reading=lambda b, at: read.append((b, flat(tensors[b])[at])))
        near = {name: torch.searchsorted(rows[name], at) if name in rows else at for name, at in kept.items()}
        small = {b.name: empty(b, sizes) for b in program.buffers}
        here = stores_at(program, kernel, small, sizes, near, reading=_filling(iter(read), small))
        if any(here[n].values.shape != s.values.shape or different(here[n].values, s.values) for n, s in there.items()):
            raise Unlike("what it stores depends on where it stands, or on more than its own rows")
        theirs = eager({name: _copied(t) for name, t in small.items()}, sizes)
    except Unlike as error:
        return Beside(why=str(error))
    except NoEager as error:
        return Beside(why=error.why)
    except (IRError, IndexError) as error:
        return Beside(why=f"its rows alone are no tensors that it accepts: {str(error).splitlines()[0]}")
    if missing := [n for n in there if n not in theirs or theirs[n].shape != small[n].shape]:
        return Beside(why=f"{', '.join(missing)} is internal to one operator")
    places = {name: _found(own[name].offsets, stored.offsets) for name, stored in there.items()}
    return Beside(places, {n: flat(_copied(small[n]).to(theirs[n].dtype).copy_(theirs[n]))[here[n].offsets] for n in there})


def _rows(kernel: Kernel, symbols: Mapping[str, int], points: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some of the coordinates that are looked at along each axis of symbolic extent, the first and the last among them."""
    axes = [a for a in kernel.axes if a.kind != "reduce"]
    open_ = [a.name for a in axes if a.extent.constant is None]
    if not open_ or not len(points[open_[0]]):
        raise Unlike("no axis of the kernel grows with a size")
    fixed = math.prod(a.extent.evaluate(symbols) for a in kernel.axes if a.name not in open_)
    most = min(ROWS, max(2, int((POINTS / max(1, fixed)) ** (1 / len(open_)))))
    tuples = torch.unique(torch.stack([points[name] for name in open_], 1), dim=0)
    chosen = tuples[torch.linspace(0, len(tuples) - 1, min(most, len(tuples))).long()]
    return {name: torch.unique(chosen[:, k]) for k, name in enumerate(open_)}


def _member(rows: Mapping[str, Tensor], points: Mapping[str, Tensor]) -> Tensor:
    """Which points lie in the chosen rows."""
    inside = [torch.isin(points[name], chosen) for name, chosen in rows.items()]
    return torch.stack(inside).all(0)


def _sizes(program: Program, kernel: Kernel, symbols: Mapping[str, int], rows: Mapping[str, Tensor]) -> dict[str, int]:
    """Symbols of the small problem: an axis is as long as it has chosen rows; what no axis runs over stays, or is small where that is
    too large."""
    walked: dict[str, int] = {}
    for axis in kernel.axes:
        if axis.name in rows:
            if axis.extent.name is None:
                raise Unlike(f"the size {axis.extent} of an axis is no symbol of its own")
            walked[axis.extent.name] = max(walked.get(axis.extent.name, 0), len(rows[axis.name]))
    for others in (symbols, lower_ends(program)):
        sizes = {**others, **walked}
        if max(_span(b, sizes) for b in program.buffers) <= LARGEST:
            return {name: sizes[name] for name in symbols}
    raise Unlike("the rows that its indices name lie in tensors too large for a few of them")


def _geometry(buffer: Buffer, symbols: Mapping[str, int]) -> tuple[list[int], list[int]]:
    return [e.evaluate(symbols) for e in buffer.shape], [e.evaluate(symbols) for e in buffer.layout]


def _span(buffer: Buffer, symbols: Mapping[str, int]) -> int:
    shape, strides = _geometry(buffer, symbols)
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0


def empty(buffer: Buffer, symbols: Mapping[str, int]) -> Tensor:
    """Zeros in the buffer's sizes and strides."""
    return torch.as_strided(torch.zeros(_span(buffer, symbols), dtype=torch_dtype(buffer.dtype)), *_geometry(buffer, symbols))


def _copied(tensor: Tensor) -> Tensor:
    return torch.as_strided(flat(tensor).clone(), tensor.shape, tensor.stride())


def _filling(read: Iterator[tuple[str, Tensor]], small: Mapping[str, Tensor]) -> Callable[[str, Tensor], None]:
    """Puts what the same load read at the true sizes where the small problem reads it."""

    def fill(buffer: str, offsets: Tensor) -> None:
        name, values = next(read)
        if name != buffer or values.shape != offsets.shape:
            raise Unlike("which elements it reads depends on where it stands")
        flat(small[buffer])[offsets] = values

    return fill


def _found(among: Tensor, wanted: Tensor) -> Tensor:
    """The position in `among` of each of `wanted`, all of which are there."""
    order = torch.argsort(among)
    return order[torch.searchsorted(among[order], wanted)]
