"""The default schedule of a kernel on a target with warps: lane axis, tiles, loops, warps.

Invariant: a pure function of the kernel's text and the target's facts, never of a measurement or of a batch size.
Place in the flow: the pass `schedule` asks it for every kernel of a target with warps.
"""

from __future__ import annotations

from dataclasses import replace

from flagtree.errors import CodegenError
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.flat import FlatKernel, flatten
from flagtree.ir.index import Bounds, Index
from flagtree.ir.program import Axis, Kernel, Program, Schedule
from flagtree.targets.base import Target

INSTANCE = 1024  # elements that a program instance should have: 8 for each of 128 threads, one 16-byte access of bf16
LOOP_TILE = 2048  # elements of a row that one step of a loop takes
COLUMNS = 128  # lanes of a column reduction: 256 bytes of bf16, a whole number of memory sectors
SHORT_ROW = 1024  # a row of run-time length up to this is one masked tile rather than a loop
PER_THREAD = 8
FEW_ROWS = 4  # a constant axis shorter than this would leave an instance too small


def scheduled(program: Program, target: Target) -> Program:
    """A one-kernel program with the kernel's schedule in place; one that has a schedule is left as it is."""
    kernel = program.steps[0]
    if not isinstance(kernel, Kernel) or kernel.schedule is not None:
        return program
    return program.with_(steps=(replace(kernel, schedule=default_schedule(program, target)),))


def default_schedule(program: Program, target: Target) -> Schedule:
    """The schedule of the one kernel of `program`.

    The lane is the axis along which most bytes are contiguous.  A reduced row stays in one tile up to `target.row_limit` elements,
    several short rows share an instance, a longer row (or one of run-time length) is walked in a loop of tiles.
    """
    kernel = program.steps[0]
    if len(program.steps) != 1 or not isinstance(kernel, Kernel):
        raise CodegenError("a schedule is for one kernel", where=program.name)
    flat = flatten(program.with_(steps=(replace(kernel, schedule=None),)))
    axes = [a for a in flat.axes if a.extent.constant != 1]
    if not axes:
        return Schedule(warps=1)
    lane = _lane(flat, axes)
    tiles, loops = _reduced_tiles(flat, axes, lane, target.row_limit)
    _fill_rows(flat, axes, lane, tiles)
    elements = 1
    for size in tiles.values():
        elements *= size
    ordered = tuple((a.name, tiles[a.name]) for a in axes if tiles.get(a.name, 1) > 1)
    return Schedule(lane.name, ordered, _unmerged(kernel, flat, loops), _warps(elements, target), 1)


def _lane(flat: FlatKernel, axes: list[Axis]) -> Axis:
    """The axis along which most bytes are moved at distance one, over the whole domain; the innermost where none are."""
    dtypes = {b.name: b.dtype for b in flat.buffers}
    weight = {a.name: 0 for a in axes}
    for op in flat.body:
        access = getattr(op, "access", None)
        if access is None:
            continue
        moved = DTYPES[dtypes[access.buffer]].bytes
        for name in flat.op_depends(op):
            moved *= _longest(flat.axis(name).extent, flat.bounds)
        for axis in axes:
            factor = access.index[0].coefficient(axis.name)
            shifted = factor is None and axis.name in access.index[0].names()  # (i + 64) % 128 is nearly contiguous
            if shifted or (factor is not None and factor.constant == 1):
                weight[axis.name] += moved
    return max(enumerate(axes), key=lambda pair: (weight[pair[1].name], pair[0]))[1]


def _reduced_tiles(flat: FlatKernel, axes: list[Axis], lane: Axis, row_limit: int) -> tuple[dict[str, int], set[str]]:
    """Tiles of the lane and of every reduced axis, and the axes that are walked in a loop."""
    tiles: dict[str, int] = {}
    loops: set[str] = set()
    reduced = [a for a in axes if a.kind == "reduce" and a is not lane]
    longest = _longest(lane.extent, flat.bounds)
    if lane.kind == "reduce":
        whole = longest <= (row_limit if lane.extent.constant is not None else SHORT_ROW)
        tiles[lane.name] = _power(longest) if whole else LOOP_TILE
        if not whole:
            loops.add(lane.name)
    else:
        tiles[lane.name] = min(_power(longest), COLUMNS if reduced else INSTANCE)
    used = tiles[lane.name]
    for axis in reversed(reduced):
        size = _power(_longest(axis.extent, flat.bounds))
        if lane.name not in loops and size * used <= max(
            LOOP_TILE, min(row_limit, 4 * LOOP_TILE) if axis.extent.constant is not None else 0
        ):
            tiles[axis.name] = size
        else:
            loops.add(axis.name)
            tiles[axis.name] = max(1, min(size, LOOP_TILE // used))
        used *= tiles[axis.name]
    if loops:  # one nest takes all reduced axes that are reduced together
        loops |= {a.name for a in axes if a.kind == "reduce" and tiles[a.name] < _longest(a.extent, flat.bounds)}
    return tiles, loops


def _fill_rows(flat: FlatKernel, axes: list[Axis], lane: Axis, tiles: dict[str, int]) -> None:
    """Give an instance several rows, when one is short: of the innermost other parallel axis of constant extent (heads: no mask, no
    idle lanes at batch 1, and what varies over tokens only is loaded once for all of them), else of the innermost."""
    used = 1
    for size in tiles.values():
        used *= size
    rows = [a for a in axes if a.kind != "reduce" and a is not lane]
    if rows and used < INSTANCE:
        chosen = max(enumerate(rows), key=lambda pair: ((pair[1].extent.constant or 0) >= FEW_ROWS, pair[0]))[1]
        tiles[chosen.name] = min(_power(_longest(chosen.extent, flat.bounds)), max(1, INSTANCE // used))


def _unmerged(kernel: Kernel, flat: FlatKernel, loops: set[str]) -> tuple[str, ...]:
    """Loop axes by the kernel's own names: an axis that flattening merged into a looped one is looped with it."""
    alive = {a.name for a in flat.axes}
    out: list[str] = []
    for kind in ("parallel", "reduce"):
        group = [a for a in kernel.axes if (a.kind == "reduce") == (kind == "reduce")]
        for position, axis in enumerate(group):
            home = next((a.name for a in group[position:] if a.name in alive), None)
            if home in loops and axis.extent.constant != 1:
                out.append(axis.name)
    return tuple(out)


def _warps(elements: int, target: Target) -> int:
    """Enough warps for `PER_THREAD` elements a thread, at most 8 (16 for tiles that would not fit in registers)."""
    most = max(1, min(target.max_threads // target.warp, 16 if elements > 8192 else 8))
    return min(most, max(1, _power(elements // (target.warp * PER_THREAD))))


def _longest(extent: Index, bounds: Bounds) -> int:
    """An upper end of an extent; huge where there is none."""
    high = bounds.interval(extent)[1]
    return 1 << 40 if high is None else high


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
