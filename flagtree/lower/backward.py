"""Backward operators that move gradients to where they belong: slices, single rows, labels, embedding rows.

The pointwise and reducing ones are PyTorch's own decompositions (`decompositions.py`); norms stand in `normalisation.py`.
A row that several indices name is added to in their order, in one thread, so that a gradient has one value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import Index
from flagtree.lower.builder import Body, NotLowered, Value
from flagtree.lower.memory import select_place, slice_place, valid_index
from flagtree.lower.reduction import Rule

if TYPE_CHECKING:
    from flagtree.lower.lowering import Call, Lowering


def _slice_backward(lowering: Lowering, call: Call) -> None:
    """Zeros of the operand's shape with the gradient at start, start + step, …"""
    grad, out = call.tensor(0), call.out()
    dim = call.node_argument(2) % len(out.shape)
    body = Body(out.shape)
    place, inside = slice_place(lowering, body, call, dim, 3, grad.shape[dim])
    index = [place if d == dim else p for d, p in enumerate(body.point)]
    body.store(out, body.point, body.load(grad, index, inside, 0.0))
    call.emit(body)


def _select_backward(lowering: Lowering, call: Call) -> None:
    grad, out = call.tensor(0), call.out()
    dim = call.node_argument(2) % len(out.shape)
    body = Body(out.shape)
    inside = select_place(lowering, body, call, dim, 3)
    body.store(out, body.point, body.load(grad, [p for d, p in enumerate(body.point) if d != dim], inside, 0.0))
    call.emit(body)


def _nll_loss_backward(lowering: Lowering, call: Call) -> None:
    """Minus the row's gradient at its label, else 0; of a mean, divided by the number of counted labels in the element type."""
    grad, x, target, out = call.tensor(0), call.tensor(1), call.tensor(2), call.out()
    if call.argument(3, "weight") is not None or len(x.shape) != 2:
        raise NotLowered("class weights or unbatched input")
    reduction, ignored = call.node_argument(4), call.node_argument(5)
    body = Body(out.shape)
    row, column = body.point
    g = body.load(grad, [row] if grad.shape else [])
    if reduction == 1:
        total = body.load(call.tensor(6), [])
        kind = "f64" if x.dtype == "f64" else "f32"
        g = body.cast(body.cast(g, kind) / body.cast(total, kind), x.dtype)
    label = body.load(target, [row])
    hit = body.op("and", body.op("eq", label, body.cast(body.index(column), label.dtype)), body.op("ne", label, ignored))
    body.store(out, body.point, body.op("where", hit, -g, 0.0))
    call.emit(body)


def _embedding_backward(lowering: Lowering, call: Call) -> None:
    """Each row of the table is the sum of the gradients of its lookups.  The forward lookup has checked every index."""
    grad, indices, out = call.tensor(0), call.tensor(1), call.out()
    padding, by_frequency = call.node_argument(3), call.node_argument(4)
    if by_frequency or not DTYPES[out.dtype].is_float:
        raise NotLowered("embedding gradient scaled by frequency")
    if grad.shape[:-1] != indices.shape:
        raise NotLowered("the sizes of gradient and indices are not known to agree")
    zeros = Body(out.shape)
    zeros.store(out, zeros.point, zeros.constant(0.0, out.dtype))
    call.emit(zeros, suffix="zeros")
    body = Body(grad.shape)
    *lookup, column = body.point
    row: Value = body.cast(body.load(indices, lookup), "i64")
    counted = valid_index(body, row, out.shape[0])
    if padding is not None and padding >= 0:
        counted = body.op("and", counted, body.op("ne", row, padding))
    body.store(out, [Index.of(row.name), column], body.load(grad, body.point), mode="add", mask=counted)
    call.emit(body)


# several indices may name one row: its sum depends on their order, which only one thread keeps
ONE_THREAD = {"aten.embedding_dense_backward.default": "embedding gradient: the platform's library keeps the order of the sums"}
BACKWARD: dict[str, Rule] = {
    "aten.slice_backward": _slice_backward,
    "aten.select_backward": _select_backward,
    "aten.nll_loss_backward": _nll_loss_backward,
    "aten.embedding_dense_backward": _embedding_backward,
}
