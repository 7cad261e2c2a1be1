"""Views become indices: an access through an alias is an access to the memory that it is a view of.

Part of canonicalize.  Memory that a kernel stores to keeps one name and one index form, so that in place can be told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flagtree.ir.facts import Facts
from flagtree.ir.index import ZERO, Bounds, Index, flatten, unflatten
from flagtree.ir.program import BodyOp, Buffer, Compute, IndexValue, Kernel, Load, Program, Store

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


def through_views(program: Program, kernel: Kernel, ranges: Bounds) -> tuple[BodyOp, ...]:
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
