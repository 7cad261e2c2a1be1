"""Mixtures of experts: routing as one kernel; the experts as a counting sort, two grouped products, the gate and the weighted sum.

Invariant: what a token gets depends on its own scores and on the order of its experts, never on where the sort puts its rows.
Rules of `lowering.py`; the operators' meaning stands in runtime/experts.py, the way of each step in docs/moe.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flagtree.ir.experts import DOWN, UP
from flagtree.ir.index import ONE, Index, floordiv, remainder
from flagtree.ir.program import Extern, Operand, Ref
from flagtree.lower.builder import Body, NotLowered, Tensor, Value
from flagtree.lower.pointwise import POINTWISE, sigmoid

if TYPE_CHECKING:
    from flagtree.lower.lowering import Call, Lowering

_REASON = "matrix products of the rows of each expert: the platform's library"
_MOST_CHOICES = 16  # experts a token: each is one more sweep over the scores in one kernel
_INT_MAX = (1 << 31) - 1


def _route(lowering: Lowering, call: Call) -> None:
    """flagtree.moe_route: scores once, then the greatest left, top_k times."""
    logits, bias = call.tensor(0), call.optional_tensor(1, "bias")
    top_k, scoring, renormalise = (call.argument(k, n) for k, n in ((2, "top_k"), (3, "scoring"), (4, "renormalise")))
    if top_k > _MOST_CHOICES:
        raise NotLowered(f"{top_k} experts a token")
    if logits.dtype == "f64" or (bias is not None and bias.dtype == "f64"):
        raise NotLowered("scores in double precision")
    body = Body(logits.shape[:1])
    token, expert = body.point[0], body.reduce_axis(logits.shape[1])
    value = body.cast(body.load(logits, [token, expert]), "f32")
    if scoring == "softmax":
        top = body.reduce("max", value, axes=[expert])[0]
        shifted = body.op("exp", value - top)
        score = shifted / body.reduce("sum", shifted, axes=[expert])[0]
    else:
        score = sigmoid(body, value)
    choice = score if bias is None else score + body.cast(body.load(bias, [expert]), "f32")
    chosen, weights = _greatest(body, _ordered(body, choice), score, expert, top_k)
    if renormalise:
        total = weights[0]
        for weight in weights[1:]:
            total = total + weight
        weights = [w / total for w in weights]
    if (scaling := call.argument(5, "scaling")) != 1.0:
        weights = [w * scaling for w in weights]
    for out, values in zip(call.outs(), (weights, chosen), strict=True):
        if out is not None:
            for place, v in enumerate(values):
                body.store(out, [token, Index.of(place)], v)
    call.emit(body)


def _ordered(body: Body, x: Value) -> Value:
    """An f32 as an i32 of the same order: zeros equal, NaN above all and equal; the least i32 is nobody's."""
    bits = body.bitcast(x + 0.0, "i32")  # -0.0 + 0.0 is 0.0
    key = body.op("where", body.op("lt", bits, 0), body.op("xor", bits, _INT_MAX), bits)
    return body.op("where", body.op("isnan", x), _INT_MAX, key)


def _greatest(body: Body, keys: Value, score: Value, axis: Index, count: int) -> tuple[list[Value], list[Value]]:
    """Positions and scores of the `count` greatest keys along `axis`, the lowest position first among equals."""
    positions: list[Value] = []
    scores: list[Value] = []
    place = body.index(axis, "i32")
    left = keys
    for _ in range(count):
        top, last = body.reduce("argmax", left, place, axes=[axis])
        positions.append(last)
        scores.append(body.reduce("sum", body.op("where", body.op("eq", place, last), score, 0.0), axes=[axis])[0])
        if len(positions) < count:  # what comes behind it in the order of choice
            equal_later = body.op("and", body.op("eq", keys, top), body.op("gt", place, last))
            left = body.op("where", body.op("or", body.op("lt", keys, top), equal_later), keys, -_INT_MAX - 1)
    return positions, scores


def _experts(lowering: Lowering, call: Call) -> None:
    """flagtree.fused_moe in five steps; a target's pass may take several of them together."""
    x, gate_up, down, weights, ids = (call.tensor(k) for k in range(5))
    top_k, order, starts = sorted_rows(lowering, call, ids, down)
    both = lowering.temp(call, "both", x.dtype, [order.shape[0], down.shape[2] * 2])
    _grouped(lowering, call, UP, (x, gate_up, order, starts), top_k, both)
    gated = lowering.temp(call, "gated", x.dtype, [order.shape[0], down.shape[2]])
    body = gate(both, gated, call.argument(5, "activation"))
    call.emit(body, suffix="gate")
    results = lowering.temp(call, "results", x.dtype, [ids.shape[0], Index.of(top_k), x.shape[1]])
    _grouped(lowering, call, DOWN, (gated, down, order, starts), top_k, results)
    combine(call, weights, results, top_k)


def sorted_rows(lowering: Lowering, call: Call, ids: Tensor, down: Tensor) -> tuple[int, Tensor, Tensor]:
    """(choices a token, the choices by expert, where each expert's begin) of experts whose second weights are `down`."""
    top_k, inner = ids.shape[1].constant, down.shape[2].constant
    if top_k is None or top_k > _MOST_CHOICES or inner is None:
        raise NotLowered(f"{ids.shape[1]} experts a token, {down.shape[2]} wide")
    order = lowering.temp(call, "order", "i32", [ids.shape[0] * top_k])
    starts = lowering.temp(call, "starts", "i32", [down.shape[0] + ONE])
    _sort(call, ids, order, starts, ids.shape[0] * top_k)
    return top_k, order, starts


def _sort(call: Call, ids: Tensor, order: Tensor, starts: Tensor, rows: Index) -> None:
    """A stable counting sort: `starts[e]` is the number of choices below e, `order` the choices by expert, each in its own order."""
    body = Body(starts.shape)
    expert, choice = body.point[0], body.reduce_axis(rows)
    width = ids.shape[1]
    chosen = body.load(ids, [floordiv(choice, width), remainder(choice, width)])
    own = body.index(expert, "i32")
    same = body.op("eq", chosen, own)
    below = body.reduce("sum", body.cast(body.op("lt", chosen, own), "i32"), axes=[choice])[0]
    place = below + body.scan("sum", body.cast(same, "i32"), choice) - 1
    body.store(starts, [expert], below)
    body.store(order, [Index.of(place.name)], body.index(choice, "i32"), mask=same)
    call.emit(body, suffix="sort")


def _grouped(lowering: Lowering, call: Call, callee: str, operands: tuple[Tensor, ...], top_k: int, out: Tensor) -> None:
    name = lowering.step_name(f"{call.node.name}_{callee.split('_')[1].split('.')[0]}")
    args: tuple[Operand, ...] = (*(Ref(t.name) for t in operands), top_k)
    lowering.steps.append(Extern(name, callee, args, (out.name,), reason=_REASON, origins=(call.origin,)))


def gate(both: Tensor, gated: Tensor, activation: str) -> Body:
    """gated[p, i] = act(both[p, i]) * both[p, I + i], each rounded as its own operator rounds."""
    body = Body(gated.shape)
    row, column = body.point
    first = body.cast(body.load(both, [row, column]), "f32" if gated.dtype != "f64" else "f64")
    second = body.cast(body.load(both, [row, column + gated.shape[1]]), first.dtype)
    active = body.cast(POINTWISE[f"aten.{activation}"].formula(body, first), gated.dtype)
    body.store(gated, [row, column], body.cast(active, first.dtype) * second)
    return body


def combine(call: Call, weights: Tensor, results: Tensor, top_k: int) -> None:
    """The sum over a token's choices in their order, weighted, in f32, rounded once."""
    out = call.out()
    body = Body(out.shape)
    token, column = body.point
    total: Value | None = None
    for place in range(top_k):
        part = body.cast(body.load(results, [token, Index.of(place), column]), "f64" if out.dtype == "f64" else "f32")
        part = part * body.cast(body.load(weights, [token, Index.of(place)]), part.dtype)
        total = part if total is None else total + part
    assert total is not None
    body.store(out, [token, column], total)
    call.emit(body, suffix="combine")


EXPERTS = {"flagtree.moe_route": _route, "flagtree.fused_moe": _experts}
