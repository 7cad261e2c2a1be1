"""Reductions, softmaxes and running sums: one kernel each, over a domain of kept (parallel) and reduced axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import ONE, ZERO, Index
from flagtree.lower.builder import Body, NotLowered, Tensor, Value, compute_type

if TYPE_CHECKING:
    from flagtree.lower.lowering import Call, Lowering

Rule = Callable[["Lowering", "Call"], None]


@dataclass
class Rows:
    """A reduction in the making: `index` addresses x over the body's axes, `reduced` are the axes that Reduce takes, `count` points."""

    body: Body
    x: Tensor
    index: list[Index]
    reduced: list[Index]
    dims: list[int]
    count: Index

    @staticmethod
    def over(x: Tensor, dims: Sequence[int]) -> Rows:
        """The plain case: dimensions `dims` of x are reduced, the others are parallel."""
        rank = len(x.shape)
        reduced_dims = sorted({d % rank for d in dims}) if rank else []
        kept = [d for d in range(rank) if d not in reduced_dims]
        body = Body([x.shape[d] for d in kept])
        index: list[Index] = [ZERO] * rank
        for position, d in zip(body.point, kept, strict=True):
            index[d] = position
        count = ONE
        for d in reduced_dims:
            index[d] = body.reduce_axis(x.shape[d])
            count = count * x.shape[d]
        return Rows(body, x, index, [index[d] for d in reduced_dims], reduced_dims, count)

    def load(self, dtype: str | None = None) -> Value:
        return self.body.cast(self.body.load(self.x, self.index), dtype or compute_type(self.x.dtype))

    def at(self, tensor: Tensor, dims: Sequence[int]) -> Value:
        """Load a vector (weight, bias) indexed by some dimensions of x."""
        return self.load_of(tensor, [self.index[d] for d in dims])

    def load_of(self, tensor: Tensor, index: Sequence[Index]) -> Value:
        """Load another tensor in its computing type."""
        return self.body.cast(self.body.load(tensor, index), compute_type(tensor.dtype))

    def reduce(self, combiner: str, *values: Value, ordered: bool = False) -> list[Value]:
        if not self.reduced:
            raise NotLowered("reduction of a scalar")
        return self.body.reduce(combiner, *values, axes=self.reduced, ordered=ordered)

    def mean(self, value: Value, ordered: bool = False) -> Value:
        """`ordered`: eager's own call is a mean, too."""
        return self.reduce("sum", value, ordered=ordered)[0] / self.size(value.dtype)

    def size(self, dtype: str) -> float | Value:
        """Number of points that are reduced."""
        n = self.count.constant
        return float(n) if n is not None else self.body.cast(self.body.index(self.count), dtype)

    def kept_index(self, out: Tensor) -> list[Index]:
        """Where a row's result goes, with or without kept dimensions of size 1."""
        if len(out.shape) == len(self.index):
            return [ZERO if d in self.dims else self.index[d] for d in range(len(self.index))]
        return [self.index[d] for d in range(len(self.index)) if d not in self.dims]


def _dims(call: Call, x: Tensor, position: int = 1) -> list[int]:
    dims = call.argument(position, "dim")
    if dims is None or dims == []:
        return list(range(len(x.shape)))
    return [dims] if isinstance(dims, int) else list(dims)


def _sum(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    rows = Rows.over(x, _dims(call, x))
    value = rows.load(compute_type(out.dtype))
    total = rows.reduce("sum", value, ordered=True)[0]
    rows.body.store(out, rows.kept_index(out), total)
    call.emit(rows.body)


def _mean(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    rows = Rows.over(x, _dims(call, x))
    rows.body.store(out, rows.kept_index(out), rows.mean(rows.load(compute_type(out.dtype)), ordered=True))
    call.emit(rows.body)


def _extreme(combiner: str) -> Rule:
    def rule(lowering: Lowering, call: Call) -> None:
        x, out = call.tensor(0), call.out()
        rows = Rows.over(x, _dims(call, x))
        rows.body.store(out, rows.kept_index(out), rows.reduce(combiner, rows.load(x.dtype))[0])
        call.emit(rows.body)

    return rule


def _extreme_dim(combiner: str) -> Rule:
    """max.dim, min.dim: (values, indices)."""

    def rule(lowering: Lowering, call: Call) -> None:
        if not isinstance(call.argument(1, "dim"), int):
            raise NotLowered("no dimension")
        x = call.tensor(0)
        rows = Rows.over(x, [call.argument(1, "dim")])
        value, index = rows.reduce(combiner, rows.load(x.dtype), rows.body.index(rows.reduced[0] if rows.reduced else ZERO))
        for out, result in zip(call.outs(), (value, index), strict=True):
            if out is not None:
                rows.body.store(out, rows.kept_index(out), result)
        call.emit(rows.body)

    return rule


def _arg_extreme(combiner: str) -> Rule:
    def rule(lowering: Lowering, call: Call) -> None:
        dim = call.argument(1, "dim")
        if dim is None:
            raise NotLowered("index into the flattened tensor")
        x, out = call.tensor(0), call.out()
        rows = Rows.over(x, [dim])
        _, index = rows.reduce(combiner, rows.load(x.dtype), rows.body.index(rows.reduced[0] if rows.reduced else ZERO))
        rows.body.store(out, rows.kept_index(out), index)
        call.emit(rows.body)

    return rule


def _logical(combiner: str) -> Rule:
    def rule(lowering: Lowering, call: Call) -> None:
        x, out = call.tensor(0), call.out()
        rows = Rows.over(x, _dims(call, x))
        value = rows.body.cast(rows.load(x.dtype), "b1")
        rows.body.store(out, rows.kept_index(out), rows.reduce(combiner, value)[0])
        call.emit(rows.body)

    return rule


def variance(rows: Rows, value: Value, correction: float) -> tuple[Value, Value]:
    """(variance, mean) in two passes over the row: as exact as Welford's and without its divisions."""
    mean = rows.mean(value)
    delta = value - mean
    total = rows.reduce("sum", delta * delta)[0]
    count = rows.size(value.dtype)
    if isinstance(count, float):
        return total / max(count - correction, 0.0), mean
    return total / rows.body.op("max", count - correction, 0.0), mean


def _var(root: bool, with_mean: bool) -> Rule:
    def rule(lowering: Lowering, call: Call) -> None:
        x = call.tensor(0)
        correction = call.argument(99, "correction")
        rows = Rows.over(x, _dims(call, x))
        var, mean = variance(rows, rows.load(), 1.0 if correction is None else float(correction))
        if root:
            var = rows.body.op("sqrt", var)
        for out, value in zip(call.outs(), (var, mean) if with_mean else (var,), strict=True):
            if out is not None:
                rows.body.store(out, rows.kept_index(out), value)
        call.emit(rows.body)

    return rule


def _softmax(log: bool, safe: bool = False) -> Rule:
    """`safe`: a row that is masked whole, minus infinity everywhere, gives zeros."""

    def rule(lowering: Lowering, call: Call) -> None:
        x, out = call.tensor(0), call.out()
        if not DTYPES[out.dtype].is_float:
            raise NotLowered("softmax of integers")
        if not x.shape:
            raise NotLowered("softmax of a scalar")
        rows = Rows.over(x, [call.argument(1, "dim")])
        b = rows.body
        # with a dtype argument ATen casts first
        value = b.cast(b.load(x, rows.index), compute_type(out.dtype))
        top = rows.reduce("max", value)[0]
        shifted = value - (b.op("where", b.op("eq", top, -math.inf), 0.0, top) if safe else top)
        total = rows.reduce("sum", b.op("exp", shifted))[0]
        y = shifted - b.op("log", total) if log else b.op("exp", shifted) / total
        b.store(out, rows.index, b.op("where", b.op("eq", total, 0.0), 0.0, y) if safe else y)
        call.emit(b)

    return rule


def _logsumexp(lowering: Lowering, call: Call) -> None:
    """Composed by ATen of calls that each round to its type (ATen/native/ReduceOps.cpp, logsumexp_out_impl)."""
    x, out = call.tensor(0), call.out()
    rows = Rows.over(x, _dims(call, x))
    b, wide = rows.body, compute_type(out.dtype)

    def rounded(value: Value) -> Value:
        return b.cast(b.cast(value, out.dtype), wide)

    value = rows.load(wide)
    top = rows.reduce("max", value)[0]
    top = b.op("where", b.op("isinf", top), 0.0, top)  # an infinite maximum is not subtracted
    total = rows.reduce("sum", rounded(b.op("exp", rounded(value - top))))[0]
    b.store(out, rows.kept_index(out), rounded(b.op("log", rounded(total))) + top)
    call.emit(b)


def _cumsum(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    if not x.shape:
        raise NotLowered("cumsum of a scalar")
    dim = call.argument(1, "dim") % len(x.shape)
    rows = Rows.over(x, [] if x.shape[dim].constant == 1 else [dim])
    # ATen's CPU accumulator: double for float, float for the half types
    value = rows.load({"f32": "f64"}.get(out.dtype, compute_type(out.dtype)))
    total = rows.body.scan("sum", value, rows.reduced[0]) if rows.reduced else value
    rows.body.store(out, rows.index, total)
    call.emit(rows.body)


REDUCTIONS: dict[str, Rule] = {
    "aten.sum": _sum,
    "aten.mean": _mean,
    "aten.amax": _extreme("max"),
    "aten.amin": _extreme("min"),
    "aten.max.dim": _extreme_dim("argmax"),
    "aten.min.dim": _extreme_dim("argmin"),
    "aten.max.default": _extreme("max"),
    "aten.min.default": _extreme("min"),
    "aten.argmax": _arg_extreme("argmax"),
    "aten.argmin": _arg_extreme("argmin"),
    "aten.any": _logical("any"),
    "aten.all": _logical("all"),
    "aten.var.correction": _var(False, False),
    "aten.std.correction": _var(True, False),
    "aten.var_mean.correction": _var(False, True),
    "aten.softmax.int": _softmax(False),
    "aten._softmax": _softmax(False),
    "aten._safe_softmax": _softmax(False, safe=True),
    "aten.log_softmax.int": _softmax(True),
    "aten._log_softmax": _softmax(True),
    "aten.logsumexp": _logsumexp,
    "aten.cumsum": _cumsum,
}
