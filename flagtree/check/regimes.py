"""Kinds of floating point inputs: ordinary ones, and those at which kernels go wrong.

Equal kind, count, generator and dtype give equal bits.  Every kind holds enough ordinary values that a kernel still computes something.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flagtree.check.accuracy import smallest_normal_exponent
from flagtree.ir.dtypes import DTYPES

Tensor = torch.Tensor
SMALL = 2.0**-10  # of ordinary size: an epsilon counts as much as the data, and a wrong one does not show at magnitude 1
KINDS = ("ordinary", "ordinary, small", "wide range", "cancelling", "denormal", "zero", "inf", "NaN")
ORDINARY = frozenset({"ordinary", "ordinary, small"})  # of one magnitude, so that a root-mean-square error means something
RARE = 997  # one special value among so many, at least one


def floats(kind: str, count: int, generator: torch.Generator, dtype: str, positive: bool, inside: range) -> Tensor:
    """`count` numbers of a kind for a buffer of `dtype`, in f32 or f64; `positive`: for the operand of a root or a logarithm; `inside`:
    where the tensor is, in which at least one special value must lie."""
    normal = torch.randn(count, generator=generator, dtype=torch.float64 if DTYPES[dtype].bits == 64 else torch.float32)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    return shaped(kind, normal, integers, lambda: _rare(count, generator, inside), dtype, positive)


def shaped(
    kind: str, normal: Tensor, integers: Callable[[int, int], Tensor], rare: Callable[[], Tensor], dtype: str, positive: bool
) -> Tensor:
    """Numbers of a kind from normal ones: `integers(low, high)` draws as many from low up to and without high, `rare` says which are
    special (about one of RARE)."""
    if positive:
        normal = normal.abs() + 1 / 16
    lowest = smallest_normal_exponent(DTYPES[dtype])
    match kind:
        case "ordinary, small":
            return normal * SMALL
        case "wide range":  # products of two stay in range, sums of squares need not
            return torch.ldexp(normal, integers(lowest // 2, -lowest // 2))
        case "cancelling":  # large values of both signs that differ little in magnitude
            return (64 + normal.abs() / 8) * (1 if positive else 1 - 2 * integers(0, 2))
        case "denormal":
            return torch.ldexp(normal, torch.full(normal.shape, lowest - 2))
        case "zero":
            zero = normal * 0.0 if positive else torch.copysign(torch.zeros_like(normal), normal)
            return torch.where(rare(), normal, zero)
        case "inf":
            return torch.where(rare(), torch.copysign(torch.full_like(normal, math.inf), normal), normal)
        case "NaN":
            return torch.where(rare(), math.nan, normal)
    return normal


def _rare(count: int, generator: torch.Generator, inside: range) -> Tensor:
    chosen = torch.zeros(count, dtype=torch.bool)
    if inside:
        chosen[torch.randint(inside.start, inside.stop, (len(inside) // RARE + 1,), generator=generator)] = True
    return chosen
