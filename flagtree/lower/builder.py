"""Writes one kernel body: values with Python operators, loads through tensors, stores to the result.

A rule of lowering receives `Value`s already in the type in which ATen computes the op and returns a Value; the
builder adds the rounding at the op's output, so that every rule is one formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagtree.ir.dtypes import DTYPES, opmath
from flagtree.ir.index import ZERO, Index
from flagtree.ir.ops import OPS
from flagtree.ir.program import Access, Axis, BodyOp, Compute, IndexValue, Kernel, Load, Numerics, Reduce, Scan, Store

Number = bool | int | float
_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A buffer seen by a rule: name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[Index, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value under construction; arithmetic on it adds body ops."""

    body: Body
    name: str
    dtype: str

    def __add__(self, other: Operand) -> Value:
        return self.body.op("add", self, other)

    def __radd__(self, other: Number) -> Value:
        return self.body.op("add", other, self)

    def __sub__(self, other: Operand) -> Value:
        return self.body.op("sub", self, other)

    def __rsub__(self, other: Number) -> Value:
        return self.body.op("sub", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.body.op("mul", self, other)

    def __rmul__(self, other: Number) -> Value:
        return self.body.op("mul", other, self)

    def __truediv__(self, other: Operand) -> Value:
        return self.body.op("div", self, other)

    def __rtruediv__(self, other: Number) -> Value:
        return self.body.op("div", other, self)

    def __neg__(self) -> Value:
        return self.body.op("neg", self)


Operand = Value | Number


class Body:
    """One kernel under construction.  `shape` gives the parallel axes i0, i1, …; `reduce_axis` adds r0, r1, …."""

    def __init__(self, shape: Sequence[Index]) -> None:
        self.axes = [Axis(f"i{k}", extent) for k, extent in enumerate(shape)]
        self.ops: list[BodyOp] = []

    # -- axes and names ----------------------------------------------------------------------------------------------
    @property
    def point(self) -> list[Index]:
        """The index of the current point in each parallel dimension (0 where the extent is 1)."""
        return [ZERO if a.extent.constant == 1 else Index.of(a.name) for a in self.axes if a.kind == "parallel"]

    def reduce_axis(self, extent: Index) -> Index:
        axis = Axis(f"r{sum(a.kind == 'reduce' for a in self.axes)}", extent, "reduce")
        self.axes.append(axis)
        return Index.of(axis.name)

    def _name(self) -> str:
        return f"v{len(self.ops)}"

    # -- memory ------------------------------------------------------------------------------------------------------
    def load(self, tensor: Tensor, index: Sequence[Index], mask: Value | None = None, other: Number | None = None) -> Value:
        if mask is not None:
            other = _literal(other or 0, tensor.dtype)
        access = Access(tensor.name, tuple(index), mask.name if mask else None)
        self.ops.append(Load(name := self._name(), tensor.dtype, access, other))
        return Value(self, name, tensor.dtype)

    def broadcast_load(self, tensor: Tensor, point: Sequence[Index] | None = None) -> Value:
        """Load with NumPy's broadcasting of `tensor` against the domain `point` (default: the parallel axes)."""
        point = self.point if point is None else point
        tail = point[len(point) - len(tensor.shape) :]
        return self.load(tensor, [ZERO if n.constant == 1 else i for i, n in zip(tail, tensor.shape, strict=True)])

    def store(self, tensor: Tensor, index: Sequence[Index], value: Operand, mode: str = "set", mask: Value | None = None) -> None:
        value = self.cast(value, tensor.dtype)
        self.ops.append(Store(Access(tensor.name, tuple(index), mask.name if mask else None), value.name, mode))

    def index(self, expr: Index | int, dtype: str = "i64") -> Value:
        self.ops.append(IndexValue(name := self._name(), dtype, Index.of(expr)))
        return Value(self, name, dtype)

    # -- values ------------------------------------------------------------------------------------------------------
    def constant(self, value: Number, dtype: str) -> Value:
        self.ops.append(Compute(name := self._name(), dtype, "cast", (_literal(value, dtype),)))
        return Value(self, name, dtype)

    def cast(self, value: Operand, dtype: str) -> Value:
        if not isinstance(value, Value):
            return self.constant(value, dtype)
        if value.dtype == dtype:
            return value
        if dtype == "b1":
            return self.op("ne", value, 0.0 if DTYPES[value.dtype].is_float else 0)
        self.ops.append(Compute(name := self._name(), dtype, "cast", (value.name,)))
        return Value(self, name, dtype)

    def bitcast(self, value: Value, dtype: str) -> Value:
        """The same bits as another type of as many."""
        self.ops.append(Compute(name := self._name(), dtype, "bitcast", (value.name,)))
        return Value(self, name, dtype)

    def op(self, name: str, *args: Operand) -> Value:
        """Any operation of ir/ops.py; literals take the type of the value operands."""
        values = [a for a in args if isinstance(a, Value)]
        dtype = next((a.dtype for a in (args[1:] if name == "where" else args) if isinstance(a, Value)), values[0].dtype)
        result = "b1" if OPS[name].result == "b1" else dtype
        operands = tuple(a.name if isinstance(a, Value) else _literal(a, dtype) for a in args)
        self.ops.append(Compute(out := self._name(), result, name, operands))
        return Value(self, out, result)

    def reduce(self, combiner: str, *args: Value, axes: Sequence[Index], ordered: bool = False) -> list[Value]:
        base = self._name()
        names, dtypes = tuple(base if k == 0 else f"{base}_{k}" for k in range(len(args))), tuple(a.dtype for a in args)
        self.ops.append(Reduce(names, dtypes, combiner, tuple(a.name for a in args), tuple(str(x) for x in axes), ordered))
        return [Value(self, n, a.dtype) for n, a in zip(names, args, strict=True)]

    def scan(self, combiner: str, arg: Value, axis: Index) -> Value:
        self.ops.append(Scan(name := self._name(), arg.dtype, combiner, arg.name, str(axis)))
        return Value(self, name, arg.dtype)

    def kernel(self, name: str, **fields: object) -> Kernel:
        accumulator = "f64" if any("f64" in op.dtypes for op in self.ops if isinstance(op, Reduce)) else "f32"
        return Kernel(name, tuple(self.axes), tuple(self.ops), Numerics(accumulator=accumulator), **fields)  # type: ignore[arg-type]


class NotLowered(Exception):
    """A rule declines; the call becomes an extern with this reason."""


def _literal(value: Number, dtype: str) -> Number:
    """The number in the operands' type.  One that an integer type cannot hold wraps, compares or fails as only ATen knows."""
    kind = DTYPES[dtype]
    low = -(1 << (kind.bits - 1)) if kind.kind == "int" else 0
    if kind.kind in ("int", "uint") and not low <= int(value) < low + (1 << kind.bits):
        raise NotLowered(f"the number {value} does not fit {dtype}")
    return float(value) if kind.is_float else bool(value) if dtype == "b1" else int(value)


def compute_type(dtype: str) -> str:
    """The type in which one ATen op on `dtype` computes."""
    return opmath(dtype)
