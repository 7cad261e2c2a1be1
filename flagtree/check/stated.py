"""The stated errors of generated code: of each function, and of a sum by its length and order.  What gates of the certificate allow.

Invariant: nothing here is measured on the kernel that is judged.  Functions are stated by the code generators (codegen/cpp_math.py,
codegen/triton_math.py); sums follow Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flagtree.check.accuracy import ulp_of
from flagtree.codegen import cpp_gemm, cpp_math, cpp_order, triton_math
from flagtree.codegen.cpp_layout import PARTIALS
from flagtree.codegen.cpp_states import ROW_BLOCK
from flagtree.codegen.cpp_sweeps import BLOCK
from flagtree.codegen.triton_math import Error
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.program import Kernel

Tensor = torch.Tensor
# f64 functions come from the platform's C library: at most 2 ULP (glibc manual, "Known Maximum Errors"); the reference is one too
_DOUBLE = Error(4)


@dataclass(frozen=True, slots=True)
class Stated:
    """`functions`: of f32 arguments, by name.  `threads`: of a program instance, 0 for CPU code.  `contracted`: a matrix product."""

    functions: Mapping[str, Error]
    threads: int
    tiles: Mapping[str, int]
    contracted: bool = False

    def error(self, op: str, dtype: str, result: Tensor, last: Tensor) -> Tensor:
        """A bound of |computed - exact| for the exact float64 `result` of `op` in `dtype` at a last argument `last`; infinite where none
        is stated."""
        stated = _DOUBLE if dtype == "f64" else self.functions.get(op)
        if stated is None:
            return torch.full_like(result, math.inf)
        size = torch.where(torch.isfinite(result), result.abs().clamp(min=stated.floor), 1.0)
        argument = torch.where(torch.isfinite(last), last.abs(), 0.0)
        bound = (stated.ulp + stated.slope * argument) * ulp_of(size, dtype)
        farther = (stated.ulp + stated.beyond * argument.clamp(min=1)) * ulp_of(size, dtype)
        bound = torch.where(argument <= stated.limit, bound, farther)
        return torch.where(torch.isfinite(result), bound, 0.0)

    def height(self, extents: Mapping[str, int]) -> int:
        """The most additions that one term of a sum over these reduced axes (name to extent) goes through.

        CPU: PARTIALS running sums joined in a tree every ROW_BLOCK elements of a row, or in eager's order (cpp_order), or, for a column, a
        running sum of BLOCK rows; whichever is longest; for a matrix product its own running sums, joined once.  GPU: a running sum in
        each thread, a tree over the tile, a running sum over the tiles; for a matrix product one running sum, which no order of matrix
        instructions exceeds.
        """
        count = math.prod(extents.values())
        if self.contracted:
            # one more, because the sum takes each product before its rounding
            partials = 1 if self.threads else cpp_gemm.PARTIALS
            return 1 + -(-count // partials) + math.ceil(math.log2(partials))
        if not self.threads:
            row = -(-min(count, ROW_BLOCK) // min(PARTIALS)) + math.ceil(math.log2(max(PARTIALS))) + -(-count // ROW_BLOCK)
            column = min(count, BLOCK) + -(-count // BLOCK)
            return max(1, min(count, max(row, column, cpp_order.height(count))))
        tile = math.prod(self.tiles.get(name, 1) for name in extents)
        held = math.prod(self.tiles.values())
        in_thread = max(16, -(-held // self.threads))  # a thread holds at least one vector access of 16 bytes
        return max(1, min(count, in_thread + math.ceil(math.log2(max(2, tile))) + -(-count // tile)))


def gamma(height: int, dtype: str) -> float:
    """gamma_h = h u / (1 - h u): a sum of floats of `dtype` in which each term goes through at most h additions differs from the exact
    one by at most gamma_h times the sum of the magnitudes (Higham, section 4.2, (4.4) and (4.6)).  In f64 the reference is as inexact
    as the code, so it counts twice."""
    unit = 2.0 ** -(DTYPES[dtype].mantissa + 1)
    return (2 if dtype == "f64" else 1) * height * unit / (1 - height * unit)


def stated_native(contracted: bool = False) -> Stated:
    """CPU code; `contracted`: of a kernel whose numerics allow contraction."""
    return Stated({name: Error(ulp) for name, ulp in cpp_math.ULP.items()}, 0, {}, contracted)


def stated_gpu(kernel: Kernel, threads: int) -> Stated:
    """Triton code of a scheduled kernel."""
    assert kernel.schedule is not None
    return Stated(triton_math.ERRORS, threads, dict(kernel.schedule.tiles), kernel.numerics.fp_contract)
