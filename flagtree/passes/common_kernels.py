"""Kernels that compute the same value twice are one: common subexpressions between kernels.

Part of canonicalize.  A value is the same when the body, the buffers it reads and their state in time are; only temps that are
written once and are no output are joined, so no alias or later write can tell them apart.
"""

from __future__ import annotations

from dataclasses import replace

from flagtree.ir.program import Buffer, Kernel, Program, Step, Store
from flagtree.passes.reinplace import renamed


def join_equal_kernels(program: Program) -> Program:
    """The same program when no two kernels are equal."""
    writers: dict[str, int] = {}
    for step in program.steps:
        for name in step.writes:
            root = program.root(name)
            writers[root] = writers.get(root, 0) + 1
    outputs = {program.root(n) for n in program.outputs}
    version: dict[str, int] = {}
    first: dict[object, tuple[str, ...]] = {}
    same: dict[str, str] = {}
    steps: list[Step] = []
    for step in program.steps:
        step = renamed(step, same) if same else step
        if out := _only_outputs(program, step, writers, outputs):
            assert isinstance(step, Kernel)
            names = tuple(b.name for b in out)
            earlier = first.setdefault(_identity(program, step, out, version), names)
            if earlier != names:
                same |= dict(zip(names, earlier, strict=True))
                continue
        for name in step.writes:
            root = program.root(name)
            version[root] = version.get(root, 0) + 1
        steps.append(step)
    if not same:
        return program
    buffers = tuple(_rebased(b, same) for b in program.buffers if b.name not in same)
    return program.with_(steps=tuple(steps), buffers=buffers)


def _only_outputs(program: Program, step: Step, writers: dict[str, int], outputs: set[str]) -> tuple[Buffer, ...]:
    """The temps that a kernel stores, once each, where it is nothing else that it stores; else none."""
    if not isinstance(step, Kernel) or any(s.mode != "set" for s in step.stores):
        return ()
    found = tuple(program.buffer(s.access.buffer) for s in step.stores)
    names = {b.name for b in found}
    plain = all(b.role == "temp" and b.alias_of is None and writers[b.name] == 1 for b in found) and len(names) == len(found)
    return found if plain and names.isdisjoint(outputs) and names.isdisjoint(step.reads) else ()


def _identity(program: Program, kernel: Kernel, out: tuple[Buffer, ...], version: dict[str, int]) -> object:
    body = tuple(replace(op, access=replace(op.access, buffer="")) if isinstance(op, Store) else op for op in kernel.body)
    reads = tuple((n, version.get(program.root(n), 0)) for n in kernel.reads)
    return (kernel.axes, repr(body), kernel.numerics, reads, tuple((b.dtype, b.shape, b.layout) for b in out))


def _rebased(buffer: Buffer, same: dict[str, str]) -> Buffer:
    alias = buffer.alias_of
    if alias is None or alias.base not in same:
        return buffer
    return replace(buffer, alias_of=replace(alias, base=same[alias.base]))
