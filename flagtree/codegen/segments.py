"""Split one axis of a flat kernel where its index expressions change branch, and simplify the body within each piece.

A rotary kernel's `(i + 64) % 128` and `i < 64` become two straight loops; masked-off loads and stores vanish.
Each piece is a body of the same SSA names, so that reductions run through all pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flagtree.ir.flat import FlatKernel, map_indices, operands
from flagtree.ir.index import ZERO, Bounds, Index, Quotient, Remainder, floordiv, remainder
from flagtree.ir.program import Arg, BodyOp, Compute, IndexValue, Load, Reduce, Scan, Store, defined, indices

MAX_POINTS = 7  # more pieces than eight cost more code than they save
COMPARISONS = ("lt", "le", "gt", "ge")


@dataclass(frozen=True, slots=True)
class Segment:
    """Points [lo, hi) of the axis, with the body that is left there."""

    lo: Index
    hi: Index
    body: tuple[BodyOp, ...]


def segments(kernel: FlatKernel, axis: str) -> tuple[Segment, ...]:
    """The pieces of `axis` in order; one piece, simplified by range, when nothing changes branch."""
    extent = kernel.axis(axis).extent
    ends = (ZERO, *breakpoints(kernel, axis), extent)
    pieces = itertools.pairwise(ends)
    return tuple(Segment(lo, hi, specialize(kernel, kernel.bounds.narrowed({axis: (lo, hi - 1)}))) for lo, hi in pieces)


def breakpoints(kernel: FlatKernel, axis: str) -> tuple[Index, ...]:
    """Interior points of `axis`, ascending, at which a division or a comparison of indices changes branch.

    Only points whose order and place strictly inside the axis are proved are returned, at most MAX_POINTS.
    """
    points: list[Index] = []
    extent = kernel.axis(axis).extent
    for point in dict.fromkeys((*_division_points(kernel, axis), *_comparison_points(kernel, axis))):
        inside = kernel.bounds.nonnegative(point - 1) and kernel.bounds.nonnegative(extent - point - 1)
        if not inside or not point.names() <= set(kernel.symbols):
            continue
        below = [p for p in points if kernel.bounds.nonnegative(point - p)]
        above = [p for p in points if p not in below and kernel.bounds.nonnegative(p - point)]
        if len(below) + len(above) == len(points) and point not in points:
            points = [*below, point, *above]
    return tuple(points) if len(points) <= MAX_POINTS else ()


def _division_points(kernel: FlatKernel, axis: str) -> list[Index]:
    out: list[Index] = []
    for op in kernel.body:
        for e in indices(op):
            for atom in _divisions(e):
                out += _atom_points(kernel, axis, atom)
    return out


def _divisions(e: Index) -> list[Quotient | Remainder]:
    found: list[Quotient | Remainder] = []
    for monomial, _ in e.terms:
        for atom in monomial:
            if not isinstance(atom, str):
                found += [atom, *_divisions(atom.num), *_divisions(atom.den)]
    return found


def _atom_points(kernel: FlatKernel, axis: str, atom: Quotient | Remainder) -> list[Index]:
    """Where num = k * den, for num = axis + rest."""
    factor = atom.num.coefficient(axis)
    if factor is None or factor.constant != 1:
        return []
    rest = atom.num - axis
    lowest = kernel.bounds.narrowed({axis: (ZERO, ZERO)}).minimum(atom.num)
    size = kernel.axis(axis).extent.constant
    if atom.den.constant is None or size is None:
        return [atom.den - rest]
    if rest.constant is None or lowest is None:
        return []
    first = rest.constant // atom.den.constant + 1
    count = (rest.constant + size - 1) // atom.den.constant - first + 1
    return [atom.den * k - rest for k in range(first, first + count)] if count <= MAX_POINTS else []


def _comparison_points(kernel: FlatKernel, axis: str) -> list[Index]:
    values = {op.name: op.expr for op in kernel.body if isinstance(op, IndexValue)}
    out: list[Index] = []
    for op in kernel.body:
        if not isinstance(op, Compute) or op.op not in COMPARISONS:
            continue
        difference = _difference(op, values)
        factor = None if difference is None else difference.coefficient(axis)
        if difference is None or factor is None or factor.constant not in (1, -1):
            continue
        at_zero = difference.substitute({axis: ZERO})
        crossing = -at_zero if factor.constant == 1 else at_zero  # the point where both sides are equal
        after = (op.op in ("lt", "ge")) == (factor.constant == 1)  # does equality belong to the upper piece?
        out.append(crossing if after else crossing + 1)
    return out


def _difference(op: Compute, values: Mapping[str, Index]) -> Index | None:
    sides = [values.get(a) if isinstance(a, str) else Index.of(a) if isinstance(a, int) else None for a in op.args]
    left, right = sides
    return None if left is None or right is None else left - right


def specialize(kernel: FlatKernel, bounds: Bounds) -> tuple[BodyOp, ...]:
    """The body under narrower ranges: indices simplified, decided comparisons folded, masked-off accesses and dead values dropped."""
    values: dict[str, Index] = {}
    known: dict[str, Arg] = {}
    out: list[BodyOp] = []
    for op in kernel.body:
        op = map_indices(op, lambda e: settle(e, bounds))
        if isinstance(op, IndexValue):
            values[op.name] = op.expr
        if isinstance(op, Compute):
            op = replace(op, args=tuple(known.get(a, a) if isinstance(a, str) else a for a in op.args))
            folded = _fold(op, values, bounds)
            if folded is not None:
                if isinstance(folded, (bool, str)):
                    known[op.name] = folded
                op = Compute(op.name, op.dtype, "cast", (folded,))  # of a literal or of its own dtype: no code
        elif isinstance(op, (Load, Store)) and op.access.mask in known:
            masked = _masked(op, known[op.access.mask])
            if masked is None:
                continue
            op = masked
        out.append(op)
    return _live(out)


def settle(e: Index, bounds: Bounds) -> Index:
    """`e` with each division whose quotient is one integer over the whole range replaced by what it equals."""
    if all(isinstance(a, str) for m, _ in e.terms for a in m):
        return e
    out = ZERO
    for monomial, c in e.terms:
        product = Index.of(c)
        for atom in monomial:
            product = product * (Index.of(atom) if isinstance(atom, str) else _settle_division(atom, bounds))
        out = out + product
    return bounds.simplify(out)


def _settle_division(atom: Quotient | Remainder, bounds: Bounds) -> Index:
    num, den = settle(atom.num, bounds), settle(atom.den, bounds)
    low, high = bounds.minimum(num), bounds.maximum(num)
    if den.constant and low is not None and high is not None and low // den.constant == high // den.constant:
        quotient = low // den.constant
        return Index.of(quotient) if isinstance(atom, Quotient) else num - den * quotient
    return floordiv(num, den, bounds) if isinstance(atom, Quotient) else remainder(num, den, bounds)


def _masked(op: Load | Store, mask: Arg) -> BodyOp | None:
    """The access under a mask that became a literal or another value; None for a store that never happens."""
    if isinstance(mask, str):
        return replace(op, access=replace(op.access, mask=mask))
    if mask:
        unmasked = replace(op, access=replace(op.access, mask=None))
        return replace(unmasked, other=None) if isinstance(unmasked, Load) else unmasked
    return None if isinstance(op, Store) else Compute(op.name, op.dtype, "cast", (0 if op.other is None else op.other,))


def _fold(op: Compute, values: Mapping[str, Index], bounds: Bounds) -> Arg | None:
    """The literal or value that a Compute is known to equal, or None."""
    if op.op in COMPARISONS:
        difference = _difference(op, values)
        return None if difference is None else _decide(op.op, difference, bounds)
    if op.op == "where" and isinstance(op.args[0], bool):
        return op.args[1] if op.args[0] else op.args[2]
    if op.op == "not" and isinstance(op.args[0], bool):
        return not op.args[0]
    if op.op in ("and", "or") and op.dtype == "b1":
        for a, b in (op.args, op.args[::-1]):
            if isinstance(a, bool):
                return b if a == (op.op == "and") else a
    return None


def _decide(op: str, difference: Index, bounds: Bounds) -> bool | None:
    if op in ("gt", "le"):  # l > r is not l <= r; l <= r is l - r - 1 < 0
        difference = difference - 1
    below, above = bounds.nonnegative(-difference - 1), bounds.nonnegative(difference)
    if not below and not above:
        return None
    return below if op in ("lt", "le") else above


def _live(body: list[BodyOp]) -> tuple[BodyOp, ...]:
    """Drop what no store, reduction or scan needs."""
    needed: set[str] = set()
    out: list[BodyOp] = []
    for op in reversed(body):
        if isinstance(op, (Store, Reduce, Scan)) or needed & set(defined(op)):
            needed.update(operands(op))
            out.append(op)
    return tuple(reversed(out))
