"""Canonical form: views become indices, casts and common subexpressions fold, dead code goes.

Each rule is one small function over a kernel's body; none changes a single bit of any result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import Bounds, Index
from flagtree.ir.program import BodyOp, Buffer, Compute, Extern, IndexValue, Kernel, Load, Program, Reduce, Repeat, Scan, Store, defined
from flagtree.ir.verify import unproved
from flagtree.passes.base import Fuel, Refused, Report
from flagtree.passes.common_kernels import join_equal_kernels
from flagtree.passes.halves import complementary_loads, complementary_selects
from flagtree.passes.rewrite import bounds, dtypes_of, map_kernels, prune, rename, with_less
from flagtree.passes.views import through_views
from flagtree.targets.base import Target


@dataclass(frozen=True)
class Canonicalize:
    """Runs its rules on every kernel once, then drops what nobody reads."""

    name: ClassVar[str] = "canonicalize"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report = Report(self.name)

        def change(kernel: Kernel) -> Kernel:
            new = canonical_kernel(program, kernel)
            if new is not kernel and (why := unproved(program, new)) is not None:
                report.refused.append(Refused((kernel.name,), f"its canonical form cannot be proved: {why}"))
                return kernel
            report.rewrites += new is not kernel
            return new

        new = drop_dead(join_equal_kernels(map_kernels(program, change)))
        report.rewrites += new is not program
        return new, report


def canonical_kernel(program: Program, kernel: Kernel) -> Kernel:
    """All body rules, in order; the same object when none applied."""
    ranges = bounds(program, kernel)
    body = _plain_indices(kernel.body, ranges)
    body = through_views(program, replace(kernel, body=body), ranges)
    body = _fold_casts(body)
    body = _common_subexpressions(body)
    body = complementary_loads(body, {a.name: a.extent for a in kernel.axes})
    body = prune(complementary_selects(body))
    if body == kernel.body:
        return kernel
    new = with_less(kernel, body)
    return kernel if (new.body, new.axes) == (kernel.body, kernel.axes) else new


# -- indices ---------------------------------------------------------------------------------------------------------
def _plain_indices(body: tuple[BodyOp, ...], ranges: Bounds) -> tuple[BodyOp, ...]:
    """An SSA integer that is an index expression is written out; divisions simplify by range."""
    known: dict[str, Index] = {}

    def plain(index: Index) -> Index:
        return ranges.simplify(index.substitute(known))

    out: list[BodyOp] = []
    for op in body:
        if isinstance(op, (Load, Store)):
            op = replace(op, access=replace(op.access, index=tuple(plain(i) for i in op.access.index)))
        elif isinstance(op, IndexValue):
            op = replace(op, expr=plain(op.expr))
            if op.dtype == "i64":
                known[op.name] = op.expr
        out.append(op)
    return tuple(out)


# -- casts -----------------------------------------------------------------------------------------------------------
def exact_cast(source: str, target: str) -> bool:
    """Does every value of `source` survive the conversion?"""
    a, b = DTYPES[source], DTYPES[target]
    if a.is_float and b.is_float:
        return b.mantissa >= a.mantissa and b.bits > a.bits
    if a.kind == "bool":
        return b.kind != "bool"
    return a.kind == b.kind and b.bits > a.bits


def _fold_casts(body: tuple[BodyOp, ...]) -> tuple[BodyOp, ...]:
    """x -> y -> z loses the middle step when x -> y is exact; a cast to the same type is its operand."""
    dtype = {n: t for op in body for n, t in zip(defined(op), dtypes_of(op), strict=True)}
    source: dict[str, str] = {}  # a cast's name -> its operand
    same: dict[str, str] = {}
    out: list[BodyOp] = []
    for op in body:
        op = rename(op, same)
        if isinstance(op, Compute) and op.op == "cast" and isinstance(op.args[0], str):
            arg = op.args[0]
            while arg in source and exact_cast(dtype[source[arg]], dtype[arg]):
                arg = source[arg]
            if dtype[arg] == op.dtype:
                same[op.name] = arg
                continue
            source[op.name] = arg
            op = replace(op, args=(arg,))
        out.append(op)
    return tuple(out)


# -- common subexpressions -------------------------------------------------------------------------------------------
def _common_subexpressions(body: tuple[BodyOp, ...]) -> tuple[BodyOp, ...]:
    """Equal ops are one; a load is not carried over a store to its buffer."""
    seen: dict[object, BodyOp] = {}
    same: dict[str, str] = {}
    out: list[BodyOp] = []
    for op in body:
        op = rename(op, same)
        if isinstance(op, Store):
            seen = {k: v for k, v in seen.items() if not (isinstance(v, Load) and v.access.buffer == op.access.buffer)}
            out.append(op)
            continue
        key = identity(op)
        first = seen.setdefault(key, op)
        if first is op:
            out.append(op)
        else:
            same.update(zip(defined(op), defined(first), strict=True))
    return tuple(out)


def identity(op: BodyOp) -> object:
    """Everything but the name; literals by text, since 0.0 == -0.0 and 1 == True in Python."""
    if isinstance(op, Load):
        return ("load", op.access, repr(op.other))
    if isinstance(op, Compute):
        return (op.op, op.dtype, tuple(a if isinstance(a, str) else (type(a), repr(a)) for a in op.args))
    if isinstance(op, IndexValue):
        return ("index", op.dtype, op.expr)
    if isinstance(op, Reduce):
        return ("reduce", op.combiner, op.args, op.axes, op.ordered)
    assert isinstance(op, Scan)
    return ("scan", op.combiner, op.arg, op.axis)


# -- dead code -------------------------------------------------------------------------------------------------------
def drop_dead(program: Program) -> Program:
    """Remove stores that nobody reads, kernels without stores, pure externs without readers, buffers without users."""
    live = {program.root(n) for n in program.outputs}
    steps = []
    for step in reversed(program.steps):
        if isinstance(step, Kernel):
            kept = tuple(op for op in step.body if not isinstance(op, Store) or _escapes(program, op.access.buffer, live))
            if not any(isinstance(op, Store) for op in kept):
                continue
            step = step if kept == step.body else with_less(step, prune(kept))
        elif isinstance(step, Extern):
            if not step.mutates and not step.effect and not any(_escapes(program, n, live) for n in step.writes):
                continue
        live.update(program.root(n) for n in step.reads)
        steps.append(step)
    steps.reverse()
    buffers = _used_buffers(program, steps)
    same = len(steps) == len(program.steps) and all(a is b for a, b in zip(steps, program.steps, strict=True))
    if same and len(buffers) == len(program.buffers):
        return program
    return program.with_(steps=tuple(steps), buffers=buffers)


def _escapes(program: Program, name: str, live: set[str]) -> bool:
    root = program.root(name)
    return root in live or program.buffer(root).role != "temp"


def _used_buffers(program: Program, steps: list) -> tuple[Buffer, ...]:
    used = set(program.outputs)
    for step in steps:
        used.update(step.reads, step.writes)
        if isinstance(step, Repeat):
            used.update(f for f, _ in step.bindings)
    for name in tuple(used):  # an alias needs every base on its way to the root
        while (alias := program.buffer(name).alias_of) is not None:
            name = alias.base
            used.add(name)
    return tuple(b for b in program.buffers if b.name in used or (b.role != "temp" and b.alias_of is None))
