"""Quantisation as kernels: the scale of a row or group, then its elements; and back, by blocks.

Invariant: the result equals `runtime/quantised.py` to the bit for equal inputs, zero rows, infinities and NaN included.
Rules of `lowering.py`; fusion takes the norm or gate before them into the same kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flagtree.ir.index import Index, floordiv
from flagtree.lower.builder import Body, NotLowered, Tensor

if TYPE_CHECKING:
    from flagtree.lower.lowering import Call, Lowering

_LIMITS = {"f8e4m3fn": 448.0, "i8": 127.0}
_LEAST = 1e-10


def _quantise(lowering: Lowering, call: Call) -> None:
    x, group = call.tensor(0), call.argument(1, "group")
    q, scales = call.outs()
    target = q.dtype if q is not None else "i8" if call.argument(2, "dtype") == torch.int8 else "f8e4m3fn"
    call.emit(quantised(x, group, target, q, scales))


def quantised(x: Tensor, group: int, target: str, q: Tensor | None, scales: Tensor | None) -> Body:
    """The kernel of `flagtree::quantise`: rows of x in groups (0: whole rows), to `target`; a result that is None is not stored."""
    width = x.shape[-1]
    if group and width != Index.of(group):
        groups = floordiv(width, Index.of(group))
        body = Body((*x.shape[:-1], groups))
        inside = body.reduce_axis(Index.of(group))
        place = [*body.point[:-1], body.point[-1] * group + inside]
        at = body.point
    else:
        body = Body(x.shape[:-1])
        place = [*body.point, body.reduce_axis(width)]
        inside, at = place[-1], [*body.point, Index.of(0)]
    wide = body.cast(body.load(x, place), "f32")
    top = body.reduce("max", body.op("abs", wide), axes=[inside])[0]
    limit = _LIMITS[target]
    scale = body.op("max", top, _LEAST) / limit
    if scales is not None:
        body.store(scales, at, scale)
    if q is not None:
        y = wide / scale
        if target == "i8":
            y = body.op("where", body.op("isnan", y), 0.0, body.op("round", y))
        body.store(q, place, body.op("min", body.op("max", y, -limit), limit))
    return body


def _dequantise(lowering: Lowering, call: Call) -> None:
    q, scales, out = call.tensor(0), call.tensor(1), call.out()
    rows, columns = call.argument(2, "rows"), call.argument(3, "columns")
    if any(n.constant is None and block != 1 for n, block in zip(q.shape[-2:], (rows, columns), strict=True)):
        raise NotLowered("blocks over a size that is known only while the program runs")
    body = Body(q.shape)
    *outer, row, column = body.point
    scale = body.load(scales, [*outer, floordiv(row, Index.of(rows)), floordiv(column, Index.of(columns))])
    body.store(out, body.point, body.cast(body.load(q, body.point), "f32") * scale)
    call.emit(body)


QUANTISATION = {"flagtree.quantise": _quantise, "flagtree.dequantise": _dequantise}
