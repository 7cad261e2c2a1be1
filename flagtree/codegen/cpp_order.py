"""Sums of f32 along a row in the order in which PyTorch's CPU kernel takes them, so that a norm's bits are eager's.

`row_sum` and `multi_row_sum` in aten/src/ATen/native/cpu/SumKernel.cpp, whose vectors hold 8 lanes on every x86 (the kernel is not built
for AVX-512): 32 partial sums, each begun anew after 16 elements; finished ones add up in levels of 16.  templates/cpp_reduce.h joins
the 32 (`in_order`).
"""

from __future__ import annotations

from flagtree.codegen import cpp_ops as ops
from flagtree.ir.program import Reduce

PARTIALS = 32  # 4 vectors of 8 lanes: element e of a row in sum e % 32
FAN = 16  # elements of a partial sum, and sums of one level that the next one takes
BLOCK = FAN * PARTIALS  # elements of a row after which partial sums begin anew
LEVELS = 3  # above the first; the last takes any number


def is_ordered(op: Reduce) -> bool:
    """Eager's order is known, and its result depends on it: a sum carried in f32."""
    return op.ordered and ops.register(op.dtypes[0]) == "f32"


def height(count: int) -> int:
    """The most additions that one term of a sum of `count` goes through: in its partial sum, in each level, 3 vectors behind the last
    whole set of partial sums, the 4 partial sums of a lane, 8 lanes behind up to 7 single elements."""
    blocks = -(-count // BLOCK)
    above = sum(min(FAN, -(-blocks // FAN**k)) for k in range(LEVELS - 1)) + -(-blocks // FAN ** (LEVELS - 1)) if blocks > 1 else 0
    return min(FAN, -(-count // PARTIALS)) + above + 3 + 3 + 8


def levels(longest: int | None) -> int:
    """How many levels of finished sums a row of at most `longest` elements needs; None: of any length."""
    if longest is not None and longest <= BLOCK:
        return 0
    return next((k for k in range(1, LEVELS) if longest is not None and longest < BLOCK * (FAN**k + 1)), LEVELS)
