"""Attention as one kernel: softmax(q k^T scale) v over the keys that a row sees, in the forms of the operators `flagtree::*_attention`.

Its body is the meaning: the interpreter, traffic, dependences and the certificate read it as any other kernel's.  Its numerics say `fused`:
the generators, which know the form again through `form_of`, walk the keys once with a running maximum and round where they like in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagtree.ir.canonical import isolate
from flagtree.ir.index import ONE, ZERO, Index
from flagtree.ir.program import (
    Access,
    Axis,
    BodyOp,
    Buffer,
    Compute,
    IndexValue,
    Kernel,
    Load,
    Numerics,
    Origin,
    Program,
    Reduce,
    Schedule,
    Store,
)
from flagtree.ir.text import print_program

CACHED, FULL, PACKED = "cached", "full", "packed"
OPERATORS = {
    "flagtree.attend.default": CACHED, "flagtree.full_attention.default": FULL, "flagtree.varlen_attention.default": PACKED,
}  # fmt: skip
SDPA = "aten.scaled_dot_product_attention.default"
# the operators' parameters in order: what a row sees is told by the fourth
SIGNATURES = {
    CACHED: ("q", "k_cache", "v_cache", "start", "scale", "window"), FULL: ("q", "k", "v", "lengths", "scale"),
    PACKED: ("q", "k", "v", "bounds", "scale", "causal"),
}  # fmt: skip
NUMERICS = Numerics("fused", True, "f32")
_NEVER = (1 << 62) - 1  # an end that no row has


@dataclass(frozen=True, slots=True)
class Form:
    """Which keys a row sees.  `kind`: cached (up to its position start[b] + s, the last `window` of them if that is not 0), full (all, or
    lengths[b] of them where `limited`; up to its own number where `causal`), packed (its sequence's, by bounds; up to its own where
    `causal`).  `mask`, of the full form: "seen" for those where a mask [B, H, S, L] is true, "added" for one added to the scores."""

    kind: str
    scale: float
    window: int = 0
    causal: bool = False
    limited: bool = False
    mask: str = ""

    @property
    def operands(self) -> int:
        """Buffers that are read: q, k, v and, unless every row sees every key or those up to its own, what says which."""
        return 3 if self.kind == FULL and not self.limited and not self.mask else 4


class _Body:
    """Ops so far; values are called v0, v1, …"""

    def __init__(self) -> None:
        self.ops: list[BodyOp] = []

    def name(self) -> str:
        return f"v{len(self.ops)}"

    def index(self, expr: Index) -> str:
        self.ops.append(IndexValue(name := self.name(), "i64", expr))
        return name

    def load(self, buffer: Buffer, *index: Index, mask: str | None = None) -> str:
        other = None if mask is None else 0.0
        self.ops.append(Load(name := self.name(), buffer.dtype, Access(buffer.name, index, mask), other))
        return name

    def op(self, dtype: str, op: str, *args: str | float) -> str:
        self.ops.append(Compute(name := self.name(), dtype, op, args))
        return name

    def cast(self, dtype: str, value: str, source: str) -> str:
        return value if dtype == source else self.op(dtype, "cast", value)

    def reduce(self, dtype: str, combiner: str, value: str, axis: str) -> str:
        self.ops.append(Reduce((name := self.name(),), (dtype,), combiner, (value,), (axis,)))
        return name


def kernel(form: Form, buffers: Sequence[Buffer], name: str, schedule: Schedule | None = None, origins: tuple[Origin, ...] = (),
           ops: tuple[str, ...] = ()) -> Kernel:  # fmt: skip
    """The kernel over `buffers`: q, k, v, then start, lengths, bounds or the mask where the form has them, and the result.

    Axes: i0 sequence, i1 token, i2 head, i3 element of the value (packed: i0 token, i1 head, i2 element); r0 key, r1 element of the key
    (packed: r0 bound, r1 key, r2 element)."""
    q, k, v, out = *buffers[:3], buffers[-1]
    body = _Body()
    seen: str | None = None
    inside: str | None = None
    added: str | None = None
    at_q: tuple[Index, ...]
    at_key: tuple[Index, ...]
    at_out: tuple[Index, ...]
    if form.kind == PACKED:
        token, head, element, key, depth = (Index.of(n) for n in ("i0", "i1", "i2", "r1", "r2"))
        seen = _in_sequence(form, body, buffers[3])
        at_q, at_key, at_out = (token, head, depth), (key, head // group_of(q, k)), (token, head, element)
        extents = (*out.shape, buffers[3].shape[0], k.shape[0], q.shape[2])
    else:
        sequence, token, head, element, key, depth = (Index.of(n) for n in ("i0", "i1", "i2", "i3", "r0", "r1"))
        if form.kind == CACHED:
            seen, inside = _in_cache(form, body, buffers[3], k.shape[2])
        elif form.mask == "added":
            added = body.load(buffers[3], *_at_mask(buffers[3]))
        elif form.limited or form.causal or form.mask:
            seen = _of_all(form, body, buffers)
        at_q, at_key, at_out = (sequence, head, token, depth), (sequence, head // group_of(q, k), key), (sequence, token, head, element)
        extents = (*out.shape, k.shape[2], q.shape[3])
    key_name, depth_name = str(key), str(depth)
    product = body.op("f32", "mul", body.cast("f32", body.load(q, *at_q), q.dtype),
                      body.cast("f32", body.load(k, *at_key, depth, mask=seen), k.dtype))  # fmt: skip
    score = body.op("f32", "mul", body.reduce("f32", "sum", product, depth_name), form.scale)
    if added is not None:
        score = body.op("f32", "add", score, body.cast("f32", added, buffers[3].dtype))
    if seen is not None:
        score = body.op("f32", "where", seen, score, float("-inf"))
    highest = body.reduce("f32", "max", score, key_name)
    # a row that sees nothing gives zeros
    base = body.op("f32", "where", body.op("b1", "eq", highest, float("-inf")), 0.0, highest)
    weight = body.op("f32", "exp", body.op("f32", "sub", score, base))
    total = body.reduce("f32", "sum", weight, key_name)
    value = body.cast("f32", body.load(v, *at_key, element, mask=seen), v.dtype)
    result = body.op("f32", "div", body.reduce("f32", "sum", body.op("f32", "mul", weight, value), key_name), total)
    result = body.op("f32", "where", body.op("b1", "eq", total, 0.0), 0.0, result)
    if inside is not None:
        result = body.op("f32", "where", inside, result, float("nan"))
    body.ops.append(Store(Access(out.name, at_out), body.cast(out.dtype, result, "f32")))
    parallel = len(out.shape)
    names = [*(f"i{d}" for d in range(parallel)), *(f"r{d}" for d in range(len(extents) - parallel))]
    axes = tuple(Axis(n, e, "parallel" if d < parallel else "reduce") for d, (n, e) in enumerate(zip(names, extents, strict=True)))
    return Kernel(name, axes, tuple(body.ops), NUMERICS, schedule, origins, ops)


def group_of(q: Buffer, k: Buffer) -> int:
    """Query heads that share a key head."""
    heads, key_heads = q.shape[1].constant, k.shape[1].constant
    assert heads and key_heads, "a pass chose attention whose heads are numbers"
    return heads // key_heads


def _of_all(form: Form, body: _Body, buffers: Sequence[Buffer]) -> str:
    """Key r0 is one of the first lengths[i0] where `limited`, the mask admits it, and it stands no later than token i1 where `causal`."""
    if form.mask:
        return body.load(buffers[3], *_at_mask(buffers[3]))
    key = body.index(Index.of("r0"))
    found = [body.op("b1", "lt", key, body.load(buffers[3], Index.of("i0")))] if form.limited else []
    found += [body.op("b1", "le", key, body.index(Index.of("i1")))] if form.causal else []
    return found[0] if len(found) == 1 else body.op("b1", "and", *found)


def _at_mask(mask: Buffer) -> tuple[Index, ...]:
    """The mask's element of sequence, head, token and key: leading dimensions may be missing, those of one element are broadcast."""
    point = tuple(Index.of(n) for n in ("i0", "i2", "i1", "r0"))[-len(mask.shape) :]
    return tuple(ZERO if extent == ONE else at for at, extent in zip(point, mask.shape, strict=True))


def _in_cache(form: Form, body: _Body, where: Buffer, context: Index) -> tuple[str, str]:
    """(key r0 of sequence i0 is seen by token i1, the token's position is one of the cache: eager refuses others, a kernel gives NaN)."""
    key = body.index(Index.of("r0"))
    first = body.load(where, Index.of("i0"))
    position = body.op("i64", "add", first, body.index(Index.of("i1")))
    seen = body.op("b1", "le", key, position)
    if form.window:
        seen = body.op("b1", "and", seen, body.op("b1", "gt", key, body.op("i64", "sub", position, form.window)))
    inside = body.op("b1", "and", body.op("b1", "ge", first, 0), body.op("b1", "gt", body.index(context), position))
    return seen, inside


def _in_sequence(form: Form, body: _Body, bounds: Buffer) -> str:
    """Key r1 is seen by token i0: both lie between two neighbouring bounds."""
    token, key = body.index(Index.of("i0")), body.index(Index.of("r1"))
    edge = body.cast("i64", body.load(bounds, Index.of("r0")), bounds.dtype)
    begun = body.op("b1", "le", edge, token)
    first = body.reduce("i64", "max", body.op("i64", "where", begun, edge, -1), "r0")
    end = body.reduce("i64", "min", body.op("i64", "where", begun, _NEVER, edge), "r0")
    inside = body.op("b1", "and", body.op("b1", "ge", first, 0), body.op("b1", "lt", end, _NEVER))
    seen = body.op("b1", "and", inside, body.op("b1", "and", body.op("b1", "ge", key, first), body.op("b1", "lt", key, end)))
    return body.op("b1", "and", seen, body.op("b1", "le", key, token)) if form.causal else seen


# -- knowing it again ------------------------------------------------------------------------------------------------
def is_attention(program: Program) -> bool:
    """Is an isolated kernel an attention?"""
    return form_of(program) is not None


def form_of(program: Program) -> Form | None:
    """The form of an isolated kernel that is an attention, else None: what is read off its body must give the same kernel again."""
    step = program.steps[0]
    if not isinstance(step, Kernel) or step.numerics != NUMERICS or not 4 <= len(program.buffers) <= 5:
        return None
    form = _read(step)
    if form is None or form.operands != len(program.buffers) - 1:
        return None
    again = isolate(program, kernel(form, operands(program, form), "kernel", step.schedule)).program
    return form if print_program(again) == print_program(program) else None  # by text: a NaN is no NaN's equal


def operands(program: Program, form: Form) -> tuple[Buffer, ...]:
    """The isolated buffers as q, k, v, then start, lengths or bounds, and the result; bodies read them in another order."""
    b = program.buffers
    return b if form.operands == 3 else (b[1], b[2], b[3], b[0], b[4])


def _read(step: Kernel) -> Form | None:
    """What a body says of its form."""
    computes = [op for op in step.body if isinstance(op, Compute)]
    scales = [op.args[1] for op in computes if op.op == "mul" and isinstance(op.args[1], float)]
    if len(scales) != 1:
        return None
    scale = float(scales[0])
    if sum(a.kind == "reduce" for a in step.axes) == 3:
        return Form(PACKED, scale, causal=sum(op.op == "le" for op in computes) == 2)
    if not any(op.op == "ge" for op in computes):
        mask = "seen" if any(op.dtype == "b1" for op in step.loads) else "added" if any(op.op == "add" for op in computes) else ""
        has = {op.op for op in computes}
        return Form(FULL, scale, causal="le" in has, limited="lt" in has, mask=mask)
    windows = [op.args[1] for op in computes if op.op == "sub" and isinstance(op.args[1], int)]
    return Form(CACHED, scale, int(windows[0]) if windows else 0)
