"""Operators that move data: copies, fills, concatenation, gathers and scatters, the KV cache write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import ZERO, Index
from flagtree.ir.program import Ref
from flagtree.lower.builder import Body, NotLowered, Tensor, Value
from flagtree.lower.reduction import Rule

if TYPE_CHECKING:
    from flagtree.lower.lowering import Call, Lowering


def _copy_into(call: Call, target: Tensor, source: Tensor) -> None:
    body = Body(target.shape)
    body.store(target, body.point, body.broadcast_load(source))
    call.emit(body)


def _clone(lowering: Lowering, call: Call) -> None:
    _copy_into(call, call.out(), call.tensor(0))


def _to_copy(lowering: Lowering, call: Call) -> None:
    device = call.argument(99, "device")
    if device is not None and str(device) != call.device(0):
        raise NotLowered("copy between devices")
    _copy_into(call, call.out(), call.tensor(0))


def _copy_(lowering: Lowering, call: Call) -> None:
    if lowering.overlaps(call.node_argument(0), call.node_argument(1)):
        raise NotLowered("copy between overlapping views")
    _copy_into(call, call.tensor(0), call.tensor(1))


def _fill(value_position: int | None, value: float | None = None, in_place: bool = False) -> Rule:
    def rule(lowering: Lowering, call: Call) -> None:
        target = call.tensor(0) if in_place else call.out()
        body = Body(target.shape)
        if value_position is None:
            filled: Value = body.constant(value or 0, target.dtype)
        elif call.is_tensor(value_position):
            filled = body.broadcast_load(call.tensor(value_position))
        else:
            filled = call.number(body, call.argument(value_position, "fill_value"), target.dtype)
        body.store(target, body.point, filled)
        call.emit(body)

    return rule


def _arange(lowering: Lowering, call: Call) -> None:
    out, overload = call.out(), call.overload
    first, step = (0, 1) if overload == "default" else (call.argument(0, "start"), 1)
    if overload == "start_step":
        step = call.argument(2, "step")
        step = 1 if step is None else step
    if not DTYPES[out.dtype].is_integral and not all(isinstance(x, int) for x in (first, step)):
        raise NotLowered("arange with fractional steps")
    body = Body(out.shape)
    position = body.point[0] * lowering.index(step) + lowering.index(first)
    body.store(out, body.point, body.index(position))
    call.emit(body)


def _cat(lowering: Lowering, call: Call) -> None:
    out, dim = call.out(), call.argument(1, "dim") or 0
    dim %= max(len(out.shape), 1)
    # ATen skips 1-d tensors without elements whatever the others' rank
    tensors = [t for t in call.tensors(0) if len(t.shape) == len(out.shape) and t.shape[dim].constant != 0]
    body = Body(out.shape)
    position = body.index(body.point[dim])
    start, result = ZERO, None
    if not tensors:
        raise NotLowered("concatenation of nothing")
    for k, tensor in enumerate(tensors):
        end = start + tensor.shape[dim]
        # every piece is read only inside its own stretch; the first test is enough for the first piece, and so on
        low = body.op("ge", position, body.index(start)) if k else None
        high = body.op("lt", position, body.index(end)) if k + 1 < len(tensors) else None
        mask = low if high is None else high if low is None else body.op("and", low, high)
        index = [p - start if d == dim else p for d, p in enumerate(body.point)]
        value = body.cast(body.load(tensor, index, mask), out.dtype)
        result = value if result is None or mask is None else body.op("where", mask, value, result)
        start = end
    assert result is not None
    body.store(out, body.point, result)
    call.emit(body)


def _pad(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    pads = [lowering.index(p) for p in call.argument(1, "pad")]
    fill = call.argument(2, "value") or 0
    body, mask, index = Body(out.shape), None, []
    for d, (point, extent) in enumerate(zip(body.point, x.shape, strict=True)):
        k = 2 * (len(x.shape) - 1 - d)
        before = pads[k] if k < len(pads) else ZERO
        index.append(point - before)
        if k < len(pads):
            position = body.index(point - before)
            inside = body.op("and", body.op("ge", position, 0), body.op("lt", position, body.index(extent)))
            mask = inside if mask is None else body.op("and", mask, inside)
    body.store(out, body.point, body.load(x, index, mask, fill if mask else None))
    call.emit(body)


def _triangle(op: str) -> Rule:
    """tril keeps column <= row + diagonal, triu column >= row + diagonal."""

    def rule(lowering: Lowering, call: Call) -> None:
        x, out = call.tensor(0), call.out()
        diagonal = lowering.index(call.argument(1, "diagonal") or 0)
        body = Body(out.shape)
        keep = body.op(op, body.index(body.point[-1]), body.index(body.point[-2] + diagonal))
        value = body.broadcast_load(x)
        zero = body.constant(0, x.dtype)
        body.store(out, body.point, body.op("where", keep, value, zero))
        call.emit(body)

    return rule


def _gather_index(body: Body, index: Value, extent: Index, wrap: bool) -> tuple[Value, Value]:
    """(index with negative values wrapped, mask of the valid ones)."""
    index = body.cast(index, "i64")
    size = body.index(extent)
    if wrap:
        index = body.op("where", body.op("lt", index, 0), index + size, index)
    return index, valid_index(body, index, extent)


def valid_index(body: Body, index: Value, extent: Index) -> Value:
    """Does the index name one of `extent` elements?"""
    return body.op("and", body.op("ge", index, 0), body.op("lt", index, body.index(extent)))


def poison(tensor: Tensor) -> float:
    """What an index out of range yields, where eager raises: NaN, so that it cannot pass unnoticed."""
    if not DTYPES[tensor.dtype].is_float:
        raise NotLowered("gather of integers: eager checks the index")
    return float("nan")


def _gather(lowering: Lowering, call: Call) -> None:
    x, index, out = call.tensor(0), call.tensor(2), call.out()
    dim = call.argument(1, "dim") % max(len(x.shape), 1)
    body = Body(out.shape)
    where, valid = _gather_index(body, body.load(index, body.point), x.shape[dim], wrap=False)
    place = [Index.of(where.name) if d == dim else p for d, p in enumerate(body.point)]
    body.store(out, body.point, body.load(x, place, valid, poison(x)))
    call.emit(body)


def _index_select(lowering: Lowering, call: Call) -> None:
    """Rows by a list of numbers, such as the positions' rows of a cosine and sine table."""
    x, index, out = call.tensor(0), call.tensor(2), call.out()
    if not x.shape:
        raise NotLowered("index_select of a single number")
    dim = call.argument(1, "dim") % len(x.shape)
    body = Body(out.shape)
    where, valid = _gather_index(body, body.load(index, [body.point[dim]] if index.shape else []), x.shape[dim], wrap=False)
    place = [Index.of(where.name) if d == dim else p for d, p in enumerate(body.point)]
    body.store(out, body.point, body.load(x, place, valid, poison(x)))
    call.emit(body)


def _nll_loss(lowering: Lowering, call: Call) -> None:
    """nll_loss_forward: one kernel picks each row's term, a second sums them (reduction 0 none, 1 mean, 2 sum)."""
    x, target = call.tensor(0), call.tensor(1)
    if call.argument(2, "weight") is not None or len(x.shape) != 2:
        raise NotLowered("class weights or unbatched input")
    reduction, ignored = call.argument(3, "reduction"), call.argument(4, "ignore_index")
    outs = call.outs()
    rows = x.shape[:1]
    picked = outs[0] if reduction == 0 else lowering.temp(call, "rows", x.dtype, rows)
    body = Body(rows)
    label = body.load(target, body.point)
    kept = body.op("ne", label, ignored)
    where, valid = _gather_index(body, label, x.shape[1], wrap=False)
    value = body.load(x, [body.point[0], Index.of(where.name)], body.op("and", valid, kept), poison(x))
    loss = body.op("where", kept, -body.cast(value, "f32" if x.dtype != "f64" else "f64"), 0.0)
    if picked is not None:
        body.store(picked, body.point, loss)
    call.emit(body, suffix="rows")
    if reduction == 0:
        _total_weight(call, outs[1])
    else:
        assert picked is not None
        _nll_total(call, picked, target, outs, reduction, ignored)


def _total_weight(call: Call, out: Tensor | None) -> None:
    if out is not None:
        body = Body(out.shape)
        body.store(out, body.point, body.constant(0, out.dtype))
        call.emit(body, suffix="weight")


def _nll_total(call: Call, picked: Tensor, target: Tensor, outs: Sequence[Tensor | None], reduction: int, ignored: int) -> None:
    body = Body([])
    axis = body.reduce_axis(picked.shape[0])
    value = body.cast(body.load(picked, [axis]), "f32" if picked.dtype != "f64" else "f64")
    counted = body.cast(body.op("ne", body.load(target, [axis]), ignored), value.dtype)
    total = body.reduce("sum", value, axes=[axis])[0]
    count = body.reduce("sum", counted, axes=[axis])[0]
    if outs[0] is not None:
        body.store(outs[0], [], total / count if reduction == 1 else total)
    if outs[1] is not None:
        body.store(outs[1], [], count)
    call.emit(body, suffix="total")


def _flip(lowering: Lowering, call: Call) -> None:
    x, out = call.tensor(0), call.out()
    flipped = {d % max(len(x.shape), 1) for d in call.node_argument(1)}
    body = Body(out.shape)
    body.store(out, body.point, body.load(x, [n - 1 - p if d in flipped else p for d, (p, n) in enumerate(zip(body.point, x.shape))]))
    call.emit(body)


def _roll(lowering: Lowering, call: Call) -> None:
    """Element p comes from p - shift, wrapped; a shift is a number, so the row is two straight pieces."""
    x, out = call.tensor(0), call.out()
    shifts, dims = call.argument(1, "shifts"), call.argument(2, "dims")
    sizes = [n.constant for n in x.shape]
    if not dims or any(not isinstance(s, int) for s in shifts) or any(not sizes[d] for d in dims):
        raise NotLowered("roll of the flattened tensor, or of a dimension whose size is not a number")
    body = Body(out.shape)
    index = list(body.point)
    for shift, d in zip(shifts, dims, strict=True):
        n = sizes[d] or 1
        index[d] = (index[d] + (n - shift % n)) % n
    body.store(out, body.point, body.load(x, index))
    call.emit(body)


def slice_place(lowering: Lowering, body: Body, call: Call, dim: int, first: int, of: Index) -> tuple[Index, Value]:
    """(position in a slice, mask of the points inside it) of each point.  The call's operands from `first` on are start, end, step of
    dimension `dim` of its result; `of`: extent of the slice.  Clamps as ATen does, which on symbolic sizes adds a guard."""
    size, start, step = call.node.meta["val"].shape[dim], call.argument(first, "start"), call.argument(first + 2, "step")
    start = 0 if start is None else start + size if start < 0 else start
    start = 0 if start < 0 else size if start > size else start
    distance = body.point[dim] - lowering.index(start)
    inside = valid_index(body, body.index(distance // step), of)
    if step != 1:
        inside = body.op("and", inside, body.op("eq", body.index(distance % step), 0))
    return distance // step, inside


def select_place(lowering: Lowering, body: Body, call: Call, dim: int, position: int) -> Value:
    """Mask of the points at the index that the operand at `position` names."""
    chosen = call.node_argument(position)
    index = lowering.index(chosen) + call.out().shape[dim] if chosen < 0 else lowering.index(chosen)
    return body.op("eq", body.index(body.point[dim]), body.index(index))


def _slice_scatter(lowering: Lowering, call: Call) -> None:
    source, out = call.tensor(1), call.out()
    dim = (call.argument(2, "dim") or 0) % len(out.shape)
    body = Body(out.shape)
    place, inside = slice_place(lowering, body, call, dim, 3, source.shape[dim])
    index = [ZERO if n.constant == 1 else place if d == dim else p for d, (p, n) in enumerate(zip(body.point, source.shape, strict=True))]
    value = body.cast(body.load(source, index, inside), out.dtype)
    body.store(out, body.point, body.op("where", inside, value, body.load(call.tensor(0), body.point)))
    call.emit(body)


def _select_scatter(lowering: Lowering, call: Call) -> None:
    source, out = call.tensor(1), call.out()
    dim = call.node_argument(2) % len(out.shape)
    body = Body(out.shape)
    inside = select_place(lowering, body, call, dim, 3)
    value = body.cast(body.load(source, [p for d, p in enumerate(body.point) if d != dim], inside), out.dtype)
    body.store(out, body.point, body.op("where", inside, value, body.load(call.tensor(0), body.point)))
    call.emit(body)


def _attention(lowering: Lowering, call: Call) -> None:
    """flagtree.attention: the cache write becomes a kernel (it fuses with rotary), the rest a call (passes/attention.py)."""
    start = call.tensor(5)
    for name, (new, cache) in {"k": (1, 3), "v": (2, 4)}.items():
        source, target = call.tensor(new), call.tensor(cache)
        body = Body(source.shape)
        first = body.load(start, [body.point[0]])
        # a position beyond the cache is never written; the loader refuses such a call before it runs
        position = first + body.index(body.point[2])
        valid = body.op("and", body.op("ge", position, 0), body.op("lt", position, body.index(target.shape[2])))
        place = [body.point[0], body.point[1], Index.of(position.name), body.point[3]]
        body.store(target, place, body.load(source, body.point), mask=valid)
        call.emit(body, suffix=f"{name}_cache")
    q, k_cache, v_cache = (Ref(call.tensor(i).name) for i in (0, 3, 4))
    window = (size,) if (size := call.argument(7, "window")) else ()
    call.extern(
        callee="flagtree.attend.default",
        args=(q, k_cache, v_cache, Ref(start.name), call.argument(6, "scale"), *window),
        reason="attention: the platform's library",
    )


MEMORY: dict[str, Rule] = {
    "aten.clone": _clone,
    "aten._to_copy": _to_copy,
    "aten.copy_": _copy_,
    "aten.copy": lambda lowering, call: _copy_into(call, call.out(), call.tensor(1)),
    "aten.lift_fresh_copy": _clone,
    "aten.fill.Scalar": _fill(1),
    "aten.fill.Tensor": _fill(1),
    "aten.fill_": _fill(1, in_place=True),
    "aten.zero_": _fill(None, 0, in_place=True),
    "aten.full": _fill(1),
    "aten.full_like": _fill(1),
    "aten.new_full": _fill(2),
    "aten.zeros": _fill(None, 0),
    "aten.zeros_like": _fill(None, 0),
    "aten.new_zeros": _fill(None, 0),
    "aten.ones": _fill(None, 1),
    "aten.ones_like": _fill(None, 1),
    "aten.new_ones": _fill(None, 1),
    "aten.scalar_tensor": _fill(0),
    "aten.arange": _arange,
    "aten.cat": _cat,
    "aten.constant_pad_nd": _pad,
    "aten.tril": _triangle("le"),
    "aten.triu": _triangle("ge"),
    "aten.flip": _flip,
    "aten.roll": _roll,
    "aten.gather": _gather,
    "aten.index_select": _index_select,
    "aten.slice_scatter": _slice_scatter,
    "aten.select_scatter": _select_scatter,
    "aten.nll_loss_forward": _nll_loss,
    "flagtree.attention": _attention,
}
