"""Input values that depend on nothing but buffer, seed and position, so that a tensor of any size can be filled where it is read.

Equal (buffer, seed, kind, position) gives an equal value whatever the rest of the tensor is; neighbouring rows differ.  Used by
check/sparse.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from flagtree.check.domains import WITHIN, Limits, arranged
from flagtree.check.inputs import value_limits
from flagtree.check.regimes import RARE, shaped
from flagtree.check.scattered import between, scattered
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Kernel, Program

Tensor = torch.Tensor


class Positions:
    """The values of one isolated kernel's buffers at given sizes: near normal floats of a kind (check/regimes.py), integers of their
    domains."""

    def __init__(self, program: Program, symbols: Mapping[str, int], seed: int, kind: str = "ordinary") -> None:
        kernel = program.steps[0]
        assert isinstance(kernel, Kernel)
        self.kind = kind
        self.limits: dict[str, Limits] = value_limits(program, kernel, symbols)
        self.dtypes = {b.name: b.dtype for b in program.buffers}
        self.counts = {b.name: math.prod(n.evaluate(symbols) for n in b.shape) for b in program.buffers}
        self.keys = {b.name: seed * 1009 + number for number, b in enumerate(program.buffers)}

    def whole(self, buffer: str) -> Tensor:
        """Every element of a buffer that lies densely."""
        return self.at(buffer, torch.arange(self.counts[buffer]))

    def at(self, buffer: str, offsets: Tensor) -> Tensor:
        """The values at element `offsets` (int64, one-dimensional) of `buffer`, in its dtype."""
        facts, limits = DTYPES[self.dtypes[buffer]], self.limits[buffer]
        key = self.keys[buffer]
        bits = scattered(offsets, key)
        if facts.is_float:
            return self._floats(bits, facts.name, limits.positive)
        if facts.kind == "bool":
            return (bits & 1).to(torch.bool)
        if limits.kind != WITHIN:
            return arranged(limits, offsets, self.counts[buffer], key).to(torch_dtype(facts.name))
        return between(bits, limits.low, max(limits.low, limits.high) + 1).to(torch_dtype(facts.name))

    def _floats(self, bits: Tensor, dtype: str, positive: bool) -> Tensor:
        fields = sum(((bits >> shift) & 0xFFFF).to(torch.float64) for shift in (0, 16, 32, 48))
        assert isinstance(fields, Tensor)
        normal = (fields / 65536 - 2) * 3**0.5  # four uniform numbers: mean 0, variance 1

        def integers(low: int, high: int) -> Tensor:
            return between(scattered(bits, 1), low, high)

        found = shaped(self.kind, normal, integers, lambda: between(scattered(bits, 2), 0, RARE) == 0, dtype, positive)
        return found.to(torch_dtype(dtype))
