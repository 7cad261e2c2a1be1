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
    first: dict[object, str] = {}
    same: dict[str, str] = {}
    steps: list[Step] = []
    for step in program.steps:
        step = renamed(step, same) if same else step
        out = _only_output(program, step, writers, outputs)
        if out is not None:
            assert isinstance(step, Kernel)
            key = _identity(program, step, out, version)
            earlier = first.setdefault(key, out.name)
            if earlier != out.name:
                same[out.name] = earlier
                continue
        for name in step.writes:
            root = program.root(name)
            version[root] = version.get(root, 0) + 1
        steps.append(step)
    if not same:
        return program
    buffers = tuple(_rebased(b, same) for b in program.buffers if b.name not in same)
    return program.with_(steps=tuple(steps), buffers=buffers)


def _only_output(program: Program, step: Step, writers: dict[str, int], outputs: set[str]) -> Buffer | None:
    if not isinstance(step, Kernel) or len(step.stores) != 1 or step.stores[0].mode != "set":
        return None
    buffer = program.buffer(step.stores[0].access.buffer)
    plain = buffer.role == "temp" and buffer.alias_of is None and writers[buffer.name] == 1
    return buffer if plain and buffer.name not in outputs and buffer.name not in step.reads else None


def _identity(program: Program, kernel: Kernel, out: Buffer, version: dict[str, int]) -> object:
    body = tuple(replace(op, access=replace(op.access, buffer="")) if isinstance(op, Store) else op for op in kernel.body)
    reads = tuple((n, version.get(program.root(n), 0)) for n in kernel.reads)
    return (kernel.axes, repr(body), kernel.numerics, reads, out.dtype, out.shape, out.layout)


def _rebased(buffer: Buffer, same: dict[str, str]) -> Buffer:
    alias = buffer.alias_of
    if alias is None or alias.base not in same:
        return buffer
    return replace(buffer, alias_of=replace(alias, base=same[alias.base]))
