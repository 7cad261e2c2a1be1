"""Where each buffer of an unrolled launch list lives, and for how long.

Temps that only pass between steps share one arena, each at an offset that no other live one overlaps; what is handed
back or sized by an extern's result is allocated on its own; what an extern returns is its own, unless it can be written in
place (`direct.py`).  Pure integers, no torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from flagtree.errors import BundleError
from flagtree.runtime.direct import written_into
from flagtree.runtime.expand import ExternCall, KernelCall, Unrolled
from flagtree.runtime.index import symbols_of

ALIGNMENT = 64  # bytes: a cache line, and the widest vector of x86-64-v4


@dataclass(frozen=True, slots=True)
class Lifetime:
    """First and last step that touches a root buffer, inclusive; `last` is the number of steps when it is handed back."""

    first: int
    last: int


@dataclass(slots=True)
class Homes:
    """Root buffers by where they live.  `late`: symbols that an extern's result decides.  `direct`: results of externs that
    are written into memory of ours instead of being returned."""

    lifetimes: dict[str, Lifetime]
    arena: list[str]
    fresh: list[str]
    produced: list[str]
    late: set[str]
    direct: set[str]


def assign(program: Unrolled) -> Homes:
    """Decide the home of every root that is not given.  BundleError for a temp that nothing writes."""
    given = {b.name for b in program.given}
    late = {s["name"] for s in program.symbols if program.root(s["source"][1]) not in given}
    direct = _direct(program, late)
    produced = {program.root(o) for s in program.steps if isinstance(s, ExternCall) for o in s.outputs if o} - direct
    lifetimes = _lifetimes(program, direct)
    returned = {program.root(o) for o in program.outputs if isinstance(o, str)}
    sized_late = {program.root(b.name) for b in program.buffers.values() if symbols_of([b.shape, b.strides or [], b.offset]) & late}
    homes = Homes(lifetimes, [], [], [], late, direct)
    for root in lifetimes:
        if root in given:
            continue
        if program.buffers[root].role not in ("temp", "scalar"):
            raise BundleError(f"the launch list uses '{root}', which a repeat should bind")
        if root in produced:
            homes.produced.append(root)
        elif root in returned or root in sized_late:
            homes.fresh.append(root)
        else:
            homes.arena.append(root)
    missing = next((r for r in returned if r not in lifetimes and r not in given), None)
    if missing is not None:
        raise BundleError(f"the launch list hands back '{missing}', which no step writes")
    return homes


def _direct(program: Unrolled, late: set[str]) -> set[str]:
    """Results that every call which makes them can write in place."""
    able: set[str] = set()
    unable: set[str] = set()
    for step in program.steps:
        if isinstance(step, ExternCall):
            into = written_into(program, step, late)
            able |= {into} if into is not None else set()
            unable |= {o for o in step.outputs if o and o != into}
    return able - unable


def _lifetimes(program: Unrolled, direct: set[str]) -> dict[str, Lifetime]:
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, step in enumerate(program.steps):
        for root in (program.root(n) for n in _names(step)):
            first.setdefault(root, i)
            last[root] = i
    for output in program.outputs:
        if isinstance(output, str) and program.root(output) in last:
            last[program.root(output)] = len(program.steps)
    for step in reversed(program.steps):
        # an operator may return its operand (dropout in evaluation does), so operands live as long as results
        if isinstance(step, ExternCall):
            end = max((last[program.root(o)] for o in step.outputs if o and o not in direct), default=0)
            for root in (program.root(n) for n in step.operands):
                last[root] = max(last[root], end)
    return {root: Lifetime(first[root], last[root]) for root in first}


def _names(step: KernelCall | ExternCall) -> Iterable[str]:
    if isinstance(step, KernelCall):
        return step.buffers
    return (*step.operands, *step.mutates, *(o for o in step.outputs if o))


# -- the arena -------------------------------------------------------------------------------------------------------
def place(sizes: dict[str, int], lifetimes: dict[str, Lifetime]) -> tuple[dict[str, int], int]:
    """Byte offset of each buffer and the arena's size: buffers whose lifetimes meet never overlap.  `sizes` in bytes.
    Best fit in order of first use; near linear for the few buffers that are alive at once."""
    offsets: dict[str, int] = {}
    free: list[tuple[int, int]] = []  # (offset, size), sorted, never adjacent
    ends: list[tuple[int, str]] = []  # (last step, name), sorted: what is alive
    top = 0
    for name in sorted(sizes, key=lambda n: (lifetimes[n].first, n)):
        while ends and ends[0][0] < lifetimes[name].first:
            _, dead = ends.pop(0)
            _release(free, offsets[dead], _padded(sizes[dead]))
        need = _padded(sizes[name])
        fits = [(size, offset) for offset, size in free if size >= need]
        if fits:
            size, offset = min(fits)
            at = bisect.bisect_left(free, (offset, size))
            free[at : at + 1] = [(offset + need, size - need)] if size > need else []
        elif free and free[-1][0] + free[-1][1] == top:  # grow the hole at the end
            offset = free.pop()[0]
            top = offset + need
        else:
            offset, top = top, top + need
        offsets[name] = offset
        bisect.insort(ends, (lifetimes[name].last, name))
    return offsets, top


def _padded(size: int) -> int:
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


def _release(free: list[tuple[int, int]], offset: int, size: int) -> None:
    at = bisect.bisect_left(free, (offset, size))
    if at < len(free) and offset + size == free[at][0]:
        size += free.pop(at)[1]
    if at and free[at - 1][0] + free[at - 1][1] == offset:
        at -= 1
        offset, size = free[at][0], size + free[at][1]
        free.pop(at)
    free.insert(at, (offset, size))
