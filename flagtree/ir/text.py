"""Text of the IR: `print_program` and `parse_program`, inverse of each other; grammar in docs/architecture.md.

Structure is by indentation, one statement a line; numbers round-trip exactly.  This file prints, `ir/parse.py` reads.
The text is the test medium, the input of `flagtree opt`, and what the kernel digest hashes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TypeVar

from flagtree.ir.index import Index
from flagtree.ir.parse import parse_program
from flagtree.ir.program import (
    Access,
    Axis,
    BodyOp,
    Buffer,
    Compute,
    Extern,
    IndexValue,
    Kernel,
    Load,
    Numerics,
    Operand,
    Origin,
    Program,
    Reduce,
    Ref,
    Scalar,
    Scan,
    Schedule,
    Step,
    Symbol,
    Template,
    TypeArg,
)  # fmt: skip

__all__ = ["parse_program", "print_kernel", "print_op", "print_program", "print_step"]
T = TypeVar("T")


# -- printing --------------------------------------------------------------------------------------------------------
def print_program(program: Program) -> str:
    """The text of a program, ending in a newline; `parse_program` gives the program back."""
    lines = [f"program {program.name}"]
    lines += [f"  {_symbol(s)}" for s in program.symbols]
    lines += [f"  {_buffer(b)}" for b in program.buffers]
    for step in program.steps:
        lines += ("  " + line for line in _step(step))
    lines.append("  outputs" + (" " + ", ".join(program.outputs) if program.outputs else ""))
    return "\n".join(lines) + "\n"


def print_kernel(kernel: Kernel) -> str:
    """The text of one kernel as it stands inside a program, not indented."""
    return "\n".join(_kernel(kernel)) + "\n"


def print_step(step: Step) -> str:
    """The text of any step, not indented."""
    return "\n".join(_step(step)) + "\n"


def _symbol(s: Symbol) -> str:
    multiple = f" multiple {s.multiple}" if s.multiple != 1 else ""
    return f"symbol {s.name} in {s.lo}..{s.hi}{multiple} from {' '.join(map(str, s.source))}"


def _buffer(b: Buffer) -> str:
    text = f"buffer {b.name}: {b.dtype or '_'}[{_commas(b.shape)}] {b.role}"
    if b.strides is not None:
        text += f" strides({_commas(b.strides)})"
    return text if b.alias_of is None else f"{text} alias {b.alias_of.base} + {b.alias_of.offset}"


def _step(step: Step) -> list[str]:
    if isinstance(step, Kernel):
        return _kernel(step)
    if isinstance(step, Extern):
        return _extern(step)
    if isinstance(step, Template):
        return _template(step)
    bind = ", ".join(f"{formal} = ({', '.join(actual)})" for formal, actual in step.bindings)
    head = f"repeat {step.name} {step.count}" + (f" bind {bind}" if bind else "")
    return [head, *("  " + line for inner in step.body for line in _step(inner))]


def _kernel(k: Kernel) -> list[str]:
    lines = [f"kernel {k.name} {_axes(k.axes)} {_numerics(k.numerics)}", *_origins(k.origins)]
    if k.ops:
        lines.append("  ops " + " ".join(map(json.dumps, k.ops)))
    if k.schedule is not None:
        lines.append("  " + _schedule(k.schedule))
    return lines + [f"  {print_op(op)}" for op in k.body]


def _extern(e: Extern) -> list[str]:
    outputs = ", ".join("_" if o is None else o for o in e.outputs)
    text = f"extern {e.name}: ({outputs}) = {e.callee}({_commas(e.args, _operand)})"
    if e.kwargs:
        text += f" {{{_attributes(e.kwargs)}}}"
    if e.mutates:
        text += f" mutates({', '.join(e.mutates)})"
    text += f" reason {json.dumps(e.reason)}" if e.reason else ""
    text += f" effect {json.dumps(e.effect)}" if e.effect else ""
    return [text, *_origins(e.origins)]


def _template(t: Template) -> list[str]:
    attrs = f" {{{_attributes(t.attrs)}}}" if t.attrs else ""
    head = f"template {t.name}: ({', '.join(t.outputs)}) = {t.kind}({', '.join(t.operands)}){attrs} {_numerics(t.numerics)}"
    lines = [head, *_origins(t.origins)]
    for part, body in (("prologue", t.prologue), ("epilogue", t.epilogue)):
        if body:
            lines += [f"  {part}", *(f"    {print_op(op)}" for op in body)]
    return lines


def _axes(axes: tuple[Axis, ...]) -> str:
    groups: list[str] = []
    start = 0
    while start < len(axes):
        kind = axes[start].kind
        end = next((j for j in range(start, len(axes)) if axes[j].kind != kind), len(axes))
        inner = ", ".join(f"{a.name} < {a.extent}" for a in axes[start:end])
        groups.append(f"{{{inner}}}" if kind == "parallel" and not start else f"{kind} {{{inner}}}")
        start = end
    return " ".join(groups) or "{}"


def _numerics(n: Numerics) -> str:
    return f"numerics({n.rounding}, contract={'on' if n.fp_contract else 'off'}, acc={n.accumulator})"


def _origins(origins: Iterable[Origin]) -> list[str]:
    return [f"  origin {json.dumps(o.node)} {json.dumps(o.module)} {json.dumps(o.source)}" for o in origins]


def _schedule(s: Schedule) -> str:
    lane = "" if s.lane is None else f"lane={s.lane} "
    tiles = ", ".join(f"{a}={n}" for a, n in s.tiles)
    return f"schedule {lane}tiles({tiles}) loop({', '.join(s.loop)}) warps={s.warps} stages={s.stages}"


def print_op(op: BodyOp) -> str:
    """One line of a kernel's body."""
    if isinstance(op, Load):
        other = "" if op.other is None else f" else {_scalar(op.other)}"
        return f"{op.name}: {op.dtype} = load {_access(op.access)}{_mask(op.access)}{other}"
    if isinstance(op, Compute):
        args = _commas(op.args, lambda a: a if isinstance(a, str) else _scalar(a))
        return f"{op.name}: {op.dtype} = {op.op} {args}".rstrip()
    if isinstance(op, Reduce):
        names = ", ".join(f"{n}: {d}" for n, d in zip(op.names, op.dtypes, strict=True))
        left = names if len(op.names) == 1 else f"({names})"
        return f"{left} = {'ordered.' * op.ordered}{op.combiner} {', '.join(op.args)} over {', '.join(op.axes)}".rstrip()
    if isinstance(op, Scan):
        return f"{op.name}: {op.dtype} = scan.{op.combiner} {op.arg} over {op.axis}"
    if isinstance(op, IndexValue):
        return f"{op.name}: {op.dtype} = index {op.expr}"
    mode = "" if op.mode == "set" else f".{op.mode}"
    return f"store{mode} {_access(op.access)} = {op.value}{_mask(op.access)}"


def _access(a: Access) -> str:
    return f"{a.buffer}[{_commas(a.index)}]"


def _mask(a: Access) -> str:
    return "" if a.mask is None else f" if {a.mask}"


def _commas(items: Iterable[T], show: Callable[[T], str] = str) -> str:
    return ", ".join(show(i) for i in items)


def _scalar(x: Scalar) -> str:
    return str(x).lower() if isinstance(x, bool) else repr(x)


def _operand(x: Operand) -> str:
    if x is None:
        return "none"
    if isinstance(x, Ref):
        return x.buffer
    if isinstance(x, Index):
        return f"index({x})"
    if isinstance(x, TypeArg):
        return f"type({json.dumps(x.kind)}, {json.dumps(x.value)})"
    if isinstance(x, str):
        return json.dumps(x)
    return f"[{_commas(x, _operand)}]" if isinstance(x, tuple) else _scalar(x)


def _attributes(pairs: Iterable[tuple[str, Operand]]) -> str:
    return ", ".join(f"{k} = {_operand(v)}" for k, v in pairs)
