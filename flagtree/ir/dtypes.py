"""Element types of the IR: one short name each, with the facts that lowering and code generation ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """`bits` in memory; `kind` is one of float, int, uint, bool; `mantissa` bits stored (floats only)."""

    name: str
    bits: int
    kind: str
    mantissa: int = 0

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integral(self) -> bool:
        """Integers and bool, as PyTorch counts them."""
        return self.kind in ("int", "uint", "bool")

    def __str__(self) -> str:
        return self.name


_ALL = (
    DType("b1", 8, "bool"),
    DType("u8", 8, "uint"),
    DType("i8", 8, "int"),
    DType("i16", 16, "int"),
    DType("i32", 32, "int"),
    DType("i64", 64, "int"),
    DType("f16", 16, "float", 10),
    DType("bf16", 16, "float", 7),
    DType("f32", 32, "float", 23),
    DType("f64", 64, "float", 52),
    DType("f8e4m3fn", 8, "float", 3),
    DType("f8e5m2", 8, "float", 2),
)
DTYPES: dict[str, DType] = {d.name: d for d in _ALL}

# torch's own names, so that the runtime can translate without importing the IR's users
TORCH_NAMES: dict[str, str] = {
    "b1": "bool", "u8": "uint8", "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64",
    "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2",
}  # fmt: skip


def opmath(dtype: str) -> str:
    """The type in which ATen computes one op on `dtype` (`at::opmath_type`): f32 for the half-width floats."""
    d = DTYPES[dtype]
    return "f32" if d.is_float and d.bits < 32 else dtype


def round_e4m3(value: float) -> float:
    """The nearest of e4m3fn's numbers: 4 significant bits, the last at least 2^-9, ties to even.  What lies beyond 448 becomes 448,
    infinity too, as in PyTorch: the format has none (OCP 8-bit Floating Point Specification, revision 1.0, saturating mode)."""
    if math.isnan(value) or abs(value) >= 448:
        return math.nan if math.isnan(value) else math.copysign(448.0, value)
    quantum = 2.0 ** max(math.frexp(value)[1] - 4, -9)
    return math.copysign(round(value / quantum) * quantum, value)
