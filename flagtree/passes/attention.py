"""Attention as a kernel of our own, for the forms and element types that a target's facts name.

The call of our operators, or of PyTorch's SDPA, becomes the kernel that `ir.attention` writes down, with its tiles; on a GPU it reads
`start` and `bounds` on the device, so no launch waits for the host.  Runs after fusion: nothing is fused into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flagtree.ir import attention
from flagtree.ir.attention import Form
from flagtree.ir.canonical import isolate
from flagtree.ir.index import ONE, ZERO, Index
from flagtree.ir.program import Alias, Buffer, Extern, Kernel, Operand, Program, Ref, Schedule
from flagtree.ir.program_rules import walk
from flagtree.passes.base import Fuel, Report
from flagtree.passes.rewrite import replace_externs
from flagtree.targets.base import Target

WIDTHS = (16, 256)  # elements of a head: below, a matrix instruction is mostly padding; above, a tile does not fit shared memory
LEAST_PLAIN = 8  # where there is no matrix instruction
_SDPA_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
MANY = 16  # query heads of a key head from which the rows of one token are many


@dataclass(frozen=True)
class Attention:
    """No options."""

    name: ClassVar[str] = "attention"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report = Report(self.name)
        views: dict[str, Buffer] = {}  # of results of SDPA, as our kernels store them

        def replacement(step: Extern) -> Kernel | str | None:
            if not target.attention or (step.callee != attention.SDPA and step.callee not in attention.OPERATORS):
                return None
            called = _sdpa(program, step) if step.callee == attention.SDPA else _call(program, step)
            if isinstance(called, str):
                return called
            found = _kernel(step, called, target)
            if isinstance(found, str):
                return found
            result = called.buffers[-1]
            view = {result.name: result} if step.callee == attention.SDPA else {}
            alone = isolate(program.with_(buffers=(*program.buffers, *view.values())), found).program
            if attention.form_of(alone) is None:
                return "one tensor for several operands"
            views.update(view)
            return found

        changed = replace_externs(program, report, fuel or Fuel(), replacement)
        if not views:
            return changed, report
        written = {n for s in walk(changed.steps) for n in s.writes}
        return changed.with_(buffers=(*changed.buffers, *(b for n, b in views.items() if n in written))), report


@dataclass(frozen=True, slots=True)
class _Called:
    """What a call asks for: `case` as a target's facts name it; `buffers`: q, k, v, what tells which keys are seen, and the result."""

    case: str
    form: Form
    buffers: tuple[Buffer, ...]


def _kernel(step: Extern, called: _Called, target: Target) -> Kernel | str:
    """The kernel in the call's place, or why not."""
    form, buffers = called.form, called.buffers
    q, k, v, out = *buffers[:3], buffers[-1]
    if why := _misfit(form, buffers):
        return why
    if q.dtype not in target.attention.get(called.case, frozenset()):
        return f"{called.case} over {q.dtype}: the platform's library"
    if any(b.layout[-1].constant != 1 for b in (*buffers[:3], out)) or (form.mask and buffers[3].layout[-1].constant != 1):
        return "the elements of a head do not lie side by side"
    widths = q.shape[-1].constant, v.shape[-1].constant
    least = WIDTHS[0] if target.warp > 1 else LEAST_PLAIN
    if any(w is None or not least <= w <= WIDTHS[1] for w in widths):
        return f"heads of {q.shape[-1]} and {v.shape[-1]} elements"
    schedule = tiles(form, q, k, v) if target.warp > 1 else None
    return attention.kernel(form, buffers, step.name, schedule, step.origins, (step.callee,))


def _call(program: Program, step: Extern) -> _Called:
    """A call of one of our operators, whether operands are given by position or by name."""
    kind = attention.OPERATORS[step.callee]
    given = dict(zip(attention.SIGNATURES[kind], step.args, strict=False)) | dict(step.kwargs)
    names = tuple(a.buffer for n in attention.SIGNATURES[kind][:4] if isinstance(a := given.get(n), Ref))
    scale = float(given["scale"])  # type: ignore[arg-type]
    if kind == attention.CACHED:
        form = Form(kind, scale, window=int(given.get("window", 0)))  # type: ignore[arg-type]
    elif kind == attention.PACKED:
        form = Form(kind, scale, causal=bool(given.get("causal", False)))
    else:
        form = Form(kind, scale, limited=len(names) == 4)
    buffers = tuple(program.buffer(n) for n in (*names, step.outputs[0] or ""))
    return _Called(_case(form, buffers[0], buffers[1]), form, buffers)


def _sdpa(program: Program, step: Extern) -> _Called | str:
    """A call of `scaled_dot_product_attention`, or why it is none of ours.  Its result [B, H, S, E] is seen as [B, S, H, E]."""
    given: dict[str, Operand] = dict(zip(_SDPA_PARAMETERS, step.args, strict=False)) | dict(step.kwargs)
    names = [a.buffer for n in _SDPA_PARAMETERS[:4] if isinstance(a := given.get(n), Ref)]
    q, k, v, *mask = (program.buffer(n) for n in names)
    out = program.buffer(step.outputs[0] or "")
    if any(len(b.shape) != 4 for b in (q, k, v, out)) or any(not 2 <= len(m.shape) <= 4 for m in mask):
        return "operands without a dimension for sequences and one for heads"
    if given.get("dropout_p", 0) != 0 or (q.shape[1] != k.shape[1] and not given.get("enable_gqa", False)):
        return "dropout, or key heads that are not shared"
    causal, scale = bool(given.get("is_causal", False)), given.get("scale")
    if scale is None and (width := q.shape[-1].constant):
        scale = width**-0.5
    if not isinstance(scale, int | float) or (causal and mask):
        return "a scale that is no number, or a mask besides the causal one"
    if mask and not _masks(mask[0], (*q.shape[:3], k.shape[2])):
        return "a mask whose sizes may differ, or that is broadcast along the keys"
    if mask and mask[0].dtype not in ("b1", q.dtype):
        return "a mask of another type"
    at = out.layout
    rows = Buffer(f"{out.name}.rows", out.dtype, tuple(out.shape[d] for d in (0, 2, 1, 3)), out.role, tuple(at[d] for d in (0, 2, 1, 3)),
                  Alias(program.root(out.name), ZERO if out.alias_of is None else out.alias_of.offset))  # fmt: skip
    kind = "" if not mask else "seen" if mask[0].dtype == "b1" else "added"
    form = Form(attention.FULL, float(scale), causal=causal, mask=kind)
    return _Called("SDPA under a mask" if mask else "SDPA", form, (q, k, v, *mask, rows))


def _masks(mask: Buffer, scores: tuple[Index, ...]) -> bool:
    """Does the mask have an element for each of the scores [B, H, S, L], dimensions but the keys' broadcast?"""
    wanted = scores[-len(mask.shape) :]
    return all(n in (ONE, m) for n, m in zip(mask.shape[:-1], wanted[:-1], strict=True)) and mask.shape[-1] == wanted[-1]


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
    same += [] if packed or form.mask else [(q.shape[0], b.shape[0]) for b in where]
    told = ("i32", "i64") if packed else ("b1", q.dtype) if form.mask else ("i64",)
    if any(a != b for a, b in same) or any(b.dtype not in told for b in where):
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
