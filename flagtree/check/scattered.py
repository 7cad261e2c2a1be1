"""Well mixed bits for each position of a tensor, by position and key alone: what inputs of any size are made of where they are read.

Equal (position, key) gives equal bits whatever the rest of the tensor is.  Used by check/positions.py and check/domains.py.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
_STEP, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def scattered(positions: Tensor, key: int) -> Tensor:
    """64 well mixed bits for each position: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16)."""
    z = positions * _STEP + _scramble(key)
    z = (z ^ _right(z, 30)) * _FIRST
    z = (z ^ _right(z, 27)) * _SECOND
    return z ^ _right(z, 31)


def between(bits: Tensor, low: int, high: int) -> Tensor:
    """Integers from `low` up to and without `high`, one for each of the mixed `bits`."""
    return low + ((bits >> 1) & (2**62 - 1)) % (high - low)


def _scramble(key: int) -> int:
    """A key spread over the signed 64-bit integers."""
    return (key * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % (1 << 64) - (1 << 63)


def _right(value: Tensor, count: int) -> Tensor:
    """A logical shift; torch's is arithmetic."""
    return (value >> count) & ((1 << (64 - count)) - 1)
