"""Which points of a kernel's domain one instance of its Triton program computes: the inverse of the prologue that `triton.py` writes.

Invariant: over all instances of the grid every point of the domain is covered.  Read by `check`, which executes chosen instances of a
large grid and must know, without asking the generated code, what each of them has to store.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from flagtree.codegen.triton import grid_axes
from flagtree.codegen.triton_tile import Tile
from flagtree.errors import CodegenError
from flagtree.ir.attention import PACKED, Form, form_of, group_of, operands
from flagtree.ir.flat import flatten
from flagtree.ir.program import Axis, Kernel, Program

Ranges = dict[str, range]


class Instances:
    """The program instances of one scheduled, isolated kernel at given values of its symbols.

    `grid`: its three sizes, computed here from the schedule (a launch computes them from its record); `busy`: the same, since every
    instance has points.  CodegenError when the instances do not cover the domain.
    """

    def __init__(self, program: Program, symbols: Mapping[str, int]) -> None:
        kernel = program.steps[0]
        assert isinstance(kernel, Kernel)
        flat = flatten(program)
        schedule = flat.schedule or kernel.schedule
        if schedule is None:
            raise CodegenError("the kernel has no schedule", hint="the pass `schedule` gives it one")
        self.tile = Tile(flat, schedule, program.symbols)
        self.kernel, self.symbols = kernel, dict(symbols)
        self.dimensions = grid_axes(self.tile)
        self.extents = {a.name: a.extent.evaluate(symbols) for a in flat.axes}
        self.counts = {name: axis.count.evaluate(symbols) for name, axis in self.tile.axes.items()}
        self.members = _members(kernel.axes, flat.axes)
        sizes = [1, 1, 1]
        for k, axes in enumerate(self.dimensions):
            for axis in axes:
                sizes[k] *= self.counts[axis.name]
                if not (self.counts[axis.name] - 1) * axis.tile < self.extents[axis.name] <= self.counts[axis.name] * axis.tile:
                    raise CodegenError(f"{self.counts[axis.name]} tiles of {axis.tile} do not cover axis {axis.name} once")
        self.grid = self.busy = (sizes[0], sizes[1], sizes[2])

    def points(self, block: Sequence[int]) -> list[dict[str, int]]:
        """The points of instance (x, y, z): coordinates by parallel axis of the kernel."""
        return [self._point(flat) for flat in self._flat_points(block)]

    def _flat_points(self, block: Sequence[int]) -> list[dict[str, int]]:
        ranges: Ranges = {name: range(extent) for name, extent in self.extents.items()}
        for p, axes in zip(block, self.dimensions, strict=True):
            for axis in reversed(axes):  # innermost first, as the prologue takes them off
                p, place = (0, p) if axis is axes[0] else divmod(p, self.counts[axis.name])
                ranges[axis.name] = range(place * axis.tile, min((place + 1) * axis.tile, self.extents[axis.name]))
        parallel = [name for name in self.members if name in ranges]
        return [dict(zip(parallel, point, strict=True)) for point in itertools.product(*(ranges[n] for n in parallel))]

    def _point(self, flat: Mapping[str, int]) -> dict[str, int]:
        """A joined axis taken apart into those that it was joined of; axes of extent one stand at 0."""
        out = {a.name: 0 for a in self.kernel.axes if a.kind != "reduce"}
        for name, place in flat.items():
            for axis in reversed(self.members[name]):
                place, out[axis.name] = divmod(place, axis.extent.evaluate(self.symbols))
        return out


class AttentionInstances:
    """As `Instances`, for an attention: an instance computes rows of one key head (templates/triton_attention.py.j2)."""

    def __init__(self, program: Program, form: Form, symbols: Mapping[str, int]) -> None:
        kernel = program.steps[0]
        assert isinstance(kernel, Kernel) and kernel.schedule is not None
        q, k, *_, out = operands(program, form)
        self.packed, self.group = form.kind == PACKED, group_of(q, k)
        self.tokens = q.shape[0 if self.packed else 2].evaluate(symbols)
        self.key_heads, self.width = k.shape[1].evaluate(symbols), out.shape[-1].evaluate(symbols)
        self.rows = dict(kernel.schedule.tiles)["i0" if self.packed else "i1"]
        self.blocks = -(-self.tokens * self.group // self.rows)
        self.grid = self.busy = (self.blocks * self.key_heads * (1 if self.packed else q.shape[0].evaluate(symbols)), 1, 1)

    def points(self, block: Sequence[int]) -> list[dict[str, int]]:
        """The points of instance (x, 0, 0): coordinates by parallel axis of the kernel."""
        sequence, rest = divmod(block[0], self.blocks * self.key_heads)
        key_head, first = divmod(rest, self.blocks)
        names = ("i0", "i1", "i2") if self.packed else ("i0", "i1", "i2", "i3")
        out = []
        for place in range(first * self.rows, min((first + 1) * self.rows, self.tokens * self.group)):
            token, member = divmod(place, self.group)
            row = (token, key_head * self.group + member) if self.packed else (sequence, token, key_head * self.group + member)
            out += [dict(zip(names, (*row, element), strict=True)) for element in range(self.width)]
        return out


def instances(program: Program, symbols: Mapping[str, int]) -> Instances | AttentionInstances:
    """The instances of a scheduled, isolated kernel."""
    form = form_of(program)
    return Instances(program, symbols) if form is None else AttentionInstances(program, form, symbols)


def _members(axes: Sequence[Axis], flat: Sequence[Axis]) -> dict[str, list[Axis]]:
    """Each parallel axis of the flat kernel to the kernel's axes that it was joined of, outermost first: `ir.flat` joins neighbours
    under the innermost's name and drops axes of extent one."""
    out: dict[str, list[Axis]] = {}
    waiting: list[Axis] = []
    remaining = [a.name for a in flat if a.kind != "reduce"]
    for axis in axes:
        if axis.kind == "reduce" or axis.extent.constant == 1:
            continue
        waiting.append(axis)
        if remaining and axis.name == remaining[0]:
            out[remaining.pop(0)], waiting = waiting, []
    if remaining or waiting:
        raise CodegenError("the flat axes are not those of the kernel", where=", ".join(remaining) or ", ".join(a.name for a in waiting))
    return out
