"""Pointwise ATen operators as formulas.

Each formula receives its tensor operands as Values in the op's computing type (`promote`) and its number operands as
they are; the result is rounded to the output's type by the caller.  The formulas are ATen's CPU ones, so that one rounding
at the end gives eager's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flagtree.ir.dtypes import DTYPES
from flagtree.lower.builder import Body, NotLowered, Number, Operand, Value


@dataclass(frozen=True, slots=True)
class Pointwise:
    """`promote`: "result" computes in the output's computing type, "float" the same for ops that turn integers into floats,
    "operands" in the promoted type of the operands (comparisons), "none" leaves operands as loaded."""

    formula: Callable[..., Operand]
    promote: str = "result"


def _integral(v: Operand) -> bool:
    return isinstance(v, Value) and DTYPES[v.dtype].is_integral


def _scaled(b: Body, x: Operand, alpha: Number) -> Operand:
    return x if alpha == 1 else b.op("mul", x, alpha) if isinstance(x, Value) else x * alpha


def _add(b: Body, x: Value, y: Operand, alpha: Number = 1) -> Value:
    if x.dtype == "b1":
        return b.op("or", x, y)
    return x + _scaled(b, y, alpha)


def _mul(b: Body, x: Value, y: Operand) -> Value:
    return b.op("and", x, y) if x.dtype == "b1" else x * y


def _div(b: Body, x: Operand, y: Operand, rounding_mode: str | None = None) -> Operand:
    if rounding_mode is None:
        return b.op("div", x, y)
    if not _integral(x) and not _integral(y):
        if rounding_mode == "trunc":
            return b.op("trunc", b.op("div", x, y))
        raise NotLowered("floor division of floats")
    return _integer_divide(b, "floordiv" if rounding_mode == "floor" else "truncdiv", x, y)


def _integer_divide(b: Body, op: str, x: Operand, y: Operand) -> Value:
    # a zero divisor raises in eager and would trap in a kernel, so only a literal divisor is generated
    if isinstance(y, Value) or y == 0 or not _integral(x):
        raise NotLowered("integer division by a tensor" if isinstance(y, Value) else "floor division of floats")
    return b.op(op, x, y)


def _remainder(b: Body, x: Operand, y: Operand) -> Value:
    return _integer_divide(b, "mod", x, y)


def _fmod(b: Body, x: Operand, y: Operand) -> Value:
    if not _integral(x) or isinstance(y, Value) or y == 0:
        raise NotLowered("fmod of floats or by a tensor")
    return b.op("fmod", x, y)


def _pow(b: Body, x: Operand, p: Operand) -> Operand:
    if isinstance(p, Value) or not isinstance(x, Value):
        if _integral(x) or _integral(p):
            raise NotLowered("integer power of a tensor")
        return b.op("pow", x, p)
    special = {1: lambda: x, 2: lambda: x * x, 3: lambda: x * x * x}
    if p in special:
        return special[int(p)]()
    if _integral(x):
        raise NotLowered("integer power")
    inverse = {0.5: lambda: b.op("sqrt", x), -0.5: lambda: b.op("rsqrt", x), -1: lambda: 1.0 / x, -2: lambda: 1.0 / (x * x)}
    return inverse[p]() if p in inverse else b.op("pow", x, p)


def _clamp(b: Body, x: Value, lo: Operand | None = None, hi: Operand | None = None) -> Value:
    x = x if lo is None else b.op("max", x, lo)
    return x if hi is None else b.op("min", x, hi)


def sigmoid(b: Body, x: Value) -> Value:
    return 1.0 / (1.0 + b.op("exp", -x))


def _gelu(b: Body, x: Value, approximate: str = "none") -> Value:
    if approximate == "tanh":
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + b.op("tanh", inner))
    return 0.5 * x * (1.0 + b.op("erf", x * math.sqrt(0.5)))


def _softplus(b: Body, x: Value, beta: Number = 1, threshold: Number = 20) -> Value:
    scaled = x if beta == 1 else x * beta
    return b.op("where", b.op("gt", scaled, threshold), x, b.op("log1p", b.op("exp", scaled)) / beta)


def _leaky_relu(b: Body, x: Value, slope: Number = 0.01) -> Value:
    return b.op("where", b.op("gt", x, 0), x, x * slope)


def _elu(b: Body, x: Value, alpha: Number = 1, scale: Number = 1, input_scale: Number = 1) -> Value:
    negative = b.op("expm1", x * input_scale) * (alpha * scale)
    return b.op("where", b.op("gt", x, 0), x * scale, negative)


def _logical(op: str) -> Callable[..., Value]:
    def formula(b: Body, *args: Operand) -> Value:
        return b.op(op, *(b.cast(a, "b1") if isinstance(a, Value) else bool(a) for a in args))

    return formula


def _unary(op: str) -> Pointwise:
    return Pointwise(lambda b, x: b.op(op, x), "float")


def _rounding(op: str) -> Pointwise:
    return Pointwise(lambda b, x: x if _integral(x) else b.op(op, x))


def _compare(op: str) -> Pointwise:
    return Pointwise(lambda b, x, y: b.op(op, x, y), "operands")


def _binary(op: str) -> Pointwise:
    return Pointwise(lambda b, x, y: b.op(op, x, y))


def _is_special(op: str) -> Callable[..., Value]:
    return lambda b, x: b.constant(False, "b1") if _integral(x) else b.op(op, x)


def _lerp(b: Body, x: Value, y: Value, w: Operand) -> Value:
    low, high = x + (y - x) * w, y - (y - x) * (1.0 - w)
    if isinstance(w, Value):
        return b.op("where", b.op("lt", b.op("abs", w), 0.5), low, high)
    return low if abs(w) < 0.5 else high


POINTWISE: dict[str, Pointwise] = {
    "aten.add": Pointwise(_add),
    "aten.sub": Pointwise(lambda b, x, y, alpha=1: x - _scaled(b, y, alpha)),
    "aten.rsub": Pointwise(lambda b, x, y, alpha=1: b.op("sub", y, _scaled(b, x, alpha))),
    "aten.mul": Pointwise(_mul),
    "aten.div": Pointwise(_div),
    "aten.floor_divide": Pointwise(lambda b, x, y: _integer_divide(b, "floordiv", x, y)),
    "aten.remainder": Pointwise(_remainder),
    "aten.fmod": Pointwise(_fmod),
    "aten.pow": Pointwise(_pow),
    "aten.square": Pointwise(lambda b, x: x * x),
    "aten.reciprocal": Pointwise(lambda b, x: 1.0 / x, "float"),
    "aten.neg": Pointwise(lambda b, x: -x),
    "aten.abs": Pointwise(lambda b, x: b.op("abs", x)),
    "aten.sign": Pointwise(lambda b, x: b.op("sign", x)),
    "aten.minimum": _binary("min"),
    "aten.maximum": _binary("max"),
    "aten.clamp": Pointwise(_clamp),
    "aten.clamp_min": Pointwise(lambda b, x, lo: _clamp(b, x, lo)),
    "aten.clamp_max": Pointwise(lambda b, x, hi: _clamp(b, x, None, hi)),
    "aten.relu": Pointwise(lambda b, x: b.op("max", x, 0)),
    "aten.relu6": Pointwise(lambda b, x: _clamp(b, x, 0, 6)),
    "aten.hardtanh": Pointwise(lambda b, x, lo=-1, hi=1: _clamp(b, x, lo, hi)),
    "aten.hardswish": Pointwise(lambda b, x: x * _clamp(b, x + 3, 0, 6) / 6),
    "aten.hardsigmoid": Pointwise(lambda b, x: _clamp(b, x + 3, 0, 6) / 6),
    "aten.leaky_relu": Pointwise(_leaky_relu),
    "aten.elu": Pointwise(_elu),
    "aten.sigmoid": Pointwise(sigmoid, "float"),
    "aten.silu": Pointwise(lambda b, x: x / (1.0 + b.op("exp", -x))),
    "aten.gelu": Pointwise(_gelu),
    "aten.softplus": Pointwise(_softplus),
    "aten.mish": Pointwise(lambda b, x: x * b.op("tanh", b.op("log1p", b.op("exp", x)))),
    "aten.lerp": Pointwise(_lerp),
    "aten.addcmul": Pointwise(lambda b, x, y, z, value=1: x + _scaled(b, y, value) * z),
    "aten.addcdiv": Pointwise(lambda b, x, y, z, value=1: x + _scaled(b, y, value) / z),
    "aten.where": Pointwise(lambda b, c, x, y: b.op("where", c, x, y)),
    "aten.masked_fill": Pointwise(lambda b, x, m, value: b.op("where", m, value, x)),
    "aten.isnan": Pointwise(_is_special("isnan"), "operands"),
    "aten.isinf": Pointwise(_is_special("isinf"), "operands"),
    "aten.logical_and": Pointwise(_logical("and"), "none"),
    "aten.logical_or": Pointwise(_logical("or"), "none"),
    "aten.logical_xor": Pointwise(_logical("xor"), "none"),
    "aten.logical_not": Pointwise(_logical("not"), "none"),
    "aten.bitwise_and": _binary("and"),
    "aten.bitwise_or": _binary("or"),
    "aten.bitwise_xor": _binary("xor"),
    "aten.bitwise_not": Pointwise(lambda b, x: b.op("not", x)),
    "aten.copysign": Pointwise(lambda b, x, y: b.op("copysign", x, y), "float"),
    "aten.atan2": Pointwise(lambda b, x, y: b.op("atan2", x, y), "float"),
    **{f"aten.{n}": _compare(n) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"aten.{n}": _rounding(n) for n in ("floor", "ceil", "trunc")},
    **{
        f"aten.{n}": _unary(n)
        for n in (
            "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin", "cos", "tan", "tanh",
            "asin", "acos", "atan", "sinh", "cosh", "erf", "erfc",
        )
    },
}  # fmt: skip
# a rounding digit count is not expressed; only the plain overload is taken
POINTWISE["aten.round"] = _rounding("round")
# operands whose type is not the computing type: position -> type it is loaded as
KEPT_OPERANDS: dict[str, tuple[int, ...]] = {"aten.where": (0,), "aten.masked_fill": (1,)}
REFUSED_OVERLOADS = frozenset({"aten.round.decimals"})
