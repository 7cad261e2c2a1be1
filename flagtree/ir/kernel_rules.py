"""The verifier's rules about one kernel body: names, types, axes, numerics, schedule.  Ranges and elements: `element_rules.py`.

Each check yields (the op it is about or None, why it is wrong) for one kernel; `ir/verify.py` holds the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.facts import Facts
from flagtree.ir.ops import COMBINERS, OPS
from flagtree.ir.program import (
    Access,
    Arg,
    BodyOp,
    Compute,
    IndexValue,
    Kernel,
    Load,
    Program,
    Reduce,
    Scalar,
    Scan,
    Store,
    arguments,
    defined,
    indices,
)

Found = Iterator[tuple[BodyOp | None, str]]


@dataclass(frozen=True, slots=True)
class KernelScope:
    """One kernel under check; `before` are values defined ahead of its body (a template's accumulator)."""

    program: Program
    kernel: Kernel
    facts: Facts
    symbols: frozenset[str]
    before: frozenset[str]


KernelCheck = Callable[[KernelScope], Found]


def accesses(kernel: Kernel) -> Iterator[tuple[Load | Store, Access]]:
    for op in kernel.body:
        if isinstance(op, Load | Store):
            yield op, op.access


# -- names -----------------------------------------------------------------------------------------------------------
def unique_names(s: KernelScope) -> Found:
    seen = set(s.symbols | s.before)
    for axis in s.kernel.axes:
        if axis.name in seen:
            yield None, f"axis '{axis.name}' has the name of a symbol or of another axis"
        seen.add(axis.name)
    for op in s.kernel.body:
        for name in defined(op):
            if name in seen:
                yield op, f"'{name}' is defined twice"
            seen.add(name)


def _undefined(s: KernelScope, reduced: bool) -> Found:
    later = {n for op in s.kernel.body if isinstance(op, Reduce | Scan) for n in defined(op)}
    seen = set(s.before)
    for op in s.kernel.body:
        for name in arguments(op):
            if name not in seen and (name in later) == reduced:
                yield op, f"'{name}' is used before its reduction" if reduced else f"'{name}' is not defined before it is used"
        seen.update(defined(op))


def ssa_defined(s: KernelScope) -> Found:
    return _undefined(s, reduced=False)


def reduce_before_use(s: KernelScope) -> Found:
    return _undefined(s, reduced=True)


def axis_bound(s: KernelScope) -> Found:
    axes = {a.name for a in s.kernel.axes}
    for axis in s.kernel.axes:
        if unknown := axis.extent.names() - s.symbols:
            yield None, f"the extent of axis '{axis.name}' names '{min(unknown)}', which is no symbol"
    bound = set(s.symbols) | axes | s.before
    for op in s.kernel.body:
        if isinstance(op, Reduce | Scan):
            for name in op.axes if isinstance(op, Reduce) else (op.axis,):
                if name not in axes:
                    yield op, f"'{name}' is no axis of the kernel"
        for expr in indices(op):
            if unknown := expr.names() - bound:
                yield op, f"the index names '{min(unknown)}', which is no axis, symbol or earlier value"
        bound.update(defined(op))


def buffer_declared(s: KernelScope) -> Found:
    for op, access in accesses(s.kernel):
        if not s.program.declares(access.buffer):
            yield op, f"buffer '{access.buffer}' is not declared"


def rank_matches(s: KernelScope) -> Found:
    for op, access in accesses(s.kernel):
        rank = len(s.program.buffer(access.buffer).shape)
        if len(access.index) != rank:
            yield op, f"{len(access.index)} indices for a buffer of {rank} dimensions"


# -- types -----------------------------------------------------------------------------------------------------------
def dtype_closed(s: KernelScope) -> Found:
    for op in s.kernel.body:
        if (wrong := _type_error(s, op)) is not None:
            yield op, wrong


def _type_error(s: KernelScope, op: BodyOp) -> str | None:
    types = s.facts.dtypes
    stated = op.dtypes if isinstance(op, Reduce) else () if isinstance(op, Store) else (op.dtype,)
    if unknown := [d for d in stated if d not in DTYPES]:
        return f"'{unknown[0]}' is no dtype"
    if any(types[n] not in _INTEGERS for i in indices(op) for n in i.names() if n in types):
        return "an index holds a value that is no integer"
    if isinstance(op, IndexValue):
        return None if op.dtype in _INTEGERS else "an index value must be an integer"
    if isinstance(op, Load | Store):
        buffer = s.program.buffer(op.access.buffer)
        dtype = op.dtype if isinstance(op, Load) else types[op.value]
        if op.access.mask is not None and types[op.access.mask] != "b1":
            return f"the mask '{op.access.mask}' is {types[op.access.mask]}, not b1"
        if isinstance(op, Store) and op.mode not in ("set", "add", "max"):
            return f"'{op.mode}' is no store mode"
        return None if dtype == buffer.dtype else f"value {dtype}, buffer '{buffer.name}' {buffer.dtype}"
    if isinstance(op, Compute):
        return _compute_error(op, types)
    combiner = COMBINERS.get(op.combiner)
    if combiner is None:
        return f"'{op.combiner}' is no combiner"
    if isinstance(op, Reduce) and op.ordered and op.combiner != "sum":
        return f"'{op.combiner}' has no order"
    names, args = (op.names, op.args) if isinstance(op, Reduce) else ((op.name,), (op.arg,))
    if not combiner.arity == len(names) == len(args) == len(stated):
        return f"'{op.combiner}' combines {combiner.arity} values"
    if any(types[a] != d for a, d in zip(args, stated, strict=True)):
        return f"operands {', '.join(types[a] for a in args)}, result {', '.join(stated)}"
    return "any and all take b1" if op.combiner in ("any", "all") and stated != ("b1",) else None


_INTEGERS = ("u8", "i8", "i16", "i32", "i64")
_KIND_LETTER = {"float": "f", "int": "i", "uint": "i", "bool": "b"}


def _compute_error(op: Compute, types: dict[str, str]) -> str | None:
    rule = OPS.get(op.op)
    if rule is None:
        return f"'{op.op}' is no operation"
    if len(op.args) != rule.arity:
        return f"'{op.op}' takes {rule.arity} operands, not {len(op.args)}"
    typed = op.args
    if op.op == "where":
        typed = op.args[1:]
        if isinstance(op.args[0], str) and types[op.args[0]] != "b1":
            return "the condition is not b1"
    named = {types[a] for a in typed if isinstance(a, str)}
    if len(named) > 1:
        return f"operands of different dtypes: {', '.join(sorted(named))}"
    dtype = next(iter(named), op.dtype)
    if _KIND_LETTER[DTYPES[dtype].kind] not in rule.kinds:
        return f"'{op.op}' does not take {dtype}"
    if op.op == "bitcast" and DTYPES[dtype].bits != DTYPES[op.dtype].bits:
        return f"bitcast from {dtype} to {op.dtype}"
    want = {"same": dtype, "b1": "b1", "given": op.dtype}[rule.result]
    return None if op.dtype == want else f"the result is {want}, not {op.dtype}"


def literal_fits(s: KernelScope) -> Found:
    for op in s.kernel.body:
        pairs: list[tuple[Arg | None, str]] = []
        if isinstance(op, Load):
            pairs = [(op.other, op.dtype)]
        elif isinstance(op, Compute) and op.op not in ("cast", "bitcast"):
            typed = op.args[1:] if op.op == "where" else op.args
            named = [s.facts.dtypes[a] for a in typed if isinstance(a, str)]
            if not named and OPS[op.op].result == "b1":
                yield op, "a comparison of literals has no operand type"
                continue
            pairs = [(a, named[0] if named else op.dtype) for a in typed]
            pairs += [(op.args[0], "b1")] if op.op == "where" else []
        for literal, dtype in pairs:
            if literal is not None and not isinstance(literal, str) and not _fits(literal, dtype):
                yield op, f"literal {literal!r} is no {dtype}"


def _fits(literal: Scalar, dtype: str) -> bool:
    kind, bits = DTYPES[dtype].kind, DTYPES[dtype].bits
    if kind == "bool" or isinstance(literal, bool):
        return kind == "bool" and isinstance(literal, bool)
    if kind == "float":
        return True
    low, high = (0, 2**bits) if kind == "uint" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return isinstance(literal, int) and low <= literal < high


def reduce_axis_kind(s: KernelScope) -> Found:
    kinds = {a.name: a.kind for a in s.kernel.axes}
    reduced: set[str] = set()
    for op in s.kernel.body:
        if isinstance(op, Reduce | Scan):
            names = op.axes if isinstance(op, Reduce) else (op.axis,)
            if not names:
                yield op, "a reduction over no axis"
            for name in names:
                if kinds[name] != "reduce":
                    yield op, f"axis '{name}' is not a reduce axis"
            reduced.update(names)
    for name, kind in kinds.items():
        if kind not in ("parallel", "reduce"):
            yield None, f"axis '{name}' is '{kind}', not parallel or reduce"
        if kind == "reduce" and name not in reduced:
            yield None, f"nothing runs over the reduce axis '{name}'"


# -- numerics and schedule -------------------------------------------------------------------------------------------
def numerics_explicit(s: KernelScope) -> Found:
    n = s.kernel.numerics
    if n.rounding not in ("eager", "fused"):
        yield None, f"rounding '{n.rounding}' is not eager or fused"
    if n.accumulator not in ("f32", "f64"):
        yield None, f"accumulator '{n.accumulator}' is not f32 or f64"


def schedule_fits(s: KernelScope) -> Found:
    schedule = s.kernel.schedule
    if schedule is None:
        return
    named = [a for a, _ in schedule.tiles]
    for name in (*named, *schedule.loop, *([schedule.lane] if schedule.lane is not None else ())):
        if name not in s.facts.extents:
            yield None, f"the schedule names '{name}', which is no axis"
    if len(set(named)) != len(named):
        yield None, "an axis has two tiles"
    if any(n < 1 for _, n in schedule.tiles) or schedule.warps < 1 or schedule.stages < 1:
        yield None, "tiles, warps and stages must be at least 1"
