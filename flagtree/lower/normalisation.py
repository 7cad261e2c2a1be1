"""Layer, RMS, group and batch norm, and the backward of the last two: statistics and what needs them in one kernel.

The backward of layer and RMS norm is PyTorch's own decomposition (`decompositions.py`), whose parts fuse again.
Between `reduction.py`, whose rows it walks, and `lowering.py`, which looks rules up here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flagtree.ir.index import Index
from flagtree.lower.builder import Body, NotLowered, Tensor, Value
from flagtree.lower.reduction import Rows, Rule, variance

if TYPE_CHECKING:
    from flagtree.lower.lowering import Call, Lowering


def _normalised(rows: Rows, weight: Tensor | None, bias: Tensor | None, dims: Sequence[int], eps: float) -> tuple[Value, Value, Value]:
    b, value = rows.body, rows.load()
    var, mean = variance(rows, value, 0)
    rstd = b.op("rsqrt", var + eps)
    return _affine(rows, (value - mean) * rstd, weight, bias, dims), mean, rstd


def _affine(rows: Rows, y: Value, weight: Tensor | None, bias: Tensor | None, dims: Sequence[int]) -> Value:
    y = y * rows.at(weight, dims) if weight is not None else y
    return y + rows.at(bias, dims) if bias is not None else y


def _layer_norm(lowering: Lowering, call: Call) -> None:
    x = call.tensor(0)
    dims = list(range(len(x.shape) - len(call.argument(1, "normalized_shape")), len(x.shape)))
    weight, bias = call.optional_tensor(2, "weight"), call.optional_tensor(3, "bias")
    eps = call.argument(4, "eps")
    rows = Rows.over(x, dims)
    _store(call, rows, _normalised(rows, weight, bias, dims, 1e-5 if eps is None else eps))


def _store(call: Call, rows: Rows, values: Sequence[Value]) -> None:
    """The normalised tensor at each point, then one number a row."""
    for k, (out, value) in enumerate(zip(call.outs(), values, strict=False)):
        if out is not None:
            rows.body.store(out, rows.kept_index(out) if k else rows.index, value)
    call.emit(rows.body)


def _rms_norm(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    dims = list(range(len(x.shape) - len(call.argument(1, "normalized_shape")), len(x.shape)))
    weight, eps = call.optional_tensor(2, "weight"), call.argument(3, "eps")
    rows = Rows.over(x, dims)
    b, value = rows.body, rows.load()
    # without eps ATen takes the machine epsilon of the computing type
    eps = {"f32": 2.0**-23, "f64": 2.0**-52}[value.dtype] if eps is None else eps
    y = value * b.op("rsqrt", rows.mean(value * value, ordered=True) + eps)
    if weight is not None:
        y = y * rows.at(weight, dims)
    b.store(out, rows.index, y)
    call.emit(b)


# -- group norm ----------------------------------------------------------------------------------------------------------
def _grouped(x: Tensor, groups: int) -> Rows:
    """One row a sample and group.  Parallel axes: sample, group; reduced: channel of the group, positions."""
    channels = x.shape[1].constant
    if channels is None or channels % groups:
        raise NotLowered("channels not divisible by the groups")
    b, width = Body([x.shape[0], Index.of(groups)]), channels // groups
    inner = [b.reduce_axis(Index.of(width)), *(b.reduce_axis(n) for n in x.shape[2:])]
    index = [b.point[0], b.point[1] * width + inner[0], *inner[1:]]
    count = functools.reduce(lambda a, n: a * n, x.shape[2:], Index.of(width))
    return Rows(b, x, index, inner, list(range(1, len(x.shape))), count)


def _group_norm(first: int, groups: int, epsilon: int) -> Rule:
    """Positions of the operands; `native_group_norm` also returns mean and reciprocal deviation of each row."""

    def rule(lowering: Lowering, call: Call) -> None:
        rows = _grouped(call.tensor(0), call.node_argument(groups))
        weight, bias = (call.optional_tensor(first + k, name) for k, name in enumerate(("weight", "bias")))
        eps = call.argument(epsilon, "eps")
        y, mean, rstd = _normalised(rows, weight, bias, [1], 1e-5 if eps is None else eps)
        for out, value, index in zip(call.outs(), (y, mean, rstd), (rows.index, rows.body.point, rows.body.point), strict=False):
            if out is not None:
                rows.body.store(out, index, value)
        call.emit(rows.body)

    return rule


def _group_norm_backward(lowering: Lowering, call: Call) -> None:
    """With y = w * h + b, h = (x - mean) * rstd and g = dy * w:  dx = rstd * (g - mean(g) - h * mean(g * h)) over each row,
    dw = sum(dy * h) and db = sum(dy) over samples and positions."""
    grad, x, groups, outs = call.tensor(0), call.tensor(1), call.node_argument(8), call.outs()
    mean, rstd, weight = call.tensor(2), call.tensor(3), call.optional_tensor(4, "gamma")

    def normalised(rows: Rows, row: Sequence[Index]) -> tuple[Value, Value, Value]:
        scale = rows.load_of(rstd, row)
        return rows.load_of(grad, rows.index), (rows.load() - rows.load_of(mean, row)) * scale, scale

    if outs[0] is not None:
        rows = _grouped(x, groups)
        dy, h, scale = normalised(rows, rows.body.point)
        g = _affine(rows, dy, weight, None, [1])
        rows.body.store(outs[0], rows.index, scale * (g - rows.mean(g) - h * rows.mean(g * h)))
        call.emit(rows.body)
    if outs[1] is not None or outs[2] is not None:
        rows = Rows.over(x, [0, *range(2, len(x.shape))])
        width = (x.shape[1].constant or groups) // groups
        dy, h, _ = normalised(rows, [rows.index[0], rows.index[1] // width])
        for out, value in zip(outs[1:], (dy * h, dy), strict=True):
            if out is not None:
                rows.body.store(out, rows.kept_index(out), rows.reduce("sum", value)[0])
        call.emit(rows.body, suffix="weights")


# -- batch norm ----------------------------------------------------------------------------------------------------------
def _batch_norm(lowering: Lowering, call: Call) -> None:
    if call.argument(5, "training"):
        _batch_norm_in_training(call)
    else:
        _batch_norm_with_statistics(call)


def _batch_norm_with_statistics(call: Call) -> None:
    x, out = call.tensor(0), call.outs()[0]
    mean, var = call.optional_tensor(3, "running_mean"), call.optional_tensor(4, "running_var")
    if mean is None or var is None:
        raise NotLowered("batch norm without running statistics")
    weight, bias = call.optional_tensor(1, "weight"), call.optional_tensor(2, "bias")
    rows = Rows.over(x, [])
    b = rows.body
    # ATen folds the statistics into one factor and one term per channel
    factor = b.op("rsqrt", rows.at(var, [1]) + call.argument(7, "eps"))
    factor = factor * rows.at(weight, [1]) if weight is not None else factor
    term = -(rows.at(mean, [1]) * factor)
    term = rows.at(bias, [1]) + term if bias is not None else term
    if out is not None:
        b.store(out, rows.index, rows.load() * factor + term)
        call.emit(b)
    for k, statistic in enumerate(call.outs()[1:]):
        if statistic is not None:
            _copy_statistic(call, statistic, (mean, var)[k - 2] if k >= 2 else None, f"statistic{k}")


def _copy_statistic(call: Call, out: Tensor, source: Tensor | None, suffix: str) -> None:
    """Without training the saved statistics are empty, the running ones as they were."""
    body = Body(out.shape)
    body.store(out, body.point, body.constant(0.0, out.dtype) if source is None else body.load(source, body.point))
    call.emit(body, suffix=suffix)


def _batch_norm_in_training(call: Call) -> None:
    """Statistics of the batch; running ones move by `momentum` towards them (the variance without bias), in place where the operator
    is not the functional one."""
    x, statistics = call.tensor(0), call.overload != "no_stats"
    training = 5 if statistics else 3  # position of that operand; momentum and eps follow
    momentum, eps = call.argument(training + 1, "momentum"), call.argument(training + 2, "eps")
    if not isinstance(momentum, float):
        raise NotLowered("batch norm whose momentum is not a plain number")
    weight, bias = call.optional_tensor(1, "weight"), call.optional_tensor(2, "bias")
    running = [call.optional_tensor(k, n) for k, n in ((3, "running_mean"), (4, "running_var")) if statistics]
    rows = Rows.over(x, [0, *range(2, len(x.shape))])
    b, value = rows.body, rows.load()
    mean = rows.mean(value)
    delta = value - mean
    total = rows.reduce("sum", delta * delta)[0]
    count = rows.size(value.dtype)
    rstd = b.op("rsqrt", total / count + eps)
    for k, (out, result) in enumerate(zip(call.outs(), (_affine(rows, delta * rstd, weight, bias, [1]), mean, rstd), strict=False)):
        if out is not None:
            b.store(out, rows.kept_index(out) if k else rows.index, result)
    targets = call.outs()[3:5] if "functional" in call.packet else running
    for old, target, new in zip(running, targets, (mean, total / (count - 1.0)), strict=False):
        if old is not None and target is not None:
            b.store(target, rows.kept_index(target), new * momentum + rows.at(old, [1]) * (1.0 - momentum))
    call.emit(b)


def _batch_norm_backward(lowering: Lowering, call: Call) -> None:
    """In training, over each channel:  dx = w * rstd * (dy - mean(dy) - h * mean(dy * h)) with h = (x - mean) * rstd;  dw = sum(dy * h),
    db = sum(dy).  With running statistics:  dx = w * rstd * dy."""
    grad, x, training, eps = call.tensor(0), call.tensor(1), call.node_argument(7), call.node_argument(8)
    weight = call.optional_tensor(2, "weight")
    rows = Rows.over(x, [0, *range(2, len(x.shape))])
    b, dy = rows.body, rows.load_of(grad, rows.index)
    mean, spread = (call.optional_tensor(k + (2 if training else 0), "") for k in (3, 4))
    if mean is None or spread is None:
        raise NotLowered("batch norm without statistics")
    rstd = rows.at(spread, [1]) if training else b.op("rsqrt", rows.at(spread, [1]) + eps)
    h = (rows.load() - rows.at(mean, [1])) * rstd
    outs = call.outs()
    if outs[0] is not None:
        inner = dy - rows.mean(dy) - h * rows.mean(dy * h) if training else dy
        b.store(outs[0], rows.index, inner * _affine(rows, rstd, weight, None, [1]))
    for out, value in zip(outs[1:], (dy * h, dy), strict=True):
        if out is not None:
            b.store(out, rows.kept_index(out), rows.reduce("sum", value)[0])
    call.emit(b)


NORMALISATIONS: dict[str, Rule] = {
    "aten.layer_norm": _layer_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten.rms_norm": _rms_norm,
    "aten.group_norm": _group_norm(first=2, groups=1, epsilon=4),
    "aten.native_group_norm": _group_norm(first=1, groups=6, epsilon=7),
    "aten.native_group_norm_backward": _group_norm_backward,
    "aten.batch_norm": _batch_norm,
    "aten.native_batch_norm": _batch_norm,
    "aten._native_batch_norm_legit_functional": _batch_norm,
    "aten._native_batch_norm_legit.no_stats": lambda lowering, call: _batch_norm_in_training(call),
    "aten.native_batch_norm_backward": _batch_norm_backward,
}
