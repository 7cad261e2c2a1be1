"""Points of a kernel's domain: all of them, or the first, the last and random ones, as coordinates by parallel axis.

The order is the domain's own, innermost axis fastest.  Read by check/examine.py and check/upper_native.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch

from flagtree.ir.program import Compute, IndexValue, Kernel, Load, Program, Reduce, Scan, Store, defined

Tensor = torch.Tensor


def kernel_of(program: Program) -> Kernel:
    """The one kernel of an isolated program."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return kernel


def all_points(kernel: Kernel, symbols: Mapping[str, int]) -> dict[str, Tensor]:
    """Every point; each parallel axis to an int64 tensor of its coordinates."""
    return coordinates(kernel, symbols, torch.arange(count(kernel, symbols)))


def some_points(kernel: Kernel, symbols: Mapping[str, int], wanted: int, seed: int) -> dict[str, Tensor]:
    """At most about `wanted` points: a quarter of them from the start of the domain, a quarter up to its end, the rest at random."""
    total = count(kernel, symbols)
    if total <= wanted:
        return all_points(kernel, symbols)
    ends = max(1, wanted // 4)
    middle = random.Random(seed).sample(range(total), max(1, wanted - 2 * ends))
    return coordinates(kernel, symbols, torch.tensor(sorted({*range(ends), *range(total - ends, total), *middle})))


def count(kernel: Kernel, symbols: Mapping[str, int]) -> int:
    """The number of points of the parallel axes."""
    return math.prod(a.extent.evaluate(symbols) for a in kernel.axes if a.kind != "reduce")


def coordinates(kernel: Kernel, symbols: Mapping[str, int], places: Tensor) -> dict[str, Tensor]:
    """The coordinates of the points at `places` in the domain's order."""
    out: dict[str, Tensor] = {}
    for axis in reversed([a for a in kernel.axes if a.kind != "reduce"]):
        extent = axis.extent.evaluate(symbols)
        out[axis.name] = places % max(1, extent)
        places = places // max(1, extent)
    return dict(reversed(out.items()))


def reduced(kernel: Kernel, symbols: Mapping[str, int]) -> int:
    """The most elements that one value holds at one point of the parallel axes: of the reduced axes that it depends on together."""
    extents = {a.name: a.extent.evaluate(symbols) for a in kernel.axes if a.kind == "reduce"}
    of: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in extents}
    most = 1
    for op in kernel.body:
        read: set[str] = set()
        match op:
            case Load() | Store():
                read = {n for e in op.access.index for n in e.names()} | {op.access.mask or ""}
                read |= {op.value} if isinstance(op, Store) else set()
            case Compute():
                read = {a for a in op.args if isinstance(a, str)}
            case IndexValue():
                read = set(op.expr.names())
            case Reduce():
                read = {*op.args, *op.axes}
            case Scan():
                read = {op.arg, op.axis}
        axes: frozenset[str] = frozenset().union(*(of[n] for n in read if n in of))
        most = max(most, math.prod(extents[a] for a in axes))
        of |= dict.fromkeys(defined(op), axes - set(op.axes) if isinstance(op, Reduce) else axes)
    return most
