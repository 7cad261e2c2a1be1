"""Input values that depend on nothing but buffer, seed and position, so that a tensor of any size can be filled where it is read.

Equal (buffer, seed, position) gives an equal value whatever the rest of the tensor is; neighbouring rows differ.  Used by check/upper.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flagtree.check.inputs import Limits, value_limits
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Kernel, Program

Tensor = torch.Tensor
_STEP, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Positions:
    """The ordinary values of one isolated kernel's buffers at given sizes: near normal floats, integers that keep accesses in bounds."""

    def __init__(self, program: Program, symbols: Mapping[str, int], seed: int) -> None:
        kernel = program.steps[0]
        assert isinstance(kernel, Kernel)
        self.limits: dict[str, Limits] = value_limits(program, kernel, symbols)
        self.dtypes = {b.name: b.dtype for b in program.buffers}
        self.keys = {b.name: seed * 1009 + number for number, b in enumerate(program.buffers)}

    def at(self, buffer: str, offsets: Tensor) -> Tensor:
        """The values at element `offsets` (int64, one-dimensional) of `buffer`, in its dtype."""
        facts, limits = DTYPES[self.dtypes[buffer]], self.limits[buffer]
        bits = scattered(offsets, self.keys[buffer])
        if facts.is_float:
            fields = sum(((bits >> shift) & 0xFFFF).to(torch.float64) for shift in (0, 16, 32, 48))
            assert isinstance(fields, Tensor)
            normal = (fields / 65536 - 2) * 3**0.5  # four uniform numbers: mean 0, variance 1
            return (normal.abs() + 1 / 16 if limits.positive else normal).to(torch_dtype(facts.name))
        if facts.kind == "bool":
            return (bits & 1).to(torch.bool)
        span = max(limits.low, limits.high) - limits.low + 1
        return (limits.low + ((bits >> 1) & (2**62 - 1)) % span).to(torch_dtype(facts.name))


def scattered(positions: Tensor, key: int) -> Tensor:
    """64 well mixed bits for each position: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16)."""
    z = positions * _STEP + scramble(key)
    z = (z ^ _right(z, 30)) * _FIRST
    z = (z ^ _right(z, 27)) * _SECOND
    return z ^ _right(z, 31)


def scramble(key: int) -> int:
    """A key spread over the signed 64-bit integers."""
    return (key * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % (1 << 64) - (1 << 63)


def _right(value: Tensor, count: int) -> Tensor:
    """A logical shift; torch's is arithmetic."""
    return (value >> count) & ((1 << (64 - count)) - 1)
