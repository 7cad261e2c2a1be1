"""From text to Program, inverse of `ir/text.py`'s printer; the grammar stands in docs/architecture.md.

Checks form only: a program that parses may still break a rule of `ir/verify.py`.  Every error is an IRError with line,
column and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from flagtree.errors import IRError
from flagtree.ir.index import Index
from flagtree.ir.lines import RESERVED, Line, read_lines
from flagtree.ir.program import (
    ROLES,
    Access,
    Alias,
    Arg,
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
    Repeat,
    Scalar,
    Scan,
    Schedule,
    Step,
    Store,
    Symbol,
    Template,
    TypeArg,
)  # fmt: skip

T = TypeVar("T")


def parse_program(text: str) -> Program:
    """Inverse of `print_program`.  Raises IRError with line, column and what was expected; checks form only (`verify` the rest)."""
    head = read_lines(text)
    head.need("program")
    name = head.name("the program's name")
    symbols: list[Symbol] = []
    buffers: list[Buffer] = []
    outputs: tuple[str, ...] | None = None
    steps: list[Step] = []
    for line in head.nested():
        if line.accept("symbol"):
            symbols.append(_guard(line, _read_symbol))
        elif line.accept("buffer"):
            buffers.append(_guard(line, _read_buffer))
        elif line.accept("outputs"):
            outputs = _guard(line, lambda line: line.many(lambda: line.name("an output")))
        else:
            steps.append(_guard(line, _read_step))
    head.done()
    if outputs is None:
        raise IRError("cannot read the program: no 'outputs' line", where=f"line {head.number}", why="expected 'outputs NAME, ...'")
    return Program(name, tuple(symbols), tuple(buffers), tuple(steps), outputs)


def _guard(line: Line, read: Callable[[Line], T]) -> T:
    """`read`, with every error located."""
    try:
        value = read(line)
    except (ValueError, ZeroDivisionError, RecursionError) as error:
        raise IRError(f"cannot read the program: {error}", where=f"line {line.number}: {line.text.strip()}") from error
    except IRError as error:
        if error.where.startswith("line "):
            raise
        raise IRError(error.what, where=f"line {line.number}: {line.text.strip()}", why=error.why or error.where) from error
    line.done()
    return value


def _read_symbol(line: Line) -> Symbol:
    name = line.name("the symbol's name")
    line.need("in")
    lo = line.integer("the lower end")
    line.need("..")
    hi = line.integer("the upper end")
    multiple = line.integer() if line.accept("multiple") else 1
    line.need("from")
    kind = line.name("'dim', 'stride', 'scalar' or 'argument'")
    if kind in ("dim", "stride"):
        return Symbol(name, lo, hi, (kind, line.name("a buffer"), line.integer("a dimension")), multiple)
    if kind == "scalar":
        return Symbol(name, lo, hi, (kind, line.name("a buffer")), multiple)
    if kind != "argument":
        line.cursor -= 1
        line.fail("'dim', 'stride', 'scalar' or 'argument'")
    return Symbol(name, lo, hi, (kind,), multiple)


def _read_buffer(line: Line) -> Buffer:
    name = line.name("the buffer's name")
    line.need(":")
    dtype = line.take("name", "a dtype")
    line.need("[")
    shape = line.many(line.index, "]")
    if not line.peek(*ROLES):
        line.fail(f"a role ({', '.join(ROLES)})")
    role = line.name("a role")
    strides = alias = None
    if line.accept("strides"):
        line.need("(")
        strides = line.many(line.index, ")")
    if line.accept("alias"):
        base = line.name("the base buffer")
        line.need("+")
        alias = Alias(base, line.index())
    return Buffer(name, "" if dtype == "_" else dtype, shape, role, strides, alias)


def _read_step(line: Line) -> Step:
    readers: dict[str, Callable[[Line], Step]] = {
        "kernel": _read_kernel, "extern": _read_extern, "template": _read_template, "repeat": _read_repeat,
    }  # fmt: skip
    if not line.peek(*readers):
        line.fail("'symbol', 'buffer', 'kernel', 'extern', 'template', 'repeat' or 'outputs'")
    return readers[line.name("a step")](line)


def _read_kernel(line: Line) -> Kernel:
    name = line.name("the kernel's name")
    axes: list[Axis] = []
    while line.peek("{", "reduce", "parallel"):
        kind = "parallel" if line.peek("{") else line.name("an axis kind")
        line.need("{")

        def axis(kind: str = kind) -> Axis:
            axis_name = line.name("an axis")
            line.need("<")
            return Axis(axis_name, line.index(), kind)

        axes += line.many(axis, "}")
    numerics = _read_numerics(line)
    origins: list[Origin] = []
    ops: tuple[str, ...] = ()
    schedule: Schedule | None = None
    body: list[BodyOp] = []
    for child in line.nested():
        if child.accept("origin"):
            origins.append(_guard(child, _read_origin))
        elif child.accept("ops"):
            ops = _guard(child, lambda c: tuple(c.string() for _ in range(len(c.tokens) - 2)))
        elif child.accept("schedule"):
            schedule = _guard(child, _read_schedule)
        else:
            body.append(_guard(child, _read_op))
    return Kernel(name, tuple(axes), tuple(body), numerics, schedule, tuple(origins), ops)


def _read_numerics(line: Line) -> Numerics:
    for mark in ("numerics", "("):
        line.need(mark)
    rounding = line.name("'eager' or 'fused'")
    for mark in (",", "contract", "="):
        line.need(mark)
    if not line.peek("on", "off"):
        line.fail("'on' or 'off'")
    contract = line.name("'on' or 'off'") == "on"
    for mark in (",", "acc", "="):
        line.need(mark)
    accumulator = line.name("a dtype")
    line.need(")")
    return Numerics(rounding, contract, accumulator)


def _read_origin(line: Line) -> Origin:
    return Origin(line.string(), line.string(), line.string())


def _read_schedule(line: Line) -> Schedule:
    lane = None
    if line.accept("lane"):
        line.need("=")
        lane = line.name("an axis")

    def tile() -> tuple[str, int]:
        axis = line.name("an axis")
        line.need("=")
        return axis, line.integer("a tile size")

    for mark in ("tiles", "("):
        line.need(mark)
    tiles = line.many(tile, ")")
    for mark in ("loop", "("):
        line.need(mark)
    loop = line.many(lambda: line.name("an axis"), ")")
    for mark in ("warps", "="):
        line.need(mark)
    warps = line.integer()
    for mark in ("stages", "="):
        line.need(mark)
    return Schedule(lane, tiles, loop, warps, line.integer())


def _read_op(line: Line) -> BodyOp:
    if line.peek("store", "store.add", "store.max"):
        mode = line.name("a store").partition(".")[2] or "set"
        buffer, index = _read_access(line)
        line.need("=")
        value = line.name("the stored value")
        return Store(Access(buffer, index, _read_mask(line)), value, mode)

    def target() -> tuple[str, str]:
        name = line.name("a value, or 'store'")
        line.need(":")
        return name, line.name("a dtype")

    targets = line.many(target, ")") if line.accept("(") else (target(),)
    line.need("=")
    word = line.name("an operation")
    (name, dtype), single = (targets or (("", ""),))[0], len(targets) == 1
    if word == "load" and single:
        buffer, index = _read_access(line)
        mask = _read_mask(line)
        return Load(name, dtype, Access(buffer, index, mask), _read_scalar(line) if line.accept("else") else None)
    if word == "index" and single:
        return IndexValue(name, dtype, line.index())
    args: list[Arg] = []
    while line.tokens[line.cursor][0] != "end" and not line.peek("over"):
        if args:
            line.need(",")
        literal = line.peek("-", *RESERVED) or line.tokens[line.cursor][0] == "number"
        args.append(_read_scalar(line) if literal else line.name("an argument"))
    if not line.accept("over"):
        if not single:
            line.fail("'over' and the reduced axes")
        return Compute(name, dtype, word, tuple(args))
    axes = line.many(lambda: line.name("an axis"))
    if not all(isinstance(a, str) for a in args):
        line.fail("only named values before 'over'")
    values = tuple(str(a) for a in args)
    if word.startswith("scan.") and single and len(values) == len(axes) == 1:
        return Scan(name, dtype, word[len("scan.") :], values[0], axes[0])
    combiner = word.removeprefix("ordered.")
    return Reduce(tuple(n for n, _ in targets), tuple(d for _, d in targets), combiner, values, axes, combiner != word)


def _read_access(line: Line) -> tuple[str, tuple[Index, ...]]:
    buffer = line.name("a buffer")
    line.need("[")
    return buffer, line.many(line.index, "]")


def _read_mask(line: Line) -> str | None:
    return line.name("a mask value") if line.accept("if") else None


def _read_scalar(line: Line) -> Scalar:
    for word, value in (("true", True), ("false", False), ("inf", math.inf), ("nan", math.nan)):
        if line.accept(word):
            return value
    if line.accept("-"):
        return -math.inf if line.accept("inf") else -_number(line)
    return _number(line)


def _number(line: Line) -> int | float:
    text = line.take("number", "a number, true, false, inf or nan")
    return int(text) if text.isdigit() else float(text)


def _read_operand(line: Line) -> Operand:
    if line.accept("["):
        return line.many(lambda: _read_operand(line), "]")
    if line.accept("none"):
        return None
    kind, text, _ = line.tokens[line.cursor]
    if kind == "string":
        return line.string()
    if kind == "number" or line.peek("-", *RESERVED):
        return _read_scalar(line)
    name = line.name("an operand")
    if name in ("index", "type") and line.accept("("):
        value: Operand
        if name == "index":
            value = line.index()
        else:
            type_kind = line.string()
            line.need(",")
            value = TypeArg(type_kind, line.string())
        line.need(")")
        return value
    return Ref(text)


def _read_attributes(line: Line) -> tuple[tuple[str, Operand], ...]:
    def pair() -> tuple[str, Operand]:
        key = line.take("name", "an attribute")
        line.need("=")
        return key, _read_operand(line)

    return line.many(pair, "}") if line.accept("{") else ()


def _read_call(line: Line) -> tuple[str, tuple[str | None, ...], str]:
    """`NAME: (outputs) = CALLEE(` of externs and templates."""
    name = line.name("the step's name")
    for mark in (":", "("):
        line.need(mark)
    outputs = line.many(lambda: None if line.accept("_") else line.name("an output buffer or '_'"), ")")
    line.need("=")
    callee = line.name("what is called")
    line.need("(")
    return name, outputs, callee


def _read_extern(line: Line) -> Extern:
    name, outputs, callee = _read_call(line)
    args = line.many(lambda: _read_operand(line), ")")
    kwargs = _read_attributes(line)
    mutates: tuple[str, ...] = ()
    if line.accept("mutates"):
        line.need("(")
        mutates = line.many(lambda: line.name("a buffer"), ")")
    reason = line.string() if line.accept("reason") else ""
    effect = line.string() if line.accept("effect") else ""
    return Extern(name, callee, args, outputs, kwargs, mutates, reason, effect, _only_origins(line))


def _only_origins(line: Line) -> tuple[Origin, ...]:
    origins = []
    for child in line.nested():
        child.need("origin")
        origins.append(_guard(child, _read_origin))
    return tuple(origins)


def _read_template(line: Line) -> Template:
    name, outputs, kind = _read_call(line)
    operands = line.many(lambda: line.name("an operand"), ")")
    attrs = _read_attributes(line)
    numerics = _read_numerics(line)
    origins: list[Origin] = []
    bodies: dict[str, tuple[BodyOp, ...]] = {}
    for child in line.nested():
        if child.accept("origin"):
            origins.append(_guard(child, _read_origin))
        elif child.peek("prologue", "epilogue"):
            bodies[child.name("a part")] = tuple(_guard(c, _read_op) for c in child.nested())
            child.done()
        else:
            child.fail("'origin', 'prologue' or 'epilogue'")
    named = tuple(o for o in outputs if o is not None)
    return Template(name, kind, operands, named, attrs, bodies.get("prologue", ()), bodies.get("epilogue", ()), numerics, tuple(origins))


def _read_repeat(line: Line) -> Repeat:
    name = line.name("the repeat's name")
    count = line.integer("a count")

    def binding() -> tuple[str, tuple[str, ...]]:
        formal = line.name("a formal buffer")
        for mark in ("=", "("):
            line.need(mark)
        return formal, line.many(lambda: line.name("a buffer"), ")")

    bindings = line.many(binding) if line.accept("bind") else ()
    return Repeat(name, count, tuple(_guard(c, _read_step) for c in line.nested()), bindings)
