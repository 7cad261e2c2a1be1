"""Points of a kernel's domain: all of them, or the first, the last and random ones, as coordinates by parallel axis.

The order is the domain's own, innermost axis fastest.  Read by check/examine.py and check/upper_native.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch

from flagtree.ir.program import Kernel, Program

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
