"""An axis over rows that a view made one, taken as the two that it was: `x[i // n, i % n]` for i < m * n is `x[j, k]` for j < m, k < n.

Invariant: the kernel computes and stores the same at the same places; what it stored at `i` it stores at `j * n + k`.
Asked by the walk of fusion for a consumer that reads a producer's rows through such a view: norms of [B, S, H], products of [B * S, H].
"""

from __future__ import annotations

from dataclasses import replace

from flagtree.ir.expression import Quotient, Remainder
from flagtree.ir.index import Index
from flagtree.ir.program import Axis, Kernel, Program
from flagtree.passes.canonicalize import canonical_kernel
from flagtree.passes.rewrite import rename, renumber


def divided(program: Program, kernel: Kernel, buffer: str) -> Kernel | None:
    """The kernel with the axis divided by which it reads `buffer`; None where no axis is read so."""
    for load in kernel.loads:
        for first, second in zip(load.access.index, load.access.index[1:]) if load.access.buffer == buffer else ():
            for axis in kernel.axes:
                size = _size(axis, first, second)
                if size is None:
                    continue
                outer, inner = f"{axis.name}~o", f"{axis.name}~i"
                count = axis.extent // size
                axes = {axis.name: Index.of(outer) * size + Index.of(inner)}
                pair = (Axis(outer, count, axis.kind), Axis(inner, size, axis.kind))
                parts = tuple(p for x in kernel.axes for p in (pair if x is axis else (x,)))
                body = tuple(rename(op, {}, axes) for op in kernel.body)
                return canonical_kernel(program, renumber(replace(kernel, axes=parts, body=body)))
    return None


def _size(axis: Axis, first: Index, second: Index) -> Index | None:
    """n where the two are `axis // n` and `axis % n`, and n divides the extent."""
    if len(first.terms) != 1 or len(second.terms) != 1 or axis.kind != "parallel":
        return None
    ((above, one),), ((below, two),) = first.terms, second.terms
    if (one, two, len(above), len(below)) != (1, 1, 1, 1):
        return None
    quotient, rest = above[0], below[0]
    if not isinstance(quotient, Quotient) or not isinstance(rest, Remainder):
        return None
    size = quotient.den
    same = (rest.num, rest.den) == (quotient.num, size) and quotient.num.name == axis.name
    return size if same and axis.extent // size * size == axis.extent else None
