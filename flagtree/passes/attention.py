"""Attention as a kernel of our own, for the forms and element types that a target's facts name.

The operator's call becomes the kernel that `ir.attention` writes down, with its tiles; on a GPU it reads `start` and `bounds` on the
device, so no launch waits for the host.  Runs after fusion: nothing is fused into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flagtree.ir import attention
from flagtree.ir.attention import Form
from flagtree.ir.program import Buffer, Extern, Kernel, Program, Ref, Schedule
from flagtree.passes.base import Fuel, Report
from flagtree.passes.rewrite import replace_externs
from flagtree.targets.base import Target

WIDTHS = (16, 256)  # elements of a head: below, a matrix instruction is mostly padding; above, a tile does not fit shared memory
MANY = 16  # query heads of a key head from which the rows of one token are many


@dataclass(frozen=True)
class Attention:
    """No options."""

    name: ClassVar[str] = "attention"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report = Report(self.name)

        def replacement(step: Extern) -> Kernel | str | None:
            return _kernel(program, step, target) if step.callee in attention.OPERATORS and target.attention else None

        return replace_externs(program, report, fuel or Fuel(), replacement), report


def _kernel(program: Program, step: Extern, target: Target) -> Kernel | str:
    """The kernel in the call's place, or why not."""
    form, names = _call(step)
    buffers = tuple(program.buffer(n) for n in (*names, step.outputs[0] or ""))
    q, k, v, out = *buffers[:3], buffers[-1]
    if why := _misfit(form, buffers):
        return why
    case = _case(form, q, k)
    if q.dtype not in target.attention.get(case, frozenset()):
        return f"{case} over {q.dtype}: the platform's library"
    if any(b.layout[-1].constant != 1 for b in (q, k, v, out)) or not out.is_contiguous:
        return "the elements of a head do not lie side by side"
    widths = q.shape[-1].constant, v.shape[-1].constant
    if any(w is None or not WIDTHS[0] <= w <= WIDTHS[1] for w in widths):
        return f"heads of {q.shape[-1]} and {v.shape[-1]} elements"
    schedule = tiles(form, q, k, v) if target.warp > 1 else None
    return attention.kernel(form, buffers, step.name, schedule, step.origins, (step.callee,))


def _call(step: Extern) -> tuple[Form, tuple[str, ...]]:
    """The form of a call, and its buffers but the result, whether operands are given by position or by name."""
    kind = attention.OPERATORS[step.callee]
    given = dict(zip(attention.SIGNATURES[kind], step.args, strict=False)) | dict(step.kwargs)
    names = tuple(a.buffer for n in attention.SIGNATURES[kind][:4] if isinstance(a := given.get(n), Ref))
    scale = float(given["scale"])  # type: ignore[arg-type]
    if kind == attention.CACHED:
        return Form(kind, scale, window=int(given.get("window", 0))), names  # type: ignore[arg-type]
    if kind == attention.PACKED:
        return Form(kind, scale, causal=bool(given.get("causal", False))), names
    return Form(kind, scale, limited=len(names) == 4), names


def _misfit(form: Form, buffers: tuple[Buffer, ...]) -> str:
    """What the operator would have to refuse at run time, "" for nothing: a kernel looks at no sizes."""
    q, k, v, *where, out = buffers
    heads, key_heads = q.shape[1].constant, k.shape[1].constant
    if not heads or not key_heads or heads % key_heads:
        return f"{q.shape[1]} query heads over {k.shape[1]} key heads"
    if not q.dtype == k.dtype == v.dtype == out.dtype:
        return "queries, keys and values of several types"
    packed = form.kind == attention.PACKED
    same = [(q.shape[-1], k.shape[-1]), (q.shape[0], k.shape[0]), *zip(k.shape[:-1], v.shape[:-1], strict=True)]
    same += [] if packed else [(q.shape[0], b.shape[0]) for b in where]
    if any(a != b for a, b in same) or any(b.dtype not in (("i32", "i64") if packed else ("i64",)) for b in where):
        return "sizes of queries and keys that may differ"
    return ""


def _case(form: Form, q: Buffer, k: Buffer) -> str:
    """What a target's facts call it (Target.attention)."""
    if form.kind == attention.CACHED:
        one = "one token" if attention.group_of(q, k) <= MANY else "one token, many heads"
        return "a window" if form.window else one if q.shape[2].constant == 1 else "several tokens"
    return "packed sequences" if form.kind == attention.PACKED else "some keys" if form.limited else "all keys"


def tiles(form: Form, q: Buffer, k: Buffer, v: Buffer) -> Schedule:
    """Rows (token and query head of a group) and keys that an instance holds: as many as keep its operands within 32 KiB each, the
    least that a matrix instruction takes where a call has few rows."""
    width = max(int(b.shape[-1].constant or 0) for b in (q, v))
    padded = max(16, 1 << (width - 1).bit_length())
    wide = q.dtype == "f32"
    rows = 32 if wide else 64
    columns = max(16, min(64, (32 if wide else 64) * 128 // padded))
    token = 0 if form.kind == attention.PACKED else 2
    if (tokens := q.shape[token].constant) is not None:
        rows = max(16, min(rows, 1 << (tokens * attention.group_of(q, k) - 1).bit_length()))
    row_axis, key_axis = ("i0", "r1") if form.kind == attention.PACKED else ("i1", "r0")
    return Schedule(None, tuple(sorted(((row_axis, rows), (key_axis, columns)))), (key_axis,), 4, 1)
