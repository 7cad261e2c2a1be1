"""Which values a later sweep over a row reads back instead of computing them again.

A value that an earlier sweep stored in its own type is loaded from there.  One that costs much (a transcendental function, a division,
several roundings) is kept in a stack array of the row, but for rows too long for the stack; cheap ones are computed again from their loads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flagtree.codegen import cpp_ops as ops
from flagtree.codegen.cpp_layout import Layout
from flagtree.ir.flat import operands
from flagtree.ir.index import ONE
from flagtree.ir.program import BodyOp, Compute, IndexValue, Load, Reduce, Scan, Store, defined

WORTH = 14           # cost, in vector instructions, from which a store and a load are cheaper
STORED_WORTH = 5     # the same where the store is there anyway: more than one load
STACK_BYTES = 1 << 17  # of all kept values of a row: well inside the smallest thread stack in use (OpenMP's 2 MiB)
COSTS = {"div": 10, "sqrt": 10, "rsqrt": 20, "neg": 1, "add": 1, "sub": 1, "mul": 1, "min": 3, "max": 3, "where": 1, "abs": 1, "cast": 1}
DEAR = 20            # every other operation
LOAD = 2             # of consecutive elements
ROUNDING = 7         # to a half float


@dataclass(frozen=True, slots=True)
class Sweep:
    """`body`: the ops of one sweep over one piece, in order.  `kept`: values to store in their rows; `read`: values read back.
    `streamed`: loads of what no earlier sweep has brought into the caches."""

    body: tuple[BodyOp, ...]
    kept: frozenset[str]
    read: tuple[str, ...]
    streamed: frozenset[str]


def row_size(layout: Layout) -> int | None:
    """Elements of a row array for one value, None when rows are not one bounded axis of lanes."""
    if not layout.lane_reduced or layout.loops or layout.lane is None:
        return None
    highest = layout.kernel.bounds.maximum(layout.lane.extent)
    return None if highest is None else -(-max(highest, 1) // 64) * 64


def sweeps(layout: Layout, body: Sequence[BodyOp]) -> list[Sweep]:
    """What each sweep executes for one piece's body."""
    computed = {op.name for op in body if isinstance(op, Compute)}
    stored = {op.value: op for op in body if isinstance(op, Store) and op.value in computed and can_be_read_back(layout, op)}
    size = row_size(layout)
    budget = 0 if size is None else STACK_BYTES // (size * layout.widest)
    defining = {n: op for op in body for n in defined(op) if not isinstance(op, Reduce) and layout.is_swept(op)}
    executed: list[set[str]] = []
    kept: list[set[str]] = []
    out: list[tuple[list[BodyOp], list[str]]] = []
    rows: set[str] = set()
    for number in range(layout.sweeps):
        needed: set[str] = set()
        read: list[str] = []
        chosen: list[BodyOp] = []
        there = {n for n, op in stored.items() if layout.sweep_of(op) < number}
        for op in reversed(tuple(body)):
            if isinstance(op, (Reduce, Store)):
                wanted = layout.is_swept(op) and layout.sweep_of(op) == number
            else:
                wanted = op.name in needed and op.name in defining
            if not wanted:
                continue
            if not isinstance(op, (Reduce, Store)) and op.name in there and cost(op.name, defining) >= STORED_WORTH:
                chosen.append(Load(op.name, op.dtype, stored[op.name].access, None))
                continue
            if not isinstance(op, (Reduce, Store)):
                earlier = next((k for k, names in enumerate(executed) if op.name in names), None)
                if earlier is not None and cost(op.name, defining, there) >= WORTH and (op.name in rows or len(rows) < budget):
                    rows.add(op.name)
                    kept[earlier].add(op.name)
                    read.append(op.name)
                    continue
            chosen.append(op)
            needed.update(operands(op))
        executed.append({n for op in chosen for n in defined(op)})
        kept.append(set())
        out.append((chosen[::-1], read[::-1]))
    return [Sweep(tuple(b), frozenset(k), tuple(r), s) for (b, r), k, s in zip(out, kept, _streamed(layout, out), strict=True)]


def can_be_read_back(layout: Layout, op: Store) -> bool:
    """Consecutive elements with the value's own bits, which stay in the caches and nothing else in the kernel writes."""
    buffer, offset = op.access.buffer, op.access.index[0]
    dtype = next(b.dtype for b in layout.kernel.buffers if b.name == buffer)
    alone = sum(isinstance(o, Store) and o.access.buffer == buffer for o in layout.kernel.body) == 1
    plain = op.mode == "set" and op.access.mask is None and layout.kernel.dtypes[op.value] == dtype and layout.lane_reduced
    if not plain or not alone or layout.lane is None or buffer in layout.large or not layout.varies_in_lanes(op.value):
        return False
    return offset.coefficient(layout.lane.name) == ONE and not offset.names() & layout.kernel.dtypes.keys()


def _streamed(layout: Layout, bodies: Sequence[tuple[list[BodyOp], list[str]]]) -> list[frozenset[str]]:
    seen = layout.seen | {op.access.buffer for op in layout.kernel.body if isinstance(op, Store)}
    streamed = []
    for body, _ in bodies:
        loads = [op for op in body if isinstance(op, Load) and op.access.buffer not in seen]
        streamed.append(frozenset(op.name for op in loads if layout.is_streamed(op)))
        seen |= {op.access.buffer for op in loads}
    return streamed


def cost(name: str, defining: Mapping[str, BodyOp], there: Collection[str] = ()) -> int:
    """Vector instructions to compute a value again from its loads, from what is `there` in memory and from values outside sweeps."""
    seen: set[str] = set()
    total = 0
    stack = [name]
    while stack:
        n = stack.pop()
        op = defining.get(n)
        if n in seen or op is None:
            continue
        seen.add(n)
        total += LOAD if n in there else _op_cost(op)
        stack += () if n in there else operands(op)
    return total


def _op_cost(op: BodyOp) -> int:
    if isinstance(op, Load):
        return LOAD if op.access.mask is None else DEAR
    if isinstance(op, Scan):
        return 4 * DEAR
    if isinstance(op, IndexValue):
        return 1
    if isinstance(op, Compute):
        cost = COSTS.get(op.op, 1 if op.op in ops.BINARY or op.op in ops.PREFIX else DEAR)
        return cost + (ROUNDING if op.dtype in ("bf16", "f16") and op.op not in ops.UNROUNDED else 0)
    return 0
