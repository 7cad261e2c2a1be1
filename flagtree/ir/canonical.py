"""One kernel alone, with canonical names: the unit that is compiled, and its digest.

Equal computations get equal text whatever their buffers, symbols, axes and values were called; equal digest is one compiled
kernel.  Schedule, numerics, shapes, strides, ranges and multiples are part of the text; origins and ATen names are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from flagtree.errors import IRError
from flagtree.ir import gemm
from flagtree.ir.index import Index
from flagtree.ir.program import (
    Access,
    Axis,
    BodyOp,
    Buffer,
    Compute,
    IndexValue,
    Kernel,
    Load,
    Program,
    Reduce,
    Repeat,
    Scan,
    Schedule,
    Step,
    Store,
    Symbol,
    Template,
    defined,
)
from flagtree.ir.text import print_program


@dataclass(frozen=True, slots=True)
class Isolated:
    """`program` holds exactly one kernel over buffers b0, b1, … and symbols n0, n1, …; `buffers` and `symbols` are the actual
    names in that order, which is what a launch passes (the address of element 0 of each, the value of each).  A template passes
    expressions for its symbols."""

    program: Program
    buffers: tuple[str, ...]
    symbols: tuple[str | Index, ...]

    @property
    def kernel(self) -> Kernel:
        kernel = self.program.steps[0]
        assert isinstance(kernel, Kernel)
        return kernel


def digest(program: Program) -> str:
    """SHA-256 of the text, in hex: the kernel digest when `program` comes from `isolate`."""
    return hashlib.sha256(print_program(program).encode()).hexdigest()


def isolate(program: Program, kernel: Kernel) -> Isolated:
    """A program of `kernel` alone.  An aliased buffer becomes a buffer of the view's shape and strides; two buffers that are
    the same view of the same memory become one.  Roles: input (only read), temp (only written), state (both)."""
    names, merged = _buffer_names(program, kernel)
    # symbols get a mark in the same step as locals get their names, so that a symbol called "i0" stays apart from axis i0
    body_names = {s.name: "$" + s.name for s in program.symbols} | _local_names(kernel)
    declared = [_declare(program.buffer(name), canonical, _role(kernel, merged, name), body_names) for name, canonical in names.items()]
    renamed = replace(
        kernel,
        name="kernel",
        axes=tuple(Axis(body_names[a.name], a.extent.rename(body_names), a.kind) for a in kernel.axes),
        body=tuple(_rename_op(op, body_names, {n: names[m] for n, m in merged.items()}) for op in kernel.body),
        schedule=_rename_schedule(kernel, body_names),
        origins=(),
        ops=(),
    )
    symbols = _symbol_order(program, _expressions(renamed, declared))
    to = {"$" + s.name: Index.of(f"n{i}") for i, s in enumerate(symbols)}
    renamed = replace(
        renamed,
        axes=tuple(replace(a, extent=a.extent.substitute(to)) for a in renamed.axes),
        body=tuple(_substitute_op(op, to) for op in renamed.body),
    )
    buffers = tuple(
        replace(
            b,
            shape=tuple(e.substitute(to) for e in b.shape),
            strides=None if b.strides is None else tuple(e.substitute(to) for e in b.strides),
        )
        for b in declared
    )
    alone = Program(
        "isolated",
        tuple(replace(s, name=f"n{i}", source=("argument",)) for i, s in enumerate(symbols)),
        buffers,
        (renamed,),
        tuple(b.name for b in buffers if b.role != "input"),
    )
    return Isolated(alone, tuple(names), tuple(s.name for s in symbols))


def isolate_template(program: Program, template: Template) -> Isolated:
    """The kernel that computes a template, over its operands and outputs.  IRError for a kind that no kernel computes."""
    if template.kind != "gemm" or template.epilogue or template.prologue or gemm.ROWS_AT_MOST not in dict(template.attrs):
        raise IRError(f"no kernel computes the template '{template.kind}' of this form", where=f"step {template.name}")
    alone = gemm.product(program.buffer(template.operands[0]).dtype, gemm.rows_at_most(template), len(template.operands) == 3)
    return Isolated(alone, (*template.operands, *template.outputs), gemm.arguments(program, template))


def isolate_all(program: Program) -> Iterator[tuple[Kernel, Isolated]]:
    """Every kernel of the program, those of templates included, with its isolated form, in order; those of a Repeat once, over the
    formal buffers."""
    for step in _generated(program.steps):
        if isinstance(step, Kernel):
            yield step, isolate(program, step)
        else:
            alone = isolate_template(program, step)
            yield replace(alone.kernel, name=step.name, origins=step.origins, ops=(gemm.PRODUCT,)), alone


def kernels(steps: Iterable[Step]) -> Iterator[Kernel]:
    """All kernels in order, those of a Repeat's body once; templates are left out."""
    return (step for step in _generated(steps) if isinstance(step, Kernel))


def _generated(steps: Iterable[Step]) -> Iterator[Kernel | Template]:
    for step in steps:
        if isinstance(step, Kernel | Template):
            yield step
        elif isinstance(step, Repeat):
            yield from _generated(step.body)


# -- names -----------------------------------------------------------------------------------------------------------
def _buffer_names(program: Program, kernel: Kernel) -> tuple[dict[str, str], dict[str, str]]:
    """(name -> canonical name in order of first use, name -> the first used name of the same view)."""
    used = dict.fromkeys(op.access.buffer for op in kernel.body if isinstance(op, Load | Store))
    first: dict[tuple, str] = {}
    merged = {name: first.setdefault(_view(program, name), name) for name in used}
    return {name: f"b{i}" for i, name in enumerate(dict.fromkeys(merged.values()))}, merged


def _view(program: Program, name: str) -> tuple:
    """What memory a buffer is: root, offset in its elements, shape, strides, dtype."""
    buffer, offset = program.buffer(name), Index(())
    shape, layout, dtype = buffer.shape, buffer.layout, buffer.dtype
    while buffer.alias_of is not None:
        offset = offset + buffer.alias_of.offset
        buffer = program.buffer(buffer.alias_of.base)
    return buffer.name, offset, shape, layout, dtype


def _role(kernel: Kernel, merged: dict[str, str], name: str) -> str:
    modes = {s.mode for s in kernel.stores if merged[s.access.buffer] == name}
    read = bool(modes - {"set"}) or any(merged[load.access.buffer] == name for load in kernel.loads)
    return "input" if not modes else "state" if read else "temp"


def _declare(b: Buffer, canonical: str, role: str, names: dict[str, str]) -> Buffer:
    strides = None if b.is_contiguous or b.strides is None else tuple(e.rename(names) for e in b.strides)
    return Buffer(canonical, b.dtype, tuple(e.rename(names) for e in b.shape), role, strides)


def _local_names(kernel: Kernel) -> dict[str, str]:
    """Axes i0.. (parallel) and r0.. (reduce) in their order, values v0.. in order of definition."""
    out: dict[str, str] = {}
    counts = {"parallel": 0, "reduce": 0}
    for axis in kernel.axes:
        out[axis.name] = f"{'i' if axis.kind == 'parallel' else 'r'}{counts[axis.kind]}"
        counts[axis.kind] += 1
    values = (n for op in kernel.body for n in defined(op))
    out.update((name, f"v{i}") for i, name in enumerate(values))
    return out


def _rename_schedule(kernel: Kernel, names: dict[str, str]) -> Schedule | None:
    s = kernel.schedule
    if s is None:
        return None
    # tiles and loop are sets of axes: sorted, so that the order in which a pass wrote them does not matter
    tiles = tuple(sorted((names[a], n) for a, n in s.tiles))
    return replace(s, lane=names[s.lane] if s.lane else None, tiles=tiles, loop=tuple(sorted(names[a] for a in s.loop)))


def _rename_op(op: BodyOp, names: dict[str, str], buffers: dict[str, str]) -> BodyOp:
    """Values, axes and buffers renamed; symbols stay."""
    if isinstance(op, Compute):
        return replace(op, name=names[op.name], args=tuple(names[a] if isinstance(a, str) else a for a in op.args))
    if isinstance(op, Reduce):
        return replace(
            op,
            names=tuple(names[n] for n in op.names),
            args=tuple(names[a] for a in op.args),
            axes=tuple(sorted(names[a] for a in op.axes)),
        )
    if isinstance(op, Scan):
        return replace(op, name=names[op.name], arg=names[op.arg], axis=names[op.axis])
    if isinstance(op, IndexValue):
        return replace(op, name=names[op.name], expr=op.expr.rename(names))
    index = tuple(e.rename(names) for e in op.access.index)
    access = Access(buffers[op.access.buffer], index, names[op.access.mask] if op.access.mask else None)
    if isinstance(op, Load):
        return replace(op, name=names[op.name], access=access)
    return replace(op, access=access, value=names[op.value])


def _substitute_op(op: BodyOp, to: dict[str, Index]) -> BodyOp:
    if isinstance(op, IndexValue):
        return replace(op, expr=op.expr.substitute(to))
    if isinstance(op, Load | Store):
        return replace(op, access=replace(op.access, index=tuple(e.substitute(to) for e in op.access.index)))
    return op


# -- the order of symbols --------------------------------------------------------------------------------------------
def _expressions(kernel: Kernel, buffers: list[Buffer]) -> list[Index]:
    """Every index expression in the order of the text that matters: extents, body, then declarations."""
    out = [a.extent for a in kernel.axes]
    for op in kernel.body:
        if isinstance(op, IndexValue):
            out.append(op.expr)
        elif isinstance(op, Load | Store):
            out += op.access.index
    for b in buffers:
        out += (*b.shape, *(b.strides or ()))
    return out


def _symbol_order(program: Program, expressions: list[Index]) -> list[Symbol]:
    """The symbols used, in order of first use.  Where one expression brings in several at once their order may not come from
    their names (terms are sorted by name), so they are told apart by where and how they occur: colour refinement."""
    known = {"$" + s.name: s for s in program.symbols}
    used: dict[str, list[int]] = {}
    for position, expression in enumerate(expressions):
        for name in sorted(expression.names() & known.keys()):
            used.setdefault(name, []).append(position)
    colour = _ranks({n: (known[n].lo, known[n].hi, known[n].multiple) for n in used})
    firsts = [positions[0] for positions in used.values()]
    if len(set(firsts)) == len(firsts):
        return [known[n] for n in used]
    while True:
        signature = {}
        for n, positions in used.items():
            others = {m: Index.of(f"c{c}") for m, c in colour.items() if m != n}
            shapes = tuple((p, str(expressions[p].substitute({**others, n: Index.of("self")}))) for p in positions)
            signature[n] = (positions[0], colour[n], shapes)
        refined = _ranks(signature)
        if len(set(refined.values())) == len(used):
            return [known[n] for n in sorted(used, key=refined.__getitem__)]
        if refined == colour:
            # symmetric: either order gives the same text; single one out and go on
            tied = [n for n in sorted(used) if list(refined.values()).count(refined[n]) > 1]
            lowest = min(refined[n] for n in tied)
            chosen = next(n for n in tied if refined[n] == lowest)
            refined = {n: 2 * r - (n == chosen) for n, r in refined.items()}
        colour = refined


def _ranks(keys: dict[str, tuple]) -> dict[str, int]:
    """Each name's rank among the distinct keys."""
    order = {key: i for i, key in enumerate(sorted(set(keys.values())))}
    return {name: order[key] for name, key in keys.items()}
