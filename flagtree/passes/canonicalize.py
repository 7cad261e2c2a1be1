"""Canonical form: views become indices, casts and common subexpressions fold, dead code goes.

Each rule is one small function over a kernel's body; none changes a single bit of any result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.facts import Facts
from flagtree.ir.index import ZERO, Bounds, Index, flatten, remainder, unflatten
from flagtree.ir.program import Access, BodyOp, Buffer, Compute, Extern, IndexValue, Kernel, Load, Program, Reduce, Repeat, Scan, Store
from flagtree.ir.verify import unproved
from flagtree.passes.base import Fuel, Refused, Report
from flagtree.passes.common_kernels import join_equal_kernels
from flagtree.passes.rewrite import bounds, defined, dtypes_of, map_kernels, prune, rename, used, with_less
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
    body = _through_views(program, replace(kernel, body=body), ranges)
    body = _fold_casts(body)
    body = _common_subexpressions(body)
    body = _complementary_loads(body, {a.name: a.extent for a in kernel.axes})
    body = prune(_complementary_selects(body))
    if body == kernel.body:
        return kernel
    new = with_less(kernel, body)
    return kernel if (new.body, new.axes) == (kernel.body, kernel.axes) else new


# -- views into indices ----------------------------------------------------------------------------------------------
Limits = dict[str, tuple[Index, Index]]


def _mask_limits(body: tuple[BodyOp, ...], ranges: Bounds) -> dict[str, Limits]:
    """For each mask, the ranges to which it narrows axes: `i3 >= 8` leaves 8 … extent - 1."""
    exprs: dict[str, Index] = {op.name: op.expr for op in body if isinstance(op, IndexValue)}
    out: dict[str, Limits] = {}
    for op in body:
        if not isinstance(op, Compute) or op.dtype != "b1":
            continue
        if op.op == "and":
            out[op.name] = _both(*(out.get(a, {}) if isinstance(a, str) else {} for a in op.args))
        elif op.op in ("lt", "le", "gt", "ge"):
            axis, right = exprs.get(str(op.args[0]), ZERO).name, op.args[1]
            end = exprs.get(right) if isinstance(right, str) else Index.of(int(right))
            if end is not None and axis is not None and axis in ranges.limits:
                lo, hi = ranges.limits[axis]
                out[op.name] = {axis: {"lt": (lo, end - 1), "le": (lo, end), "gt": (end + 1, hi), "ge": (end, hi)}[op.op]}
    return out


def _both(a: Limits, b: Limits) -> Limits:
    """Where both masks speak of one axis, the first one's lower end and the second one's upper end (ge, then lt)."""
    return {**a, **b, **{k: (a[k][0], b[k][1]) for k in a.keys() & b.keys()}}


def _through_views(program: Program, kernel: Kernel, ranges: Bounds) -> tuple[BodyOp, ...]:
    """The body with its views as indices; memory that it stores to is named in one way, so that in place can be told."""
    if all(program.buffer(n).alias_of is None for n in (*kernel.reads, *kernel.writes)):
        return kernel.body
    masks, facts = _mask_limits(kernel.body, ranges), Facts.of(program, kernel)
    body = tuple(_through_view(program, op, ranges, masks, facts) for op in kernel.body)
    before, after = (_places(program, ops) for ops in (kernel.body, body))
    mixed = {program.root(n) for n in kernel.writes}
    mixed = {r for r in mixed if len(after[r]) > len(before[r]) or len({buffer for buffer, _ in after[r]}) > 1}
    pairs = zip(kernel.body, body, strict=True)
    return tuple(old if isinstance(old, (Load, Store)) and program.root(old.access.buffer) in mixed else new for old, new in pairs)


def _places(program: Program, body: tuple[BodyOp, ...]) -> dict[str, set[tuple[str, tuple[Index, ...]]]]:
    """For each memory, the names and indices under which it is touched."""
    out: dict[str, set[tuple[str, tuple[Index, ...]]]] = {}
    for op in body:
        if isinstance(op, (Load, Store)):
            out.setdefault(program.root(op.access.buffer), set()).add((op.access.buffer, op.access.index))
    return out


def _through_view(program: Program, op: BodyOp, ranges: Bounds, masks: dict[str, Limits], facts: Facts) -> BodyOp:
    """An access through an alias becomes an access to the root where its layout is a permuted row-major one."""
    if not isinstance(op, (Load, Store)):
        return op
    ranges = ranges.narrowed(masks[op.access.mask]) if op.access.mask in masks else ranges
    buffer = program.buffer(op.access.buffer)
    if buffer.alias_of is None:
        return op
    root = program.buffer(program.root(buffer.name))
    order = _memory_order(root)
    if order is None or root.dtype != buffer.dtype:
        return op
    offset = flatten(op.access.index, buffer.layout) + _total_offset(program, buffer)
    index: list[Index] = [ZERO] * len(root.shape)
    for d, i in zip(order, unflatten(offset, tuple(root.shape[d] for d in order), ranges), strict=True):
        index[d] = i
    # sizes that do not divide as far as we can prove leave divisions behind: then the view keeps its own strides
    proved = all(ranges.in_range(i, n) for i, n in zip(index, root.shape, strict=True))
    if not proved and (op.access.mask is None or _divisions(index) > _divisions(op.access.index)):
        return op
    if op.access.mask is not None and not all(facts.in_range(i, n, op.access.mask) for i, n in zip(index, root.shape, strict=True)):
        return op
    return replace(op, access=replace(op.access, buffer=root.name, index=tuple(index)))


def _divisions(index: Iterable[Index]) -> int:
    return sum(not isinstance(atom, str) for i in index for m, _ in i.terms for atom in m)


def _total_offset(program: Program, buffer: Buffer) -> Index:
    total = ZERO
    while buffer.alias_of is not None:
        total = total + buffer.alias_of.offset
        buffer = program.buffer(buffer.alias_of.base)
    return total


def _memory_order(root: Buffer) -> tuple[int, ...] | None:
    """Dimensions from the outermost in memory inwards when the buffer is dense, else None."""
    if root.is_contiguous:
        return tuple(range(len(root.shape)))
    dims = [d for d in range(len(root.shape)) if root.shape[d].constant != 1]
    unit = [d for d in range(len(root.shape)) if root.shape[d].constant == 1]
    order: list[int] = []
    step = Index.of(1)
    while dims:
        d = next((d for d in dims if root.layout[d] == step), None)
        if d is None:
            return None
        order.insert(0, d)
        dims.remove(d)
        step = step * root.shape[d]
    return (*unit, *order)


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
def _exact(source: str, target: str) -> bool:
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
            while arg in source and _exact(dtype[source[arg]], dtype[arg]):
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
        key = _identity(op)
        first = seen.setdefault(key, op)
        if first is op:
            out.append(op)
        else:
            same.update(zip(defined(op), defined(first), strict=True))
    return tuple(out)


def _identity(op: BodyOp) -> object:
    """Everything but the name; literals by text, since 0.0 == -0.0 and 1 == True in Python."""
    if isinstance(op, Load):
        return ("load", op.access, repr(op.other))
    if isinstance(op, Compute):
        return (op.op, op.dtype, tuple(a if isinstance(a, str) else (type(a), repr(a)) for a in op.args))
    if isinstance(op, IndexValue):
        return ("index", op.dtype, op.expr)
    if isinstance(op, Reduce):
        return ("reduce", op.combiner, op.args, op.axes)
    assert isinstance(op, Scan)
    return ("scan", op.combiner, op.arg, op.axis)


# -- rotation --------------------------------------------------------------------------------------------------------
def _complementary_loads(body: tuple[BodyOp, ...], extents: dict[str, Index]) -> tuple[BodyOp, ...]:
    """x[i + n - c] where i < c, and x[i - c] where i >= c, are one load x[(i + n - c) % n]: a rotation, as in rotary embedding."""
    ops = {n: op for op in body for n in defined(op)}
    stored = {op.access.buffer for op in body if isinstance(op, Store)}
    loads = [op for op in body if isinstance(op, Load) and op.access.mask and op.access.buffer not in stored]
    for low in loads:
        for high in loads:
            found = _rotation(low, high, ops, extents)
            if found is None or not _halves_only(body, low, high, ops):
                continue
            joined = replace(low, access=Access(low.access.buffer, found), other=None)
            names = {high.name: low.name}
            return tuple(joined if op is low else rename(op, names) for op in _without(body, high, low))
    return body


def _complementary_selects(body: tuple[BodyOp, ...]) -> tuple[BodyOp, ...]:
    """where(i >= c, a, where(i < c, b, z)) is where(i >= c, a, b): the two halves of a concatenation."""
    ops = {n: op for op in body for n in defined(op)}
    out: list[BodyOp] = []
    for op in body:
        if isinstance(op, Compute) and op.op == "where" and isinstance(op.args[2], str):
            inner = ops[op.args[2]]
            if isinstance(inner, Compute) and inner.op == "where":
                high, low = (_threshold(ops[str(m)], sign, ops) for m, sign in ((op.args[0], "ge"), (inner.args[0], "lt")))
                if high is not None and high == low:
                    op = replace(op, args=(op.args[0], op.args[1], inner.args[1]))
        out.append(op)
    return tuple(out)


def _without(body: tuple[BodyOp, ...], gone: Load, kept: Load) -> list[BodyOp]:
    """The body with the later of two loads removed; the earlier place is kept, since uses may stand between."""
    out: list[BodyOp] = []
    placed = False
    for op in body:
        if op is gone or op is kept:
            if not placed:
                out.append(kept)
                placed = True
            continue
        out.append(op)
    return out


def _rotation(low: Load, high: Load, ops: dict[str, BodyOp], extents: dict[str, Index]) -> tuple[Index, ...] | None:
    if low is high or low.access.buffer != high.access.buffer:
        return None
    first, second = _threshold(ops[low.access.mask or ""], "lt", ops), _threshold(ops[high.access.mask or ""], "ge", ops)
    if first is None or first != second:
        return None
    axis, cut = first
    differing = [k for k, (a, b) in enumerate(zip(low.access.index, high.access.index, strict=True)) if a != b]
    extent = extents.get(axis)
    if len(differing) != 1 or extent is None or extent.constant is None:
        return None
    k, i = differing[0], Index.of(axis)
    if low.access.index[k] != i + (extent - cut) or high.access.index[k] != i - cut:
        return None
    index = list(low.access.index)
    index[k] = remainder(i + (extent - cut), extent)
    return tuple(index)


def _halves_only(body: tuple[BodyOp, ...], low: Load, high: Load, ops: dict[str, BodyOp]) -> bool:
    """Is each load's value asked for under its own mask only?  What depends on it must end in a select between the halves."""
    cut = _threshold(ops[low.access.mask or ""], "lt", ops)
    for load, own in ((low, 1), (high, 2)):  # the operand of `where i < c` that holds this half
        tainted = {load.name}
        for op in body:
            if tainted.isdisjoint(used(op)):
                continue
            if not isinstance(op, Compute):
                return False
            allowed = 0
            if op.op == "where" and isinstance(op.args[0], str):
                below, above = (_threshold(ops[op.args[0]], sign, ops) == cut for sign in ("lt", "ge"))
                allowed = own if below else 3 - own if above else 0
            if any(a in tainted for k, a in enumerate(op.args) if k != allowed or not allowed):
                tainted.add(op.name)
    return True


def _threshold(mask: BodyOp, op: str, ops: dict[str, BodyOp]) -> tuple[str, Index] | None:
    """(axis, cut) of a mask that compares an axis with a constant."""
    if not isinstance(mask, Compute) or mask.op != op or not isinstance(mask.args[0], str):
        return None
    left = ops.get(mask.args[0])
    right = mask.args[1]
    if isinstance(right, str):
        constant = ops.get(right)
        if not isinstance(constant, IndexValue):
            return None
        cut = constant.expr
    else:
        cut = Index.of(int(right))
    return (left.expr.name, cut) if isinstance(left, IndexValue) and left.expr.name and cut.constant is not None else None


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
