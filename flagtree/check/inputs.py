"""Inputs for one isolated kernel: sizes within the promised ranges, and seeded tensors that it may be run on.

Equal kernel, sizes and seed give equal bits.  Integers that index memory stay where every access is in bounds; what the kernel only
writes starts as NaN (or the smallest integer), so that an element left out shows.  The certificate runs kernels on these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from flagtree.check import attention_inputs
from flagtree.check.domains import WITHIN, Limits, arranged, declared
from flagtree.check.regimes import floats
from flagtree.ir.attention import Form, form_of
from flagtree.ir.bounds import Bounds
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.index import Index
from flagtree.ir.program import Buffer, Compute, IndexValue, Kernel, Load, Program, Store, Symbol

Tensor = torch.Tensor
GUARD = 64  # elements before and after each tensor, so that a write outside shows; keeps the alignment of 64 bytes
_DIVISIONS = frozenset({"floordiv", "mod", "truncdiv", "fmod", "div"})
_POSITIVE = frozenset({"sqrt", "rsqrt", "log", "log2", "log10", "pow"})  # real for positive operands only
_ORDINARY_INTEGERS = (-64, 63)
_MANY = 2**26  # points of a domain of which a setting of more rows would be a copy: in float64 each tensor takes half a gigabyte


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """One buffer: `memory` is one-dimensional, with at least GUARD elements on both sides of what `tensor` reaches from `start` on."""

    memory: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = GUARD

    @property
    def tensor(self) -> Tensor:
        return torch.as_strided(self.memory, self.shape, self.strides, self.start)

    def clone(self) -> Operand:
        return Operand(self.memory.clone(), self.shape, self.strides, self.start)


# -- sizes -----------------------------------------------------------------------------------------------------------
def sample_symbols(program: Program, rows: int = 3) -> list[dict[str, int]]:
    """Two settings of an isolated kernel's symbols, all within their ranges: the low ends, and one where the first size is `rows`
    (made odd) and the others are 2 or the least above it.  A size that no axis runs over (a cache's rows) is the largest."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    if (form := form_of(program)) is not None:
        return attention_inputs.sizes(program, form)
    walked = {n for axis in kernel.axes for n in axis.extent.names()}
    low = lower_ends(program)
    first = next((s for s in program.symbols if s.name in walked), None)
    odd = {s.name: _fitting(s, max(2, s.lo)) for s in program.symbols}
    if first is not None:
        odd[first.name] = _fitting(first, max(low[first.name], rows | 1))
        if math.prod(axis.extent.evaluate(odd) for axis in kernel.axes) > _MANY:  # fixed sizes that are large: more of them shows no more
            odd[first.name] = low[first.name]
    largest = max((odd[n] for n in walked if n in odd), default=1)
    for s in program.symbols:
        if s.name not in walked:
            odd[s.name] = _fitting(s, max(low[s.name], (largest + 3) | 1))
    return [low, odd]


def lower_ends(program: Program) -> dict[str, int]:
    """The least value of each symbol, at least 1; a size that no axis runs over is as large as the largest that one does."""
    if (form := form_of(program)) is not None:
        return attention_inputs.sizes(program, form)[0]
    return _with_room(program, {s.name: _fitting(s, max(1, s.lo)) for s in program.symbols})


def upper_ends(program: Program) -> list[tuple[str, dict[str, int]]]:
    """Settings at the upper end of the symbols' ranges, with what is large in each: all symbols together ("all"), then each of several
    alone with the others at their low ends."""
    highest = {s.name: s.hi // s.multiple * s.multiple for s in program.symbols}
    out = [("all", highest)]
    form = form_of(program)
    room = _with_room if form is None else partial(_with_keys, form)
    for name in highest if len(highest) > 1 else ():
        alone = room(program, {**{s.name: _fitting(s, max(1, s.lo)) for s in program.symbols}, name: highest[name]})
        if alone not in [setting for _, setting in out]:
            out.append((name, alone))
    return out


def _with_room(program: Program, setting: dict[str, int]) -> dict[str, int]:
    """A size that no axis runs over (a cache's rows) is made at least as large as those that axes run over."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    walked = {n for axis in kernel.axes for n in axis.extent.names()}
    largest = max((setting[n] for n in walked if n in setting), default=1)
    return setting | {s.name: _fitting(s, max(setting[s.name], largest)) for s in program.symbols if s.name not in walked}


def _with_keys(form: Form, program: Program, setting: dict[str, int]) -> dict[str, int]:
    return attention_inputs.with_keys(program, form, setting)


def _fitting(symbol: Symbol, value: int) -> int:
    """The smallest multiple that is at least `value`, within the range."""
    wanted = -(-value // symbol.multiple) * symbol.multiple
    return min(wanted, symbol.hi // symbol.multiple * symbol.multiple)


# -- tensors ---------------------------------------------------------------------------------------------------------
def make_operands(program: Program, symbols: Mapping[str, int], seed: int, kind: str = "ordinary", shift: int = 0) -> dict[str, Operand]:
    """A tensor for each buffer of an isolated kernel, in its dtype, shape and strides: floats of a `kind` (check/regimes.py; positive
    where a root or a logarithm needs it), integers in the range that the accesses allow, random bools.  `shift`: elements by which
    each tensor stands behind an address divisible by 64."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    generator = torch.Generator().manual_seed(seed)
    limits = value_limits(program, kernel, symbols)
    out = {}
    for buffer in program.buffers:
        shape, strides = (tuple(e.evaluate(symbols) for e in part) for part in (buffer.shape, buffer.layout))
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
        memory = _values(buffer, span + 2 * GUARD + shift, generator, kind, limits[buffer.name], range(GUARD + shift, GUARD + shift + span))
        out[buffer.name] = Operand(memory, shape, strides, GUARD + shift)
        if (domain := limits[buffer.name]).kind != WITHIN:
            count = math.prod(shape)
            out[buffer.name].tensor.copy_(arranged(domain, torch.arange(count), count, seed).view(shape))
        if buffer.role == "temp":
            out[buffer.name].tensor.fill_(unwritten(memory.dtype))
    return out


def value_limits(program: Program, kernel: Kernel, symbols: Mapping[str, int]) -> dict[str, Limits]:
    """Limits of each buffer's elements, within which every access of the kernel is in bounds and every function real."""
    ranges = coordinate_ranges(kernel, symbols) | integer_ranges(program, kernel, symbols)
    positive, divisors = _operands_of(kernel, _POSITIVE, 0), _operands_of(kernel, _DIVISIONS, 1)
    out = {}
    for buffer in program.buffers:
        low, high = ranges.get(buffer.name, _ORDINARY_INTEGERS)
        if buffer.name in divisors and buffer.name not in ranges:
            low = 1
        low = max(0, low) if DTYPES[buffer.dtype].kind == "uint" else low
        out[buffer.name] = Limits(low, max(low, high), buffer.name in positive)
    return out | declared(program, kernel, symbols)


def _values(buffer: Buffer, count: int, generator: torch.Generator, kind: str, limits: Limits, inside: range) -> Tensor:
    facts, dtype = DTYPES[buffer.dtype], torch_dtype(buffer.dtype)
    if facts.is_float:
        return floats(kind, count, generator, buffer.dtype, limits.positive, inside).to(dtype)
    if facts.kind == "bool":
        return torch.randint(0, 2, (count,), generator=generator).to(torch.bool)
    return torch.randint(limits.low, limits.high + 1, (count,), generator=generator).to(dtype)


def unwritten(dtype: torch.dtype) -> float | int | bool:
    """What memory that a kernel only writes holds before it: NaN, or the smallest integer."""
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).min


def _operands_of(kernel: Kernel, ops: frozenset[str], position: int) -> set[str]:
    """Buffers whose elements reach an operand of one of `ops` through casts and operations with a literal only."""
    made = {op.name: op for op in kernel.body if isinstance(op, Load | Compute)}
    found = set()
    for op in kernel.body:
        if not isinstance(op, Compute) or op.op not in ops or position >= len(op.args):
            continue
        name = op.args[position]
        while isinstance(name, str) and isinstance(step := made.get(name), Compute):
            named = [a for a in step.args if isinstance(a, str)]
            name = named[0] if len(named) == 1 else 0
        if isinstance(name, str) and isinstance(load := made.get(name), Load):
            found.add(load.access.buffer)
    return found


# -- integers that index memory --------------------------------------------------------------------------------------
def integer_ranges(program: Program, kernel: Kernel, symbols: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """For each integer buffer whose elements enter an index: the inclusive range that keeps all those accesses in bounds, whether
    or not a mask guards them.  (0, 0) where no range is found."""
    values = _integer_values(kernel)
    loads = {op.name: op.access.buffer for op in kernel.loads if not DTYPES[op.dtype].is_float}
    bounds = Bounds({}, {a.name: Index.of(a.extent.evaluate(symbols)) for a in kernel.axes})
    constants = {n: Index.of(v) for n, v in symbols.items()}
    ranges: dict[str, tuple[int, int]] = {}
    accesses = sorted((op.access for op in kernel.body if isinstance(op, Load | Store)), key=lambda a: a.mask is not None)
    for access, dimension in ((a, d) for a in accesses for d in range(len(a.index))):
        expr = access.index[dimension].substitute(values).substitute(constants)
        for name in sorted(expr.names() & loads.keys()):
            allowed = _allowed(expr, name, program.buffer(access.buffer).shape[dimension].evaluate(symbols), bounds)
            buffer = loads[name]
            low, high = ranges.get(buffer, allowed)
            low, high = max(low, allowed[0]), min(high, allowed[1])
            if low <= high:
                ranges[buffer] = (low, high)
            elif access.mask is None or buffer not in ranges:
                ranges[buffer] = (0, 0)
    return ranges


def coordinate_ranges(kernel: Kernel, symbols: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """For each integer buffer whose elements are asked to equal a coordinate of an axis (whose rows are counted, say): that axis."""
    extents = {a.name: a.extent.evaluate(symbols) for a in kernel.axes}
    loads = {op.name: op.access.buffer for op in kernel.loads if not DTYPES[op.dtype].is_float}
    places = {op.name: op.expr.name for op in kernel.body if isinstance(op, IndexValue)}
    ranges: dict[str, tuple[int, int]] = {}
    for op in kernel.body:
        if isinstance(op, Compute) and op.op == "eq":
            for one, other in (op.args, op.args[::-1]):
                if one in loads and (axis := places.get(str(other))) in extents:
                    ranges[loads[str(one)]] = (0, max(0, extents[str(axis)] - 1))
    return ranges


def _allowed(expr: Index, name: str, extent: int, bounds: Bounds) -> tuple[int, int]:
    """The values of `name` that keep `expr` within 0..extent-1 at every point."""
    factor = expr.coefficient(name)
    if factor is None or factor.constant is None or factor.constant <= 0:
        return 0, 0
    rest = expr - factor * Index.of(name)
    least, most = bounds.minimum(rest), bounds.maximum(rest)
    if least is None or most is None:
        return 0, 0
    return -(least // factor.constant), (extent - 1 - most) // factor.constant


def _integer_values(kernel: Kernel) -> dict[str, Index]:
    """Integer values as index expressions over axes, symbols and loaded integers, where they are such."""
    known: dict[str, Index] = {}
    for op in kernel.body:
        if isinstance(op, Load) and not DTYPES[op.dtype].is_float:
            known[op.name] = Index.of(op.name)
        elif isinstance(op, IndexValue):
            known[op.name] = op.expr.substitute(known)
        elif isinstance(op, Compute) and not DTYPES[op.dtype].is_float:
            value = _integer_result(op, known)
            if value is not None:
                known[op.name] = value
    return known


def _integer_result(op: Compute, known: Mapping[str, Index]) -> Index | None:
    args = [known.get(a) if isinstance(a, str) else Index.of(a) if isinstance(a, int) else None for a in op.args]
    if op.op == "where":  # a negative index wrapped, or a masked one replaced: the plain branch is the one that names what was loaded
        found = [a for a in args[1:] if a is not None and a.names()]
        return min(found, key=lambda a: len(a.terms), default=None)
    if any(a is None for a in args):
        return None
    a, b = args[0], args[-1]
    assert a is not None and b is not None
    match op.op:
        case "cast":
            return a
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
    return None
