"""Two halves that masks of one axis tell apart are one: a rotation is one load, a concatenation one select.

Part of canonicalize: what rotary embedding leaves behind.  Nothing is read under a mask that it was not read under before.
"""

from __future__ import annotations

from dataclasses import replace

from flagtree.ir.index import Index, remainder
from flagtree.ir.program import Access, BodyOp, Compute, IndexValue, Load, Store, defined, operands
from flagtree.passes.rewrite import rename


def complementary_loads(body: tuple[BodyOp, ...], extents: dict[str, Index]) -> tuple[BodyOp, ...]:
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


def complementary_selects(body: tuple[BodyOp, ...]) -> tuple[BodyOp, ...]:
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
            if tainted.isdisjoint(operands(op)):
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
