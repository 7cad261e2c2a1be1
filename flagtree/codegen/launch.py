"""The launch list: a Program as the JSON that the runtime executes without the compiler.

It names every buffer (each weight of each layer), every kernel call by digest and every extern with its reason; index
expressions become nested lists.  The last step of code generation; `artifact` stores it, `runtime/launch.py` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from flagtree.errors import CodegenError
from flagtree.ir import gemm
from flagtree.ir.canonical import Isolated
from flagtree.ir.index import Index
from flagtree.ir.program import Alias, Buffer, Extern, Kernel, Operand, Program, Ref, Repeat, Step, Symbol, Template, TypeArg

FORMAT = 1


def launch_list(program: Program, kernels: Mapping[str, tuple[Isolated, str]]) -> dict:
    """JSON of docs/architecture.md, "Launch list".

    `kernels` maps the name of each kernel of the program, those in repeats included, to (its isolated form, its digest).
    A buffer that a repeat binds anew in each iteration gets the role "formal": nobody passes it; what it is bound to is
    declared for it where the program does not.  CodegenError for a kernel or template without a
    digest, and for a name that is used but not declared.
    """
    buffers = _declared(program)
    steps = [_step(program, s, kernels) for s in program.steps]
    symbols = {s.name for s in program.symbols}
    return {
        "format": FORMAT,
        "name": program.name,
        "symbols": [_symbol(s) for s in program.symbols],
        "buffers": [_buffer(b) for b in buffers.values()],
        "outputs": [_output(o, buffers, symbols) for o in program.outputs],
        "steps": steps,
    }


def weights(launch: Mapping) -> list[str]:
    """The weights that a caller passes, in order of declaration."""
    return [b["name"] for b in launch["buffers"] if b["role"] == "weight" and b["alias"] is None]


# -- buffers ---------------------------------------------------------------------------------------------------------
def _repeats(steps: Iterable[Step]) -> Iterator[Repeat]:
    for step in steps:
        if isinstance(step, Repeat):
            yield step
            yield from _repeats(step.body)


def _declared(program: Program) -> dict[str, Buffer]:
    """Every buffer by name.  Formals change role; an actual without a declaration takes its formal's."""
    out = {b.name: b for b in program.buffers}
    bindings = [(formal, actual) for r in _repeats(program.steps) for formal, actual in r.bindings]
    actuals = {name for _, bound in bindings for name in bound}
    outside = set(program.outputs) | {n for s in program.steps if not isinstance(s, Repeat) for n in (*s.reads, *s.writes)}
    for formal, bound in bindings:
        for name in bound:
            out.setdefault(name, replace(out[formal], name=name))
    for formal, _ in bindings:
        if formal not in actuals and formal not in outside:
            out[formal] = replace(out[formal], role="formal")
    return out


def _symbol(symbol: Symbol) -> dict:
    return {"name": symbol.name, "min": symbol.lo, "max": symbol.hi, "multiple": symbol.multiple, "source": list(symbol.source)}


def _buffer(buffer: Buffer) -> dict:
    return {
        "name": buffer.name,
        "dtype": buffer.dtype,
        "shape": [e.to_json() for e in buffer.shape],
        "strides": None if buffer.is_contiguous else [e.to_json() for e in buffer.layout],
        "role": buffer.role,
        "alias": None if buffer.alias_of is None else _alias(buffer.alias_of),
    }


def _alias(alias: Alias) -> dict:
    return {"base": alias.base, "offset": alias.offset.to_json()}


def _output(name: str | None, buffers: Mapping[str, Buffer], symbols: set[str]) -> object:
    if name is None or name in buffers:
        return name
    if name in symbols:
        return {"index": name}
    raise CodegenError(f"the output '{name}' is neither a buffer nor a symbol")


# -- steps -----------------------------------------------------------------------------------------------------------
def _step(program: Program, step: Step, kernels: Mapping[str, tuple[Isolated, str]]) -> dict:
    if isinstance(step, Kernel | Template):
        if step.name not in kernels:
            raise CodegenError(f"the kernel '{step.name}' was not compiled", where=program.name)
        isolated, digest = kernels[step.name]
        symbols = [Index.of(s).to_json() for s in isolated.symbols]
        writes = [i for i, b in enumerate(isolated.program.buffers) if b.role != "input"]
        launch = {"kernel": digest, "name": step.name, "buffers": list(isolated.buffers), "writes": writes, "symbols": symbols}
        return launch | (_above(program, step, symbols[0], kernels) if isinstance(step, Template) else {})
    if isinstance(step, Extern):
        return {
            "extern": step.callee,
            "name": step.name,
            "args": [operand(a) for a in step.args],
            "kwargs": {k: operand(v) for k, v in step.kwargs},
            "outputs": list(step.outputs),
            "mutates": list(step.mutates),
            "reason": step.reason,
        }
    if isinstance(step, Repeat):
        wrong = next((f for f, bound in step.bindings if len(bound) != step.count), None)
        if wrong is not None:
            raise CodegenError(f"the repeat '{step.name}' runs {step.count} times but binds '{wrong}' another number of times")
        body = [_step(program, s, kernels) for s in step.body]
        return {"repeat": step.count, "bindings": {f: list(bound) for f, bound in step.bindings}, "steps": body}
    raise CodegenError(f"a step of type {type(step).__name__} has no place in a launch list", where=program.name)


def _above(program: Program, step: Template, rows: object, kernels: Mapping[str, tuple[Isolated, str]]) -> dict:
    """The call that takes more rows than the template's kernel is for, where there can be more."""
    attributes = dict(step.attrs)
    if (callee := attributes.get(gemm.OTHERWISE)) is None:
        return {}
    limit = gemm.rows_at_most(step)
    call = Extern(step.name, str(callee), tuple(map(Ref, step.operands)), step.outputs, reason=gemm.above_reason(step))
    return {"above": {"rows": rows, "at_most": limit, "extern": _step(program, call, kernels)}}


def operand(value: Operand) -> object:
    """An extern's operand as JSON; the inverse stands in runtime/operands.py."""
    if isinstance(value, Ref):
        return {"buffer": value.buffer}
    if isinstance(value, Index):
        return {"index": value.to_json()}
    if isinstance(value, TypeArg):
        return {"type": [value.kind, value.value]}
    if isinstance(value, tuple):
        return {"list": [operand(v) for v in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CodegenError(f"an operand of type {type(value).__name__} has no place in a launch list")
