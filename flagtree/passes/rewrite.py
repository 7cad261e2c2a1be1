"""Mechanics that passes share: what a value depends on, renaming, pruning of a kernel body, calls that become steps of our own.

All functions are pure; those over a kernel's body take it in SSA order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from flagtree.ir.index import Bounds, Index
from flagtree.ir.program import (
    Access,
    Axis,
    BodyOp,
    Compute,
    Extern,
    IndexValue,
    Kernel,
    Load,
    Program,
    Reduce,
    Repeat,
    Scan,
    Step,
    Store,
    defined,
    operands,
)
from flagtree.passes.base import Fuel, Refused, Report

EXPENSIVE = frozenset(
    {
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "erf", "erfc", "pow", "atan2",
        "asin", "acos", "atan", "sinh", "cosh", "sqrt", "rsqrt", "div",
    }
)  # fmt: skip


def dtypes_of(op: BodyOp) -> tuple[str, ...]:
    """The types of the values an op defines."""
    if isinstance(op, Store):
        return ()
    return op.dtypes if isinstance(op, Reduce) else (op.dtype,)


def rename(op: BodyOp, names: Mapping[str, str], axes: Mapping[str, Index] | None = None) -> BodyOp:
    """`names` maps values (also inside indices), `axes` maps axis names to index expressions; a reduction over an axis that becomes
    several runs over all of them."""
    moved = axes or {}

    def index(i: Index) -> Index:
        return i.substitute({n: moved[n] if n in moved else Index.of(names[n]) for n in i.names() if n in moved or n in names})

    def access(a: Access) -> Access:
        return Access(a.buffer, tuple(map(index, a.index)), names.get(a.mask, a.mask) if a.mask else None)

    if isinstance(op, Load):
        return Load(names.get(op.name, op.name), op.dtype, access(op.access), op.other)
    if isinstance(op, Store):
        return Store(access(op.access), names.get(op.value, op.value), op.mode)
    if isinstance(op, Compute):
        args = tuple([names.get(a, a) if isinstance(a, str) else a for a in op.args])
        return Compute(names.get(op.name, op.name), op.dtype, op.op, args)
    if isinstance(op, IndexValue):
        return IndexValue(names.get(op.name, op.name), op.dtype, index(op.expr))

    def axis(x: str) -> str:
        return (moved[x].name if x in moved else None) or x

    if isinstance(op, Reduce):
        reduced = tuple(names.get(a, a) for a in op.args)
        along = tuple(n for x in op.axes for n in (sorted(moved[x].names()) if x in moved and moved[x].name is None else (axis(x),)))
        return Reduce(tuple(names.get(n, n) for n in op.names), op.dtypes, op.combiner, reduced, along or op.axes, op.ordered)
    return Scan(names.get(op.name, op.name), op.dtype, op.combiner, names.get(op.arg, op.arg), axis(op.axis))


def free_axes(body: Iterable[BodyOp], axes: Iterable[str]) -> dict[str, frozenset[str]]:
    """The axes that each value depends on."""
    known = frozenset(axes)
    out: dict[str, frozenset[str]] = {}
    for op in body:
        mine: frozenset[str] = frozenset()
        for name in operands(op):
            mine |= out.get(name, frozenset((name,)) if name in known else frozenset())
        if isinstance(op, Reduce):
            mine -= frozenset(op.axes)
        if isinstance(op, Scan):
            mine |= {op.axis}
        for name in defined(op):
            out[name] = mine
    return out


def prune(body: Iterable[BodyOp]) -> tuple[BodyOp, ...]:
    """Drop every op that no store needs."""
    needed: set[str] = set()
    kept: list[BodyOp] = []
    for op in reversed(tuple(body)):
        if isinstance(op, Store) or any(n in needed for n in defined(op)):
            needed.update(operands(op))
            kept.append(op)
    return tuple(reversed(kept))


def renumber(kernel: Kernel) -> Kernel:
    """Axes i0.. and r0.., values v0.. in order; axes that nothing uses are dropped, and an axis over which nothing runs any more is
    parallel."""
    over = {x for op in kernel.body for x in _axes_of(op)}
    occurring = {n for op in kernel.body for n in operands(op)} | over
    axes, renamed, counts = [], {}, {"parallel": 0, "reduce": 0}
    for axis in kernel.axes:
        if axis.name not in occurring:
            continue
        kind = "reduce" if axis.name in over else "parallel"
        name = f"{'r' if axis.name in over else 'i'}{counts[kind]}"
        counts[kind] += 1
        renamed[axis.name] = Index.of(name)
        axes.append(Axis(name, axis.extent, kind))
    names = {n: f"v{k}" for k, n in enumerate(n for op in kernel.body for n in defined(op))}
    body = tuple(rename(op, names, renamed) for op in kernel.body)
    return replace(kernel, axes=tuple(axes), body=body)


def with_less(kernel: Kernel, body: tuple[BodyOp, ...]) -> Kernel:
    """The kernel with a reduced body, renumbered.  The kernel as it is where a lost reduction would leave points that load an element
    which another of them stores: its axis is parallel then."""
    new = renumber(replace(kernel, body=body))
    lost = sum(x.kind == "reduce" for x in kernel.axes) - sum(x.kind == "reduce" for x in new.axes)
    parallel = {x.name for x in new.axes if x.kind == "parallel"}
    in_place = [s for s in new.stores if s.access.buffer in new.reads]
    return kernel if lost and any(parallel - {n for i in s.access.index for n in i.names()} for s in in_place) else new


def _axes_of(op: BodyOp) -> tuple[str, ...]:
    return op.axes if isinstance(op, Reduce) else (op.axis,) if isinstance(op, Scan) else ()


def bounds(program: Program, kernel: Kernel) -> Bounds:
    """Ranges of the program's symbols and the kernel's axes."""
    return Bounds({s.name: (s.lo, s.hi) for s in program.symbols}, {a.name: a.extent for a in kernel.axes})


def map_kernels(program: Program, change: Callable[[Kernel], Kernel]) -> Program:
    """Apply `change` to every kernel; the same program when nothing changed."""
    steps = tuple(change(s) if isinstance(s, Kernel) else s for s in program.steps)
    return program if all(a is b for a, b in zip(steps, program.steps, strict=True)) else program.with_(steps=steps)


def replace_externs(program: Program, report: Report, fuel: Fuel, replacement: Callable[[Extern], Step | str | None]) -> Program:
    """The program with calls, inside repeats too, as the steps that `replacement` gives for them: None for a call that is not its
    concern, a text for one that it declines.  `report` gets what was done; each step takes fuel."""

    def change(step: Step) -> Step:
        if isinstance(step, Repeat):
            body = tuple(map(change, step.body))
            return step if body == step.body else Repeat(step.name, step.count, body, step.bindings)
        found = replacement(step) if isinstance(step, Extern) else None
        if isinstance(found, str):
            report.refused.append(Refused((step.name,), found))
        if found is None or isinstance(found, str) or not fuel.take():
            return step
        report.rewrites += 1
        report.matched.append(step.name)
        return found

    steps = tuple(map(change, program.steps))
    return program.with_(steps=steps) if report.rewrites else program
