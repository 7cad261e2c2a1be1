"""Walking bf16 two elements a lane: one vector of W words holds 2 * W elements, the even ones and the odd ones.

A shift or a mask then widens a half where plain code shuffles, and the halves join again by one more of each.  Whether a kernel is
walked so is decided by the kernel alone, never by the level, so that partial sums are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flagtree.codegen.cpp_index import is_multiple
from flagtree.codegen.cpp_layout import Layout
from flagtree.codegen.segments import Segment
from flagtree.ir.flat import operands
from flagtree.ir.index import ONE
from flagtree.ir.program import IndexValue, Load, Scan, Store

STEP = 32  # elements of a step at the widest level: 2 * W


def is_paired(layout: Layout, pieces: Iterable[Segment]) -> bool:
    """All that these pieces walk along lanes is consecutive unmasked bf16, and no lane needs to know its position."""
    if layout.lane is None or layout.widest != 4 or (layout.kernel.reduced and not layout.lane_reduced):
        return False
    walked = 0
    for piece in pieces:
        for op in piece.body:
            if isinstance(op, Scan) or (isinstance(op, IndexValue) and layout.varies_in_lanes(op.name)):
                return False
            if isinstance(op, (Load, Store)) and _along(layout, op):
                if not _is_pair(layout, op):
                    return False
                walked += 1
    return walked > 0


def are_whole_steps(pieces: Iterable[Segment], multiples: Mapping[str, int]) -> bool:
    """Each piece begins where a step may: a step keeps its odd elements behind its even ones, up to its end even where it is not full,
    so that a piece beginning within it would overwrite them."""
    return all(is_multiple(piece.lo, STEP, multiples) for piece in pieces)


def _along(layout: Layout, op: Load | Store) -> bool:
    assert layout.lane is not None
    return layout.lane.name in op.access.index[0].names() or any(layout.varies_in_lanes(n) for n in operands(op))


def _is_pair(layout: Layout, op: Load | Store) -> bool:
    assert layout.lane is not None
    offset, lane = op.access.index[0], layout.lane.name
    if op.access.mask is not None or offset.coefficient(lane) != ONE:
        return False
    varying = layout.reduced_names | {lane}
    if any(layout.kernel.depends.get(n, frozenset()) & varying for n in offset.names() - {lane}):
        return False  # an index that is loaded inside the step
    dtype = next(b.dtype for b in layout.kernel.buffers if b.name == op.access.buffer)
    return dtype == "bf16" and (op.mode == "set" if isinstance(op, Store) else op.dtype == "bf16")
