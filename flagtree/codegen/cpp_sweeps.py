"""The statements of one row: sweeps over the reduce axes, partial states, and the loops over lanes with their tails.

Every reduction over lanes keeps `partials` partial states, element e of a piece in state e % partials, whatever the vector width,
and joins them in one fixed order (cpp_states): the same bits at every level.  A tail runs the same statements on its n lanes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flagtree.codegen import cpp_ops as ops
from flagtree.codegen import cpp_states
from flagtree.codegen.cpp_body import BodyWriter
from flagtree.codegen.cpp_index import index_text, is_multiple
from flagtree.codegen.cpp_keep import Sweep, row_size, sweeps
from flagtree.codegen.cpp_layout import PARTIALS, Layout
from flagtree.codegen.cpp_pair import STEP, are_whole_steps, is_paired
from flagtree.codegen.cpp_scan import carry_type, declared
from flagtree.codegen.cpp_states import STATES, RowStates, block, each, member, start_of_all, state_name, struct
from flagtree.codegen.segments import Segment, segments
from flagtree.ir.flat import operands
from flagtree.ir.index import Index
from flagtree.ir.program import BodyOp, Compute, IndexValue, Load, Reduce, Scan, Store, defined

BLOCK = 256  # points of a reduce axis that one partial sum of a column takes
COLUMNS = 4  # vectors of columns reduced side by side: whole cache lines, and sums that do not wait for one another

@dataclass(frozen=True, slots=True)
class RowWriter:
    """`multiples`: what each symbol is a multiple of.  `chunk`: the lane axis is cut into pieces of that many elements, each a
    row of its own, whose bounds are the C++ variables `chunk_begin` and `chunk_end`; 0 when it is not."""

    layout: Layout
    multiples: Mapping[str, int]
    chunk: int

    def row(self) -> list[str]:
        """Statements of one row; the outer axes are variables around them."""
        lane = self.layout.lane
        if lane is None or self.layout.lane_reduced:
            return self._reduced_row()
        body = self.layout.kernel.body
        hoisted = [op for op in body if self.layout.is_uniform(op) and self._level(op) == 0]
        lines = self._statements(hoisted, self._outer_scope(), vector=False)
        done = {n for op in hoisted for n in defined(op)}
        pieces = segments(self.layout.kernel, lane.name)
        paired = is_paired(self.layout, pieces)
        for piece in pieces:
            lines += self._block(piece, done, paired)
        return lines

    # -- which ops ---------------------------------------------------------------------------------------------------
    def _outer_scope(self) -> frozenset[str]:
        return frozenset(a.name for a in self.layout.outer)

    def _level(self, op: BodyOp) -> int:
        """The first sweep before which an op outside sweeps can run."""
        return max((self.layout.level.get(n, 0) for n in (*operands(op), *defined(op))), default=0)

    # -- the lane axis is reduced ------------------------------------------------------------------------------------
    def _reduced_row(self) -> list[str]:
        body, lane = self.layout.kernel.body, self.layout.lane
        pieces = segments(self.layout.kernel, lane.name) if lane is not None else ()
        planned = [(piece, sweeps(self.layout, piece.body)) for piece in pieces]
        kept = sorted({n for _, all_sweeps in planned for s in all_sweeps for n in s.kept})
        paired = is_paired(self.layout, pieces) and (not kept or are_whole_steps(pieces, self.multiples))
        pending = [op for op in body if not self.layout.is_swept(op)]
        size = (row_size(self.layout) or 0) + (STEP if len(pieces) > 1 else 0)  # a piece's last step may end behind the row
        lines = [f"alignas(64) {ops.register(self.layout.kernel.dtypes[n])} {n}_row[{size}];" for n in kept]
        for sweep in range(self.layout.sweeps):
            ready = [op for op in pending if self._level(op) <= sweep]
            pending = [op for op in pending if op not in ready]
            lines += self._statements(ready, self._outer_scope(), vector=False)
            lines += self._lane_sweep(sweep, [(piece, all_sweeps[sweep]) for piece, all_sweeps in planned], paired)
        return lines + self._statements(pending, self._outer_scope(), vector=False)

    def _lane_sweep(self, sweep: int, pieces: list[tuple[Segment, Sweep]], paired: bool) -> list[str]:
        reduces = [op for op in self.layout.kernel.body if isinstance(op, Reduce) and self.layout.sweep_of(op) == sweep]
        whole = len(pieces) == 1
        tailed = not all(is_multiple(piece.hi - piece.lo, self.layout.partials, self.multiples) for piece, _ in pieces)
        states = RowStates(sweep, reduces, paired, tailed, whole and not self.layout.loops) if reduces else None
        lines = [] if states is None else states.declared()
        inner: list[str] = []
        for piece, work in pieces:
            inner += self._lane_loop(piece, work, states, paired, whole)
        scans = [op for op in self.layout.kernel.body if isinstance(op, Scan)]
        inner = [*(self._carry(op, whole) for op in scans), *inner]
        lines += self._loops(inner) if self.layout.loops else block("", inner) if scans else inner
        for op in reduces:
            assert states is not None
            lines += [*states.joined(op), *self._results(op, f"{member(op)}_all")]
        return lines

    def _lane_loop(self, piece: Segment, work: Sweep, states: RowStates | None, paired: bool, whole: bool) -> list[str]:
        """Full vectors, then the tail: the same statements, called with fewer lanes."""
        lane = self._lane_name
        if not work.body:
            return []
        scope = self._outer_scope() | {a.name for a in self.layout.loops} | {lane}
        lo, hi, extent = self._text(piece.lo), self._text(piece.hi), piece.hi - piece.lo
        once = [op for op in work.body if self._is_once(op, work)] if self.layout.kernel.bounds.nonnegative(extent - 1) else []
        writer = self._writer([op for op in work.body if op not in once], scope, True, work, paired, whole)
        writer.lines[:0] = self._read(work, paired)
        lines = self._statements(once, scope - {lane}, vector=False)
        lines += [*self._step(lane, writer, "" if states is None else states.name), f"i64 at = {lo};", f"const i64 end = {hi};"]
        if states is not None:
            return block("", [*lines, *states.fed(self.layout.kernel.bounds.maximum(extent))])
        width = "2 * W" if paired else "W"
        if extent.constant is None or extent.constant >= 2:
            lines.append(f"for (; at + {width} <= end; at += {width}) step(at, {width});")
        tail = not is_multiple(extent, PARTIALS[1], self.multiples)
        return block("", [*lines, *(["if (at < end) step(at, (int)(end - at));"] if tail else [])])

    def _is_once(self, op: BodyOp, work: Sweep) -> bool:
        """The same all along the lanes: before the loop over them, which has points (the compiler would not take a load out)."""
        return isinstance(op, (Load, Compute, IndexValue)) and op.name not in work.kept and not self.layout.varies_in_lanes(op.name)

    def _step(self, lane: str, writer: BodyWriter, state: str) -> list[str]:
        """The lambda that a loop over lanes calls for `n` elements from `lane` on."""
        head = f"const auto step = [&](const i64 {lane}, const int n"
        if not writer.pair:
            return block(f"{head}{f', {state} &part' if state else ''}) __attribute__((always_inline))", writer.lines, ";")
        count = ["const int count = (n + 1 - half) / 2;"] if state else []
        part = f", {state} &part" if state else ""
        half = block(f"const auto half_step = [&](const int half{part}) __attribute__((always_inline))", [*count, *writer.lines], ";")
        calls = ["half_step(0, even);", "half_step(1, odd);"] if state else ["half_step(0);", "half_step(1);"]
        parts = f", {state} &even, {state} &odd" if state else ""
        return block(f"{head}{parts}) __attribute__((always_inline))", [*writer.head, *half, *calls, *writer.tail], ";")

    def _read(self, work: Sweep, paired: bool) -> list[str]:
        lines = []
        for n in work.read:
            kind = ops.register(self.layout.kernel.dtypes[n])
            lines += [f"{kind}v {n};", f"__builtin_memcpy(&{n}, {self._place(n, paired)}, sizeof {n});"]
        return lines

    def _place(self, value: str, paired: bool) -> str:
        """Where a vector of a kept value stands in its row."""
        return f"{value}_row + {self._lane_name}{' + half * W' if paired else ''}"

    # -- the lane axis is parallel -----------------------------------------------------------------------------------
    def _block(self, piece: Segment, done: set[str], paired: bool) -> list[str]:
        """A loop over vectors of lanes; reduce axes, if any, are plain loops inside."""
        lane = self._lane_name
        pending = [op for op in piece.body if not self.layout.is_swept(op) and not self._is_hoisted(op, done)]
        scope = self._outer_scope() | {lane}
        if self._is_columns(pending):
            return block("", [*self._bounds(piece), *self._columns(piece, pending, scope)])
        streamed = frozenset(op.name for op in piece.body if isinstance(op, Load) and self.layout.is_streamed(op))
        writer = BodyWriter(self.layout, scope, True, streamed, pair=paired)
        for sweep in range(self.layout.sweeps):
            ready = [op for op in pending if self._level(op) <= sweep]
            pending = [op for op in pending if op not in ready]
            writer.lines += [*self._statements(ready, scope, vector=True), *self._inner_sweep(sweep, piece)]
        for op in pending:
            writer.write(op)
        if not writer.lines:
            return []
        lines = [*self._step(lane, writer, ""), *self._bounds(piece)]
        width = "2 * W" if paired else "W"
        lines.append(f"for (; at + {width} <= end; at += {width}) step(at, {width});")
        if not (is_multiple(piece.hi, PARTIALS[1], self.multiples) and is_multiple(piece.lo, PARTIALS[1], self.multiples)):
            lines.append("if (at < end) step(at, (int)(end - at));")
        return block("", lines)

    def _bounds(self, piece: Segment) -> list[str]:
        lines = [f"i64 at = {self._text(piece.lo)}, end = {self._text(piece.hi)};"]
        return lines + (["if (at < chunk_begin) at = chunk_begin;", "if (end > chunk_end) end = chunk_end;"] if self.chunk else [])

    def _is_columns(self, pending: list[BodyOp]) -> bool:
        """One sweep with nothing before it: several vectors of columns can be reduced side by side."""
        scans = any(isinstance(op, Scan) for op in self.layout.kernel.body)
        return bool(self.layout.kernel.reduced) and self.layout.sweeps == 1 and not scans and all(self._level(op) > 0 for op in pending)

    def _columns(self, piece: Segment, pending: list[BodyOp], scope: frozenset[str]) -> list[str]:
        """COLUMNS vectors in one walk over the reduce axes, then the rest one by one; a column's value does not depend on which."""
        body = sweeps(self.layout, piece.body)[0].body
        reduces = [op for op in body if isinstance(op, Reduce)]
        state, axes = state_name(0), self.layout.loops
        inside = self._statements(body, scope | {a.name for a in axes}, vector=True)
        after = [line for op in reduces for line in self._results(op, f"part.{member(op)}")]
        after += self._statements(pending, scope, vector=True)
        counters = "".join(f"const i64 {a.name}, " for a in axes)
        head = f"const i64 {self._lane_name}, const int n, {state} &part) __attribute__((always_inline))"
        point = "".join(f"{a.name}, " for a in axes)
        join = "".join(f" total[k].{m} = combine(total[k].{m}, part[k].{m});" for m in map(member, reduces))
        many = [f"{state} total[COLUMNS], part[COLUMNS];", *each("COLUMNS", f"total[k] = {start_of_all(reduces)};"),
                *self._blocked(each("COLUMNS", f"part[k] = {start_of_all(reduces)};"),
                               each("COLUMNS", f"add({point}at + k * W, W, part[k]);"), each("COLUMNS", "{" + join + " }")),
                *each("COLUMNS", "finish(at + k * W, W, total[k]);")]  # fmt: skip
        one = ["const int n = end - at < W ? (int)(end - at) : W;", f"{state} total = {start_of_all(reduces)}, part;",
               *self._blocked([f"part = {start_of_all(reduces)};"], [f"add({point}at, n, part);"], [join.replace("[k]", "").strip()]),
               "finish(at, n, total);"]  # fmt: skip
        return [
            *struct(0, reduces), f"enum : int {{ COLUMNS = {COLUMNS} }};",
            *block(f"const auto add = [&]({counters}{head}", inside, ";"), *block(f"const auto finish = [&]({head}", after, ";"),
            *block("for (; at + COLUMNS * W <= end; at += COLUMNS * W)", many), *block("for (; at < end; at += W)", one),
        ]  # fmt: skip

    def _blocked(self, start: list[str], add: list[str], join: list[str]) -> list[str]:
        """The reduce loops, the innermost in blocks of BLOCK points that are joined: a long sum stays as accurate as a short one."""
        inner, extent = self.layout.loops[-1].name, self._text(self.layout.loops[-1].extent)
        last = f"const i64 {inner}_end = {inner}_block + {BLOCK} < {extent} ? {inner}_block + {BLOCK} : {extent};"
        points = block(f"for (i64 {inner} = {inner}_block; {inner} < {inner}_end; ++{inner})", add)
        lines = block(f"for (i64 {inner}_block = 0; {inner}_block < {extent}; {inner}_block += {BLOCK})", [last, *start, *points, *join])
        for axis in reversed(self.layout.loops[:-1]):
            lines = block(f"for (i64 {axis.name} = 0; {axis.name} < {self._text(axis.extent)}; ++{axis.name})", lines)
        return lines

    def _is_hoisted(self, op: BodyOp, done: set[str]) -> bool:
        if isinstance(op, Store):
            return self.layout.is_uniform(op) and self._level(op) == 0
        return bool(done & set(defined(op)))

    def _inner_sweep(self, sweep: int, piece: Segment) -> list[str]:
        chosen = sweeps(self.layout, piece.body)[sweep].body
        if not chosen:
            return []
        reduces = [op for op in chosen if isinstance(op, Reduce)]
        lines = struct(sweep, reduces) if reduces else []
        if reduces:
            lines.append(f"{state_name(sweep)} part{sweep} = {start_of_all(reduces)};")
        scope = self._outer_scope() | {a.name for a in self.layout.loops} | {self._lane_name}
        carries = [self._carry(op, False) for op in chosen if isinstance(op, Scan)]
        loops = self._loops(self._statements(chosen, scope, vector=True), carries)
        lines += ["{", f"{state_name(sweep)} &part = part{sweep};", *loops, "}"] if reduces else loops
        for op in reduces:
            lines += self._results(op, f"part{sweep}.{member(op)}")
        return lines

    # -- reductions --------------------------------------------------------------------------------------------------
    def _accumulate(self, op: Reduce, lanes_reduced: bool, count: str) -> str:
        source = self.layout.kernel.dtypes
        values = [ops.cast(a, source[a], d) for a, d in zip(op.args, cpp_states.accumulators(op), strict=True)]
        state, step = f"part.{member(op)}", f"{cpp_states.type_of(op)}{{{', '.join(values)}}}"
        joined = f"combine({state}, {step})"
        return f"{state} = {f'keep({count}, {joined}, {state})' if lanes_reduced else joined};"

    def _results(self, op: Reduce, state: str) -> list[str]:
        lines = []
        for name, dtype, accumulator, part in zip(op.names, op.dtypes, cpp_states.accumulators(op), STATES[op.combiner][0], strict=True):
            text = f"{state}.{part}"
            if ops.register(accumulator) != ops.register(dtype):
                text = f"to_{ops.register(dtype)}({text})"
            lines.append(f"{ops.register(dtype)}v {name} = {ops.rounded(text, dtype)};")
        return lines

    # -- text --------------------------------------------------------------------------------------------------------
    @property
    def _lane_name(self) -> str:
        assert self.layout.lane is not None
        return self.layout.lane.name

    def _text(self, index: Index) -> str:
        return index_text(index, {}, self.layout.kernel.bounds)

    def _statements(self, body: Iterable[BodyOp], scope: frozenset[str], vector: bool) -> list[str]:
        return self._writer(body, scope, vector).lines

    def _writer(self, body: Iterable[BodyOp], scope: frozenset[str], vector: bool, work: Sweep | None = None,
                paired: bool = False, whole: bool = False) -> BodyWriter:  # fmt: skip
        writer = BodyWriter(self.layout, scope, vector, work.streamed if work else frozenset(), whole, paired)
        kept = work.kept if work else frozenset()
        for op in body:
            if isinstance(op, Reduce):
                writer.lines.append(self._accumulate(op, self.layout.lane_reduced, "count" if paired else "n"))
            else:
                writer.write(op)
                writer.lines += [f"__builtin_memcpy({self._place(n, paired)}, &{n}, sizeof {n});" for n in defined(op) if n in kept]
        return writer

    def _carry(self, op: Scan, whole: bool) -> str:
        kind = carry_type(op)
        return declared(self.layout, op, whole, cpp_states.start_number(kind, STATES[op.combiner][1][0], op.dtype))

    def _loops(self, inner: list[str], carries: Iterable[str] = ()) -> list[str]:
        """Plain loops over the reduce axes; running values start where the innermost is entered."""
        lines = inner
        for position, axis in enumerate(reversed(self.layout.loops)):
            lines = block(f"for (i64 {axis.name} = 0; {axis.name} < {self._text(axis.extent)}; ++{axis.name})", lines)
            if not position:
                lines = [*carries, *lines]
        return lines
