"""Bytes moved and launches of a program at given sizes, counted from loads and stores; externs apart.

A buffer's element counts once however often a kernel touches it: a kernel's footprint, what perfect re-use inside it would move.
`flagtree compile` and the traffic tests report from here; nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.facts import Facts
from flagtree.ir.index import Bounds, Index
from flagtree.ir.program import Access, Axis, Extern, Kernel, Program, Repeat, Step, Template

# externs that read or write only some rows of an operand, by position of the argument: the rest of what they take counts whole
GATHERS: Mapping[str, int] = {"aten.embedding.default": 0, "aten.index_select.default": 0, "aten.gather.default": 0, "aten.index.Tensor": 0}
# weights [experts, ...] that are read once for each expert that a choice takes, and what has an element for each choice
EXPERTS: Mapping[str, tuple[tuple[int, ...], int]] = {
    "flagtree.fused_moe.default": ((1, 2), 4), "flagtree.experts_up.default": ((1,), 2), "flagtree.experts_down.default": ((1,), 2),
    "flagtree.fused_moe_scaled.default": ((1, 2, 3, 4), 6), "flagtree.experts_up_scaled.default": ((2, 3), 4),
    "flagtree.experts_down_scaled.default": ((2, 3), 4),
}  # fmt: skip
NEW_ROWS: Mapping[str, tuple[int, ...]] = {"flagtree.attention.default": (1, 2)}  # written into the mutated caches


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """Bytes of one step times its `launches` (1, or the iterations of the repeats around it); `kind`: kernel, template, extern."""

    name: str
    kind: str
    bytes_read: int
    bytes_written: int
    launches: int = 1

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True)
class ProgramTraffic:
    """Every step in order, those of a repeat's body with all its iterations."""

    steps: tuple[StepTraffic, ...]

    @property
    def generated(self) -> int:
        """Bytes of kernels and templates."""
        return sum(s.bytes for s in self.steps if s.kind != "extern")

    @property
    def extern(self) -> int:
        """Bytes of externs."""
        return sum(s.bytes for s in self.steps if s.kind == "extern")

    @property
    def launches(self) -> int:
        """Launches of kernels and templates, and calls of externs."""
        return sum(s.launches for s in self.steps)


def program_traffic(program: Program, symbols: Mapping[str, int]) -> ProgramTraffic:
    """Traffic of every step at concrete symbol values.  KeyError for a symbol without a value."""
    return ProgramTraffic(tuple(_steps(program, program.steps, symbols)))


def _steps(program: Program, steps: Iterable[Step], symbols: Mapping[str, int]) -> Iterator[StepTraffic]:
    for step in steps:
        if isinstance(step, Repeat):
            for inner in _steps(program, step.body, symbols):
                n = step.count
                yield replace(
                    inner, bytes_read=inner.bytes_read * n, bytes_written=inner.bytes_written * n, launches=inner.launches * n
                )
        elif isinstance(step, Kernel):
            yield StepTraffic(step.name, "kernel", *footprint(program, step, symbols))
        elif isinstance(step, Extern):
            yield StepTraffic(step.name, "extern", *_extern(program, step, symbols))
        else:
            yield StepTraffic(step.name, "template", *_template(program, step, symbols))


def buffer_bytes(program: Program, name: str, symbols: Mapping[str, int]) -> int:
    """Bytes of the distinct elements of a buffer or view: a dimension of stride 0 repeats one element."""
    b = program.buffer(name)
    if b.dtype not in DTYPES:
        return 0  # opaque
    sizes = (n.evaluate(symbols) for n, stride in zip(b.shape, b.layout, strict=True) if stride.constant != 0 or n.constant == 0)
    return math.prod(sizes) * DTYPES[b.dtype].bytes


def _extern(program: Program, step: Extern, symbols: Mapping[str, int]) -> tuple[int, int]:
    """Each distinct operand read once, each output and each mutated operand written once."""
    size = {n: buffer_bytes(program, n, symbols) for n in (*step.reads, *step.writes)}
    read, written = sum(size[n] for n in step.reads), sum(size[n] for n in step.writes)
    if step.callee in NEW_ROWS:
        # the caches hold the new rows at their end, so that the rows themselves are not read once more
        rows = {n for k in NEW_ROWS[step.callee] if (n := _operand(step, k)) is not None}
        new = sum(size[n] for n in rows)
        return read - new, written - sum(size[n] for n in step.mutates) + new
    if step.callee in EXPERTS:
        positions, choices = EXPERTS[step.callee]
        taken = math.prod(n.evaluate(symbols) for n in program.buffer(_operand(step, choices) or "").shape)
        for weight in {n for k in positions if (n := _operand(step, k)) is not None}:
            experts = program.buffer(weight).shape[0].evaluate(symbols)
            read -= size[weight] * max(0, experts - taken) // max(1, experts)
        return read, written
    if step.callee in GATHERS and (table := _operand(step, GATHERS[step.callee])) is not None:
        return read - size[table] + min(size[table], written), written
    return read, written


def _operand(step: Extern, position: int) -> str | None:
    return getattr(step.args[position], "buffer", None) if position < len(step.args) else None


def _template(program: Program, step: Template, symbols: Mapping[str, int]) -> tuple[int, int]:
    """Operands read once, outputs written once, and what prologue and epilogue touch besides."""
    axes = tuple(Axis(f"i{d}", n) for d, n in enumerate(program.buffer(step.outputs[0]).shape))
    bodies = Kernel(step.name, axes, (*step.prologue, *step.epilogue))
    read, written = footprint(program, bodies, symbols)
    read += sum(buffer_bytes(program, n, symbols) for n in dict.fromkeys(step.operands) if n not in bodies.reads)
    return read, written + sum(buffer_bytes(program, n, symbols) for n in step.outputs if n not in bodies.writes)


# -- kernels ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Region:
    """Elements of one access: inclusive ends per dimension, and how many distinct elements at most."""

    ends: tuple[tuple[int, int], ...]
    count: int

    def covers(self, other: _Region) -> bool:
        inside = all(a <= c and d <= b for (a, b), (c, d) in zip(self.ends, other.ends, strict=True))
        return inside and self.count == math.prod(b - a + 1 for a, b in self.ends)


def footprint(program: Program, kernel: Kernel, symbols: Mapping[str, int]) -> tuple[int, int]:
    """(bytes read, bytes written): the distinct elements of each buffer that loads and stores touch.

    Exact where a dimension's index runs over its values once (affine and disjoint axes, splits by // and %); elsewhere at most
    the points of the axes involved, the span of the index and the buffer's size.  A mask limits an index to its dimension; a gather
    counts one row per index.  store.add and store.max read what they write."""
    concrete = replace(kernel, axes=tuple(replace(a, extent=Index.of(a.extent.evaluate(symbols))) for a in kernel.axes))
    facts = Facts.of(program, concrete)
    facts.bounds = Bounds({n: (v, v) for n, v in symbols.items()}, facts.extents)
    reads = [op.access for op in kernel.loads] + [s.access for s in kernel.stores if s.mode != "set"]
    return _bytes(program, facts, reads, symbols), _bytes(program, facts, [s.access for s in kernel.stores], symbols)


def _bytes(program: Program, facts: Facts, accesses: list[Access], symbols: Mapping[str, int]) -> int:
    views: dict[tuple, list[_Region]] = {}
    for access in accesses:
        b = program.buffer(access.buffer)
        offset = None if b.alias_of is None else b.alias_of
        key = (program.root(b.name), offset, b.shape, b.layout, b.dtype)
        region = _region(facts, access, [n.evaluate(symbols) for n in b.shape], symbols)
        if region is not None:
            views.setdefault(key, []).append(region)
    moved: dict[str, int] = {}
    for (root, _, shape, _, dtype), regions in views.items():
        whole = math.prod(n.evaluate(symbols) for n in shape)
        kept: list[_Region] = []
        for region in sorted(regions, key=lambda r: -r.count):
            if region not in kept and not any(k.covers(region) for k in kept):
                kept.append(region)
        moved[root] = moved.get(root, 0) + min(whole, sum(r.count for r in kept)) * DTYPES[dtype].bytes
    return sum(min(n, math.prod(e.evaluate(symbols) for e in program.buffer(root).shape) * DTYPES[program.buffer(root).dtype].bytes)
               for root, n in moved.items())  # fmt: skip


def _region(facts: Facts, access: Access, shape: list[int], symbols: Mapping[str, int]) -> _Region | None:
    """What one access touches; None when that is nothing."""
    involved: set[str] = set()
    ends: list[tuple[int, int]] = []
    count = 1
    values = {n: Index.of(v) for n, v in symbols.items()}
    for expr, size in zip(access.index, shape, strict=True):
        resolved = facts.resolve(expr).substitute(values)
        axes = facts.index_axes((resolved,))
        points = math.prod(_extent(facts, a) for a in axes)
        low, high = (None, None) if facts.definitions.keys() & resolved.names() else _span(facts, resolved)
        low, high = max(0, low or 0), min(size - 1, size - 1 if high is None else high)
        if high < low or points == 0:
            return None
        ends.append((low, high))
        count *= min(points, high - low + 1)
        involved |= axes
    return _Region(tuple(ends), min(count, math.prod(_extent(facts, a) for a in involved)))


def _span(facts: Facts, expr: Index) -> tuple[int | None, int | None]:
    return facts.bounds.minimum(expr), facts.bounds.maximum(expr)


def _extent(facts: Facts, axis: str) -> int:
    return facts.extents[axis].constant or 0
