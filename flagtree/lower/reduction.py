"""Reductions, softmaxes and normalisations: one kernel each, over a domain of kept (parallel) and reduced axes."""

from __future__ import annotations

import functools
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
        return self.body.cast(self.body.load(tensor, [self.index[d] for d in dims]), compute_type(tensor.dtype))

    def reduce(self, combiner: str, *values: Value) -> list[Value]:
        if not self.reduced:
            raise NotLowered("reduction of a scalar")
        return self.body.reduce(combiner, *values, axes=self.reduced)

    def mean(self, value: Value) -> Value:
        n = self.count.constant
        total = self.reduce("sum", value)[0]
        return total / (float(n) if n is not None else self.body.cast(self.body.index(self.count), value.dtype))

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
    total = rows.reduce("sum", value)[0]
    rows.body.store(out, rows.kept_index(out), total)
    call.emit(rows.body)


def _mean(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    rows = Rows.over(x, _dims(call, x))
    rows.body.store(out, rows.kept_index(out), rows.mean(rows.load(compute_type(out.dtype))))
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


def _variance(rows: Rows, value: Value, correction: float) -> tuple[Value, Value]:
    """(variance, mean) in two passes over the row: as exact as Welford's and without its divisions."""
    mean = rows.mean(value)
    delta = value - mean
    total = rows.reduce("sum", delta * delta)[0]
    n = rows.count.constant
    if n is not None:
        return total / float(max(n - correction, 0)), mean
    count = rows.body.cast(rows.body.index(rows.count), value.dtype)
    return total / rows.body.op("max", count - correction, 0.0), mean


def _var(root: bool, with_mean: bool) -> Rule:
    def rule(lowering: Lowering, call: Call) -> None:
        x = call.tensor(0)
        correction = call.argument(99, "correction")
        rows = Rows.over(x, _dims(call, x))
        var, mean = _variance(rows, rows.load(), 1.0 if correction is None else float(correction))
        if root:
            var = rows.body.op("sqrt", var)
        for out, value in zip(call.outs(), (var, mean) if with_mean else (var,), strict=True):
            if out is not None:
                rows.body.store(out, rows.kept_index(out), value)
        call.emit(rows.body)

    return rule


def _softmax(log: bool) -> Rule:
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
        shifted = value - rows.reduce("max", value)[0]
        total = rows.reduce("sum", b.op("exp", shifted))[0]
        b.store(out, rows.index, shifted - b.op("log", total) if log else b.op("exp", shifted) / total)
        call.emit(b)

    return rule


def _logsumexp(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    rows = Rows.over(x, _dims(call, x))
    b, value = rows.body, rows.load()
    top = rows.reduce("max", value)[0]
    top = b.op("where", b.op("isinf", top), 0.0, top)  # as ATen: an infinite maximum is not subtracted
    total = rows.reduce("sum", b.op("exp", value - top))[0]
    b.store(out, rows.kept_index(out), b.op("log", total) + top)
    call.emit(b)


def _normalised(rows: Rows, weight: Tensor | None, bias: Tensor | None, dims: Sequence[int], eps: float) -> tuple[Value, Value, Value]:
    b, value = rows.body, rows.load()
    var, mean = _variance(rows, value, 0)
    rstd = b.op("rsqrt", var + eps)
    y = (value - mean) * rstd
    y = y * rows.at(weight, dims) if weight is not None else y
    return (y + rows.at(bias, dims) if bias is not None else y), mean, rstd


def _layer_norm(lowering: Lowering, call: Call) -> None:
    x = call.tensor(0)
    dims = list(range(len(x.shape) - len(call.argument(1, "normalized_shape")), len(x.shape)))
    weight, bias = call.optional_tensor(2, "weight"), call.optional_tensor(3, "bias")
    eps = call.argument(4, "eps")
    rows = Rows.over(x, dims)
    values = _normalised(rows, weight, bias, dims, 1e-5 if eps is None else eps)
    outs = call.outs()
    for k, out in enumerate(outs):
        if out is not None:
            rows.body.store(out, rows.index if k == 0 else rows.kept_index(out), values[k])
    call.emit(rows.body)


def _rms_norm(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    dims = list(range(len(x.shape) - len(call.argument(1, "normalized_shape")), len(x.shape)))
    weight, eps = call.optional_tensor(2, "weight"), call.argument(3, "eps")
    rows = Rows.over(x, dims)
    b, value = rows.body, rows.load()
    # without eps ATen takes the machine epsilon of the computing type
    eps = {"f32": 2.0**-23, "f64": 2.0**-52}[value.dtype] if eps is None else eps
    y = value * b.op("rsqrt", rows.mean(value * value) + eps)
    if weight is not None:
        y = y * rows.at(weight, dims)
    b.store(out, rows.index, y)
    call.emit(b)


def _group_norm(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    groups = call.argument(1, "num_groups")
    weight, bias = call.optional_tensor(2, "weight"), call.optional_tensor(3, "bias")
    eps = call.argument(4, "eps")
    channels = x.shape[1].constant
    if channels is None or channels % groups:
        raise NotLowered("channels not divisible by the groups")
    b, width = Body([x.shape[0], Index.of(groups)]), channels // groups
    inner = [b.reduce_axis(Index.of(width)), *(b.reduce_axis(n) for n in x.shape[2:])]
    index = [b.point[0], b.point[1] * width + inner[0], *inner[1:]]
    count = functools.reduce(lambda a, n: a * n, x.shape[2:], Index.of(width))
    rows = Rows(b, x, index, inner, list(range(1, len(x.shape))), count)
    y = _normalised(rows, weight, bias, [1], 1e-5 if eps is None else eps)[0]
    b.store(out, rows.index, y)
    call.emit(b)


def _batch_norm(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    mean, var = call.optional_tensor(3, "running_mean"), call.optional_tensor(4, "running_var")
    if call.argument(5, "training") or mean is None or var is None:
        raise NotLowered("batch norm in training: updates the running statistics")
    weight, bias = call.optional_tensor(1, "weight"), call.optional_tensor(2, "bias")
    rows = Rows.over(x, [])
    b = rows.body
    # ATen folds the statistics into one factor and one term per channel
    factor = b.op("rsqrt", rows.at(var, [1]) + call.argument(7, "eps"))
    factor = factor * rows.at(weight, [1]) if weight is not None else factor
    term = -(rows.at(mean, [1]) * factor)
    term = rows.at(bias, [1]) + term if bias is not None else term
    b.store(out, rows.index, rows.load() * factor + term)
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
    "aten.log_softmax.int": _softmax(True),
    "aten._log_softmax": _softmax(True),
    "aten.logsumexp": _logsumexp,
    "aten.layer_norm": _layer_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten.rms_norm": _rms_norm,
    "aten.group_norm": _group_norm,
    "aten.batch_norm": _batch_norm,
    "aten.cumsum": _cumsum,
}
