"""The tile that one program instance computes: which axis lies along which dimension of its tensors, and the shape of each value.

Invariant: two axes share a dimension only when no value depends on both; the lane axis lies along the last dimension.
Place in the flow: built from a scheduled flat kernel by codegen/triton.py, read by every part that writes text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flagtree.errors import CodegenError
from flagtree.ir.flat import FlatKernel, map_indices, operands
from flagtree.ir.index import ONE, ZERO, Index, floordiv
from flagtree.ir.program import BodyOp, Reduce, Scan, Schedule, Store, Symbol

Shape = tuple[int, ...]
MAX_ELEMENTS = 1 << 20  # triton.language's own limit on the elements of a tensor (TRITON_MAX_TENSOR_NUMEL)


@dataclass(frozen=True, slots=True)
class TiledAxis:
    """`tile`: elements that an instance holds at once (1: the axis is a scalar); `full`: tiles cover the axis exactly, no mask.
    `count`: tiles along the axis.  `dim`: the tensor dimension, None for a scalar axis."""

    name: str
    extent: Index
    count: Index
    tile: int
    looped: bool
    reduced: bool
    full: bool
    dim: int | None

    @property
    def in_grid(self) -> bool:
        """Whether different program instances hold different parts of the axis."""
        return not self.looped and not self.reduced and self.count != ONE


class Tile:
    """Axes and shapes of one kernel under its schedule; `body` has index 0 in place of an axis of extent 1.

    Raises CodegenError for a schedule that does not cover the domain or makes a tensor larger than Triton's limit.
    """

    def __init__(self, flat: FlatKernel, schedule: Schedule, symbols: Iterable[Symbol]) -> None:
        self.flat, self.bounds = flat, flat.bounds
        self.symbols = {s.name: s for s in symbols}
        unit = {a.name: ZERO for a in flat.axes if self._is_one(a.extent)}
        self.body = tuple(map_indices(op, lambda i: i.substitute(unit)) for op in flat.body)
        present = [a for a in flat.axes if a.name not in unit]
        self.names = frozenset(a.name for a in present)
        tiles = dict(schedule.tiles)
        dims, self.rank = self._dimensions([a.name for a in present if tiles.get(a.name, 1) > 1], schedule.lane)
        self.axes: dict[str, TiledAxis] = {}
        for axis in present:
            tile, looped = tiles.get(axis.name, 1), axis.name in schedule.loop
            looped |= axis.kind == "reduce" and tile == 1 and self.bounds.nonnegative(1 - axis.extent)  # none or one
            self._check(axis.name, axis.extent, tile, looped or axis.kind != "reduce")
            once = tile > 1 and self.bounds.nonnegative(tile - axis.extent)
            count = ONE if once else floordiv(axis.extent + (tile - 1), Index.of(tile), self.bounds)
            full = tile == 1 or self._divides(axis.extent, tile)
            self.axes[axis.name] = TiledAxis(
                axis.name, axis.extent, count, tile, looped and not once, axis.kind == "reduce", full, dims.get(axis.name)
            )
        if self.elements > MAX_ELEMENTS:
            raise CodegenError(f"a tile of {self.elements} elements", why=f"Triton's limit is {MAX_ELEMENTS}")

    def _is_one(self, extent: Index) -> bool:
        return extent.constant == 1 or (self.bounds.nonnegative(1 - extent) and self.bounds.nonnegative(extent - 1))

    def _check(self, axis: str, extent: Index, tile: int, may_exceed: bool) -> None:
        if tile < 1 or tile & (tile - 1):
            raise CodegenError(f"tile {tile} of axis {axis} is not a power of two")
        if not may_exceed and not self.bounds.nonnegative(tile - extent):
            raise CodegenError(
                f"the schedule covers {tile} elements of the reduced axis {axis}",
                why=f"its extent is {extent}",
                hint="name the axis in `loop`",
            )

    def _divides(self, extent: Index, tile: int) -> bool:
        """Proved: extent is a multiple of tile, from constants and the multiples that symbols promise."""
        for monomial, coefficient in extent.terms:
            for atom in monomial:
                if isinstance(atom, str) and atom in self.symbols:
                    coefficient *= self.symbols[atom].multiple
            if coefficient % tile:
                return False
        return True

    # -- dependences -------------------------------------------------------------------------------------------------
    def of(self, names: Iterable[str]) -> frozenset[str]:
        """The axes that values, axes and symbols of these names vary over."""
        found: set[str] = set()
        for name in names:
            found |= {name} if name in self.names else self.flat.depends.get(name, frozenset())
        return frozenset(found) & self.names

    def index_deps(self, index: Iterable[Index]) -> frozenset[str]:
        return self.of(n for i in index for n in i.names())

    def op_deps(self, op: BodyOp) -> frozenset[str]:
        """Axes that an op is computed over; for a Reduce or Scan those of its operands and its own."""
        own = op.axes if isinstance(op, Reduce) else (op.axis,) if isinstance(op, Scan) else ()
        return self.of((*operands(op), *own))

    # -- shapes ------------------------------------------------------------------------------------------------------
    def _dimensions(self, axes: list[str], lane: str | None) -> tuple[dict[str, int], int]:
        """Greedy colouring: the lane first, then inner axes before outer ones."""
        domains = [self.op_deps(op) for op in self.body]
        groups: list[list[str]] = []
        for axis in sorted(axes, key=lambda a: (a != lane, -axes.index(a))):
            apart = (g for g in groups if not any(axis in d and other in d for d in domains for other in g))
            home = next(apart, None)
            if home is None:
                groups.append([axis])
            else:
                home.append(axis)
        return {a: len(groups) - 1 - k for k, g in enumerate(groups) for a in g}, len(groups)

    def tiled(self, deps: Iterable[str]) -> list[TiledAxis]:
        """The axes among `deps` that lie along a dimension, in order of declaration."""
        wanted = set(deps)
        return [a for a in self.axes.values() if a.name in wanted and a.dim is not None]

    def shape(self, deps: Iterable[str]) -> Shape:
        """() for a scalar, else one size a dimension, 1 where the value does not vary."""
        axes = self.tiled(deps)
        if not axes:
            return ()
        sizes = [1] * self.rank
        for axis in axes:
            assert axis.dim is not None
            sizes[axis.dim] = axis.tile
        return tuple(sizes)

    @property
    def elements(self) -> int:
        """Elements of the largest tensor of the body."""
        return max((math.prod(self.shape(self.op_deps(op))) for op in self.body), default=1)

    @property
    def loops(self) -> tuple[str, ...]:
        """The looped axes, outermost first: the lane innermost."""
        names = [a.name for a in self.axes.values() if a.looped]
        return tuple(sorted(names, key=lambda n: self.axes[n].dim is not None and self.axes[n].dim == self.rank - 1))

    def missing_from(self, op: Store) -> list[TiledAxis]:
        """Axes spread over program instances or loop steps that a store does not vary over: it must run once, not once for each."""
        deps = self.op_deps(op)
        return [a for a in self.axes.values() if a.name not in deps and (a.in_grid or a.looped)]
