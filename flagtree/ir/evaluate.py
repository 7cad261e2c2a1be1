"""What each scalar operation and each combiner computes, on torch CPU tensors: the reference meaning of `ir/ops.py`.

Arithmetic in a half or eighth width float is done in f32 and rounded once; integers wrap.  `ir/interp.py` walks kernels
with these; code generators are tested against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy
import torch

from flagtree.errors import IRError
from flagtree.ir.dtypes import DTYPES, TORCH_NAMES, opmath

Tensor = torch.Tensor


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of an IR dtype."""
    return getattr(torch, TORCH_NAMES[name])


IR_NAMES: dict[torch.dtype, str] = {getattr(torch, t): n for n, t in TORCH_NAMES.items()}


def _integer_division(rounding: str) -> Callable[[Tensor, Tensor], Tensor]:
    def divide(a: Tensor, b: Tensor) -> Tensor:
        quotient = torch.div(a, _safe_divisor(b), rounding_mode=rounding)
        return torch.where(b == -1, -a, quotient) if b.dtype.is_signed else quotient

    return divide


def _integer_remainder(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def remainder(a: Tensor, b: Tensor) -> Tensor:
        if b.is_floating_point():
            return function(a, b)
        return function(a, _safe_divisor(b))

    return remainder


def _safe_divisor(b: Tensor) -> Tensor:
    """A divisor 0 (undefined, may stand in a masked-out lane) and the overflow of min // -1 must not trap here."""
    bad = (b == 0) | (b == -1) if b.dtype.is_signed else b == 0
    return torch.where(bad, torch.ones_like(b), b)


def _sqrt(x: Tensor) -> Tensor:
    """Rounded once, as the instruction does it.  torch.sqrt may be a unit off (2.13 with MKL on AVX-512: 0.7% of the elements of f32)."""
    with numpy.errstate(invalid="ignore"):
        return torch.from_numpy(numpy.asarray(numpy.sqrt(x.numpy())))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.true_divide,
    "floordiv": _integer_division("floor"), "truncdiv": _integer_division("trunc"),
    "mod": _integer_remainder(torch.remainder), "fmod": _integer_remainder(torch.fmod),
    "neg": torch.neg, "abs": torch.abs, "min": torch.minimum, "max": torch.maximum,
    "sqrt": _sqrt, "rsqrt": lambda x: 1 / _sqrt(x),
    "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round,
    "copysign": torch.copysign, "sign": torch.sign,
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1,
    "log": torch.log, "log2": torch.log2, "log10": torch.log10, "log1p": torch.log1p,
    "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "tanh": torch.tanh,
    "asin": torch.asin, "acos": torch.acos, "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh,
    "erf": torch.erf, "erfc": torch.erfc, "pow": torch.pow, "atan2": torch.atan2,
    "isnan": torch.isnan, "isinf": torch.isinf,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor, "not": torch.bitwise_not,
    "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift,
    "where": torch.where,
}  # fmt: skip


def compute(op: str, args: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One operation on operands of equal float type (widened by the caller), result in `dtype`."""
    if op == "cast":
        return args[0].to(dtype)
    if op == "bitcast":
        return args[0].contiguous().view(dtype)
    return FUNCTIONS[op](*args).to(dtype)


# -- reductions ------------------------------------------------------------------------------------------------------
def reduce(combiner: str, values: Sequence[Tensor], dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Combine over `dims`, which stay with size 1.  min, max, argmin, argmax of nothing raise IRError."""
    count = math.prod(values[0].shape[d] for d in dims)
    if count == 0 and combiner in ("min", "max", "argmin", "argmax"):
        raise IRError(f"'{combiner}' of an empty domain")
    return REDUCTIONS[combiner](values, dims)


def _prod(values: Sequence[Tensor], dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    out = values[0]
    for d in dims:
        out = out.prod(d, keepdim=True, dtype=out.dtype)
    return (out,)


def _arg(largest: bool) -> Callable[[Sequence[Tensor], tuple[int, ...]], tuple[Tensor, ...]]:
    def reduction(values: Sequence[Tensor], dims: tuple[int, ...]) -> tuple[Tensor, ...]:
        value, index = values
        best = value.amax(dims, keepdim=True) if largest else value.amin(dims, keepdim=True)
        wins = (value == best) | (value != value)  # a NaN wins over all: then best is NaN and equals nothing else
        return best, torch.where(wins, index, torch.iinfo(index.dtype).max).amin(dims, keepdim=True)

    return reduction


def _welford(values: Sequence[Tensor], dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    mean, m2, count = values
    total = count.sum(dims, keepdim=True, dtype=count.dtype)
    weight = count.to(mean.dtype)
    whole = torch.where(total == 0, torch.ones_like(total), total).to(mean.dtype)
    center = (mean * weight).sum(dims, keepdim=True) / whole
    return center, (m2 + weight * (mean - center) ** 2).sum(dims, keepdim=True), total


def _online_softmax(values: Sequence[Tensor], dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    x, s = values
    if math.prod(x.shape[d] for d in dims) == 0:
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
        return x.new_full(shape, -math.inf), s.new_zeros(shape)
    top = x.amax(dims, keepdim=True)
    # equal to the maximum is exp(0), also where both are infinite
    return top, torch.where(x == top, s, s * torch.exp(x - top)).sum(dims, keepdim=True)


REDUCTIONS: dict[str, Callable[[Sequence[Tensor], tuple[int, ...]], tuple[Tensor, ...]]] = {
    "sum": lambda v, d: (v[0].sum(d, keepdim=True, dtype=v[0].dtype),),
    "prod": _prod,
    "min": lambda v, d: (v[0].amin(d, keepdim=True),),
    "max": lambda v, d: (v[0].amax(d, keepdim=True),),
    "any": lambda v, d: (v[0].sum(d, keepdim=True) > 0,),
    "all": lambda v, d: (v[0].logical_not().sum(d, keepdim=True) == 0,),
    "argmin": _arg(False),
    "argmax": _arg(True),
    "welford": _welford,
    "online_softmax": _online_softmax,
}


def scan(combiner: str, value: Tensor, dim: int) -> Tensor:
    """Inclusive running combination; only the combiners of one value."""
    if combiner == "sum":
        return value.cumsum(dim, dtype=value.dtype)
    if combiner == "prod":
        return value.cumprod(dim, dtype=value.dtype)
    if combiner in ("min", "max"):
        return (value.cummin(dim) if combiner == "min" else value.cummax(dim)).values
    if combiner == "any":
        return value.cumsum(dim) > 0
    if combiner == "all":
        return value.logical_not().cumsum(dim) == 0
    raise IRError(f"'{combiner}' cannot scan", why="a scan carries one value")


def accumulator_dtype(dtype: str, accumulator: str) -> torch.dtype:
    """The type in which a combination of values of `dtype` runs: the stated accumulator where it is the wider float."""
    if not DTYPES[dtype].is_float:
        return torch_dtype(dtype)
    wide = opmath(dtype)
    return torch_dtype(accumulator if DTYPES[accumulator].bits > DTYPES[wide].bits else wide)
