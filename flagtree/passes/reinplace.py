"""In-place re-use of state buffers: a state that is copied, changed and copied back is changed where it lies.

Functional graphs write a KV cache as `t = copy(cache); t[pos] = k; cache = t`: two passes over the whole cache for one row.  The
pass renames `t` to the state and drops both copies, when nothing touches the state in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from flagtree.ir.program import Access, BodyOp, Extern, Kernel, Load, Operand, Program, Ref, Step, Store, Template
from flagtree.passes.base import Fuel, Refused, Report
from flagtree.targets.base import Target

# functional operator -> the one that writes its first operand
IN_PLACE = {
    f"aten.{n}.{o}": f"aten.{n}_.{o}"
    for n, o in (
        ("index_copy", "default"), ("index_put", "default"), ("index_add", "default"), ("index_fill", "int_Scalar"),
        ("scatter", "src"), ("scatter", "value"), ("scatter_add", "default"), ("masked_scatter", "default"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Reinplace:
    """No options."""

    name: ClassVar[str] = "reinplace"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report, fuel = Report(self.name), fuel or Fuel()
        for back in range(len(program.steps)):
            pair = copied(program, program.steps[back]) if back < len(program.steps) else None
            if pair is None or program.buffer(pair[0]).role != "state" or program.buffer(pair[1]).role != "temp":
                continue
            state, temp = pair
            first = next((k for k, s in enumerate(program.steps[:back]) if temp in map(program.root, s.writes)), None)
            why = _refusal(program, state, temp, first, back)
            if why is not None:
                report.refused.append(Refused((program.steps[back].name,), why))
            elif fuel.take():
                program = _rewritten(program, state, temp, first, back)
                report.rewrites += 1
                report.matched.append(f"{state} in place of {temp}")
        return program, report


def copied(program: Program, step: Step) -> tuple[str, str] | None:
    """(destination, source) of a kernel that is exactly one full copy between two plain buffers of one shape."""
    if not isinstance(step, Kernel) or len(step.body) != 2:
        return None
    load, store = step.body
    if not isinstance(load, Load) or not isinstance(store, Store) or store.value != load.name or store.mode != "set":
        return None
    a, b = program.buffer(store.access.buffer), program.buffer(load.access.buffer)
    plain = a.alias_of is None and b.alias_of is None and a.shape == b.shape and a.dtype == b.dtype and a.layout == b.layout
    same = load.access.index == store.access.index and load.access.mask is None and store.access.mask is None
    names = [i.name for i, n in zip(store.access.index, a.shape, strict=True) if n.constant != 1]
    extents = {x.name: x.extent for x in step.axes}
    whole = len(set(names)) == len(names) and all(
        extents.get(i.name or "") == n for i, n in zip(store.access.index, a.shape, strict=True) if n.constant != 1
    )
    return (a.name, b.name) if plain and same and whole else None


def _refusal(program: Program, state: str, temp: str, first: int | None, back: int) -> str | None:
    start = None if first is None else program.steps[first]
    if start is None or (copied(program, start) != (temp, state) and not _changes_copy(program, start, state, temp)):
        return f"'{temp}' does not start as a copy of '{state}'"
    if temp in {program.root(n) for n in program.outputs}:
        return f"'{temp}' is also an output"
    for k, step in enumerate(program.steps):
        touched = {program.root(n) for n in (*step.reads, *step.writes)}
        if first is not None and first < k < back and state in touched:
            return f"'{state}' is used by '{step.name}' while its copy changes"
        if k > back and temp in {program.root(n) for n in step.writes}:
            return f"'{temp}' is written again after the copy back"
        if k > back and temp in touched and any(state in map(program.root, s.writes) for s in program.steps[back + 1 : k + 1]):
            return f"'{temp}' is read after '{state}' has changed"
    return None


def _changes_copy(program: Program, step: Step, state: str, temp: str) -> bool:
    """An extern that returns a changed copy of the state and has a twin that changes it in place."""
    if not isinstance(step, Extern) or step.callee not in IN_PLACE or step.outputs != (temp,) or step.args[0] != Ref(state):
        return False
    others = replace(step, args=step.args[1:]).reads  # the state again, or a view of it, would change while it is read
    return state not in map(program.root, others) and not step.mutates


def _rewritten(program: Program, state: str, temp: str, first: int | None, back: int) -> Program:
    steps: list[Step] = []
    for k, step in enumerate(program.steps):
        if k == first and isinstance(step, Extern):
            steps.append(replace(step, callee=IN_PLACE[step.callee], outputs=(None,), mutates=(state,)))
        elif k not in (first, back):
            steps.append(renamed(step, {temp: state}))
    buffers = []
    for b in program.buffers:
        if b.name == temp:
            continue
        if b.alias_of is not None and b.alias_of.base == temp:
            b = replace(b, alias_of=replace(b.alias_of, base=state), role="state")
        buffers.append(b)
    return program.with_(steps=tuple(steps), buffers=tuple(buffers))


def renamed(step: Step, names: Mapping[str, str]) -> Step:
    """The step with buffers renamed."""

    def access(a: Access) -> Access:
        return replace(a, buffer=names[a.buffer]) if a.buffer in names else a

    def body(ops: tuple[BodyOp, ...]) -> tuple[BodyOp, ...]:
        return tuple(replace(op, access=access(op.access)) if isinstance(op, (Load, Store)) else op for op in ops)

    def buffers(all_: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(n, n) for n in all_)

    if isinstance(step, Kernel):
        return replace(step, body=body(step.body))
    if isinstance(step, Template):
        step = replace(step, operands=buffers(step.operands), outputs=buffers(step.outputs))
        return replace(step, prologue=body(step.prologue), epilogue=body(step.epilogue))
    if isinstance(step, Extern):

        def operand(x: Operand) -> Operand:
            if isinstance(x, Ref):
                return Ref(names.get(x.buffer, x.buffer))
            return tuple(operand(y) for y in x) if isinstance(x, tuple) else x

        return replace(
            step,
            args=tuple(operand(x) for x in step.args),
            kwargs=tuple((k, operand(x)) for k, x in step.kwargs),
            outputs=tuple(names.get(n, n) if n is not None else None for n in step.outputs),
            mutates=buffers(step.mutates),
        )
    formals = {f for f, _ in step.bindings}
    inner = {k: v for k, v in names.items() if k not in formals}
    return replace(step, body=tuple(renamed(s, inner) for s in step.body), bindings=tuple((f, buffers(a)) for f, a in step.bindings))


def rename_output(program: Program, position: int, name: str) -> Program:
    """The same program with one output called `name`, by which a caller reads it; a caller's own buffer keeps its name."""
    old = program.outputs[position]
    if program.buffer(old).role != "temp" or old == name:
        return program
    buffers = []
    for b in program.buffers:
        alias = b.alias_of
        if alias is not None and alias.base == old:
            b = replace(b, alias_of=replace(alias, base=name))
        buffers.append(replace(b, name=name) if b.name == old else b)
    steps = tuple(renamed(s, {old: name}) for s in program.steps)
    return program.with_(steps=steps, buffers=tuple(buffers), outputs=tuple(name if n == old else n for n in program.outputs))
