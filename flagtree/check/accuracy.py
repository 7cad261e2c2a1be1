"""How far a tensor is from the truth: errors in ULP, root-mean-square errors, shares of equal elements, places of NaN and infinity.

The truth is a float64 tensor of the same shape; nothing here decides whether a kernel is right (check/verdict.py does).
Read by the certificate and by `verify`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flagtree.ir.dtypes import DTYPES, DType

Tensor = torch.Tensor
_BIAS = {5: 15, 8: 127, 11: 1023, 4: 7}  # exponent width to bias, IEEE 754 and OCP FP8


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of the finite elements of one tensor.  `rms` and `magnitude` (mean absolute value of the truth) in the tensor's unit."""

    max_ulp: float
    mean_ulp: float
    rms: float
    magnitude: float


def smallest_normal_exponent(dtype: DType) -> int:
    """Exponent of the smallest normal number: -126 for f32 and bf16, -14 for f16."""
    return 1 - _BIAS[dtype.bits - 1 - dtype.mantissa]


def ulp_of(truth: Tensor, dtype: str) -> Tensor:
    """The unit in the last place of `dtype` at each element of a float64 tensor: 2^(e - mantissa bits) for 2^e <= |x| < 2^(e+1),
    that of the smallest normal number below it (Muller et al., Handbook of Floating-Point Arithmetic, definition of Goldberg)."""
    facts = DTYPES[dtype]
    exponent = torch.frexp(truth)[1] - 1
    exponent = torch.where(truth == 0, smallest_normal_exponent(facts), exponent).clamp(min=smallest_normal_exponent(facts))
    return torch.ldexp(torch.ones_like(truth), exponent - facts.mantissa)


def accuracy(value: Tensor, truth: Tensor, dtype: str) -> Accuracy:
    """Errors of `value` against the float64 `truth`, in ULP of `dtype`, over the elements where both are finite."""
    wide = value.to(torch.float64)
    finite = torch.isfinite(wide) & torch.isfinite(truth)
    wide, right = wide[finite], truth[finite]
    if not right.numel():
        return Accuracy(0.0, 0.0, 0.0, 0.0)
    error = (wide - right).abs()
    ulps = error / ulp_of(right, dtype)
    return Accuracy(float(ulps.max()), float(ulps.mean()), math.sqrt(float(error.square().mean())), float(right.abs().mean()))


def share_within(a: Tensor, b: Tensor, ulps: float, dtype: str) -> float:
    """The share of elements of `a` that lie within `ulps` of `b` (0: equal values), NaN equal to NaN; 1 for no elements."""
    if not a.numel():
        return 1.0
    x, y = a.to(torch.float64), b.to(torch.float64)
    near = (x == y) | (torch.isnan(x) & torch.isnan(y))
    if ulps:
        near = near | ((x - y).abs() <= ulps * ulp_of(torch.where(torch.isfinite(y), y, 0.0), dtype))
    return float(near.to(torch.float64).mean())


def unequal_places(a: Tensor, b: Tensor) -> int:
    """The number of elements where one has a NaN or an infinity and the other has not the same."""
    x, y = a.to(torch.float64), b.to(torch.float64)
    nan = torch.isnan(x) != torch.isnan(y)
    infinite = (torch.isinf(x) | torch.isinf(y)) & (x != y) & ~torch.isnan(x) & ~torch.isnan(y)
    return int((nan | infinite).sum())
