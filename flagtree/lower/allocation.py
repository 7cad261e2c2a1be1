"""Drops calls that only allocate memory where the next use of that memory writes it: the launch list allocates temps itself.

What reads uninitialised memory keeps its call, so that it reads what eager reads.  The last step of lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flagtree.ir.program import Extern, Kernel, Step, Store

ALLOCATIONS = frozenset({"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"})


def without_allocations(steps: Sequence[Step], root: Callable[[str], str]) -> list[Step]:
    """`steps` less the allocations that nobody needs; `root` gives the buffer whose memory a name is."""
    first: dict[str, Step] = {}  # the first use of each root after the allocation that is looked at, from the back
    kept: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Extern) and step.callee in ALLOCATIONS and step.outputs[0] is not None:
            made = root(step.outputs[0])
            if made in first and _writes_first(first[made], made, root):
                continue
        for name in (*step.reads, *step.writes):
            first[root(name)] = step
        kept.append(step)
    return kept[::-1]


def _writes_first(step: Step, buffer: str, root: Callable[[str], str]) -> bool:
    if isinstance(step, Extern):
        return buffer in {root(n) for n in step.mutates}
    if isinstance(step, Kernel):
        stored = any(isinstance(op, Store) and root(op.access.buffer) == buffer and op.mode == "set" for op in step.body)
        return stored and buffer not in {root(n) for n in step.reads}
    return False
