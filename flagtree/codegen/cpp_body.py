"""Statements for body ops: one vector of W lanes, or (in a row's own part) one value in every lane.

Every memory access goes through here, so this is where it is decided that nothing is read or written outside the data:
lanes from `n` on, and lanes whose mask is false, touch nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flagtree.codegen import cpp_ops as ops
from flagtree.codegen.cpp_index import index_text
from flagtree.codegen.cpp_layout import Layout
from flagtree.codegen.cpp_scan import step
from flagtree.errors import CodegenError
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.flat import operands
from flagtree.ir.index import ONE, Index
from flagtree.ir.ops import OPS
from flagtree.ir.program import Arg, BodyOp, Compute, IndexValue, Load, Scalar, Scan, Store

ROUND, NEAREST = "round_bf16(", "nearest_bf16("  # around all of an expression


@dataclass(slots=True)
class BodyWriter:
    """Writes ops of one kernel.  `scope`: axes that have a C++ variable where the statements stand.  `vector`: the lane axis is
    one of them, its variable the first of `n` lanes."""

    layout: Layout
    scope: frozenset[str]
    vector: bool
    streamed: frozenset[str] = frozenset()  # loads that memory serves, one line after another
    whole: bool = False  # the lane axis is walked as one piece
    pair: bool = False  # `lines` run for `half` 0 and 1 of words that `head` loads and `tail` stores (cpp_pair)
    lines: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    nearest: dict[str, str] = field(default_factory=dict)  # bf16 values as memory takes them: the low half of a word does not matter

    def write(self, op: BodyOp) -> None:
        """Append the statements of one op; a Reduce is not one (cpp_sweeps does those)."""
        if isinstance(op, Load):
            self._load(op)
        elif isinstance(op, Compute):
            text = self._compute(op)
            self._define(op.name, op.dtype, text)
            if text.startswith(ROUND):
                self.nearest[op.name] = NEAREST + text[len(ROUND) :]
        elif isinstance(op, IndexValue):
            self._index_value(op)
        elif isinstance(op, Scan):
            self._scan(op)
        elif isinstance(op, Store):
            self._store(op)
        else:
            raise CodegenError("a reduction is not one statement")

    # -- names and types ---------------------------------------------------------------------------------------------
    @property
    def _lane(self) -> str | None:
        return self.layout.lane.name if self.vector and self.layout.lane is not None else None

    @property
    def _dtypes(self) -> Mapping[str, str]:
        return self.layout.kernel.dtypes

    def _varies(self, names: frozenset[str] | tuple[str, ...]) -> bool:
        return self.vector and any(n == self._lane or self.layout.varies_in_lanes(n) for n in names)

    def _index(self, index: Index, lane: str | None = None) -> str:
        """`index` as text; `lane` is the C++ integer that picks a lane, None where nothing differs between lanes."""
        names = {}
        for n in index.names() & self._dtypes.keys():
            names[n] = f"(i64){n}[{lane if lane is not None and self.layout.varies_in_lanes(n) else 0}]"
        if lane is not None and self._lane is not None:
            names[self._lane] = f"({self._lane} + {lane})"
        return index_text(index, names, self.layout.kernel.bounds)

    def _define(self, name: str, dtype: str, text: str) -> None:
        self.lines.append(f"{ops.register(dtype)}v {name} = {text};")

    # -- values ------------------------------------------------------------------------------------------------------
    def _compute(self, op: Compute) -> str:
        typed = op.args[1:] if op.op == "where" else op.args
        named = [self._dtypes[a] for a in typed if isinstance(a, str)]
        if op.op in ("cast", "bitcast"):
            if not named:
                return ops.splat(op.args[0], op.dtype)  # type: ignore[arg-type]
            return (ops.cast if op.op == "cast" else ops.bitcast)(str(op.args[0]), named[0], op.dtype)
        dtype = named[0] if named else op.dtype if OPS[op.op].result == "same" else _natural(typed[0])
        dtype = self._common(op, typed, dtype)
        if op.op == "div" and dtype == op.dtype == "f32" and self._divides_alike(op.args):
            return f"divided({op.args[0]}, {op.args[1]})"
        alike = bool(named) and op.op in ops.ALIKE and not self._varies(operands(op))
        scalar_left = not alike and op.op in ops.BINARY and len(named) == len(op.args) - 1  # vector op scalar: the compiler spreads it
        args = tuple(self._arg(a, dtype, scalar_left and dtype != "b1") for a in typed)
        if op.op == "where":
            args = (self._arg(op.args[0], "b1", False), *args)
        return ops.cast(ops.compute(op.op, dtype, args, alike), "b1" if OPS[op.op].result == "b1" else dtype, op.dtype)

    def _divides_alike(self, args: tuple[Arg, ...]) -> bool:
        """Every lane by the same value, which the loop over lanes does not change."""
        over, by = args
        return isinstance(over, str) and isinstance(by, str) and self._varies((over,)) and not self._varies((by,))

    def _common(self, op: Compute, typed: tuple[Arg, ...], dtype: str) -> str:
        """Positions that became i32 compared with one another or with literals stay so; else operands are already equal."""
        return "i64" if any(isinstance(a, str) and self._dtypes[a] == "i64" for a in typed) and dtype == "i32" else dtype

    def _arg(self, arg: Arg, dtype: str, scalar: bool) -> str:
        if isinstance(arg, str):
            return ops.cast(arg, self._dtypes[arg], dtype)
        return ops.literal(arg, dtype) if scalar else ops.splat(arg, dtype)

    def _index_value(self, op: IndexValue) -> None:
        register = ops.register(op.dtype)
        if not self._varies(tuple(op.expr.names())):
            self._define(op.name, op.dtype, ops.rounded(f"splat(({register})({self._index(op.expr)}))", op.dtype))
            return
        assert self._lane is not None
        step = op.expr.coefficient(self._lane)
        if step is not None and register in ("i32", "i64") and not self._varies(tuple((op.expr - step * self._lane).names())):
            lanes = "lanes" if register == "i32" else "lanes64"
            spread = lanes if step == ONE else f"{lanes} * ({register})({self._index(step)})"
            self._define(op.name, op.dtype, ops.rounded(f"splat(({register})({self._index(op.expr)})) + {spread}", op.dtype))
            return
        self.lines += [f"{register} {op.name}_lane[W];", f"for (int l = 0; l < W; ++l) {op.name}_lane[l] = {self._index(op.expr, 'l')};"]
        self.lines += [f"{register}v {op.name};", f"__builtin_memcpy(&{op.name}, {op.name}_lane, sizeof {op.name});"]

    def _scan(self, op: Scan) -> None:
        lines, text = step(self.layout, op, self.whole, self._lane == op.axis)
        self.lines += lines
        self._define(op.name, op.dtype, text)

    # -- memory ------------------------------------------------------------------------------------------------------
    def _load(self, op: Load) -> None:
        dtype = next(b.dtype for b in self.layout.kernel.buffers if b.name == op.access.buffer)
        text = self._loaded(op, dtype)
        self._define(op.name, op.dtype, ops.cast(text, dtype, op.dtype))

    def _loaded(self, op: Load, dtype: str) -> str:
        access, offset = op.access, op.access.index[0]
        other = _other(op.other, dtype)
        masked = access.mask is not None
        spread_mask = masked and self._varies((str(access.mask),))
        if not self._varies(tuple(offset.names())):
            address = f"{access.buffer} + {self._index(offset)}"
            text = f"one_bf16({address})" if dtype == "bf16" else f"widen_{dtype}(load_one({address}))"
            if spread_mask:
                return f"any_lane({access.mask}, n) ? select({access.mask}, {text}, {other}) : {other}"
            return f"{access.mask}[0] ? {text} : {other}" if masked else text
        if not self._is_contiguous(offset):
            return self._gather(op, dtype, other)
        address = f"{access.buffer} + {self._index(offset)}"
        if op.name in self.streamed:
            (self.head if self.pair else self.lines).append(f"ahead({address});")
        if self.pair:
            self.head.append(f"const u32v {op.name}_words = load_pair({address}, n);")
            return f"half_of({op.name}_words, half)"
        if spread_mask:
            text = f"widen_{dtype}(load_where({address}, {access.mask}, n))"
            return text if not op.other else f"select({access.mask}, {text}, {other})"
        text = f"widen_{dtype}(load({address}, n))"
        return f"{access.mask}[0] ? {text} : {other}" if masked else text

    def _is_contiguous(self, offset: Index) -> bool:
        assert self._lane is not None
        return offset.coefficient(self._lane) == ONE and not self._varies(tuple((offset - self._lane).names()))

    def _gather(self, op: Load, dtype: str, other: str) -> str:
        element, part = ops.memory(dtype), f"{op.name}_part"
        condition = f"if ({self._lane_of(op.access.mask)}) " if op.access.mask is not None else ""
        self.lines += [
            f"{element} {part}[W] = {{}};",
            f"for (int l = 0; l < n; ++l) {condition}{part}[l] = {op.access.buffer}[{self._index(op.access.index[0], 'l')}];",
        ]
        text = f"widen_{dtype}(load({part}, W))"
        return f"select({op.access.mask}, {text}, {other})" if op.access.mask is not None and op.other else text

    def _lane_of(self, value: str | None) -> str:
        return f"{value}[l]" if self._varies((str(value),)) else f"{value}[0]"

    def _store(self, op: Store) -> None:
        dtype = next(b.dtype for b in self.layout.kernel.buffers if b.name == op.access.buffer)
        value = ops.cast(op.value, self._dtypes[op.value], dtype)
        if dtype == "bf16" and op.mode == "set":
            value = NEAREST + value[len(ROUND) :] if value.startswith(ROUND) else self.nearest.get(value, value)
        guard = self._guard(op)
        if op.mode != "set":
            self._update(op, dtype, value, guard)
            return
        offset, mask = op.access.index[0], op.access.mask
        narrow = f"narrow_{dtype}({value})"
        spread_mask = mask is not None and self._varies((mask,))
        if mask is not None and not spread_mask:
            guard = f"{guard}if ({mask}[0]) "
        if self.pair and self._varies(tuple(offset.names())):
            halves = f"{op.value}_to_{op.access.buffer}"
            self.head.append(f"f32v {halves}[2];")
            self.lines.append(f"{halves}[half] = {value};")
            address = f"{op.access.buffer} + {self._index(offset)}"
            whole = f"store_past({address}, joined({halves}), n, {large_name(op)});"
            self.tail.append(whole if op.access.buffer in self.layout.large else f"store_pair({address}, {halves}, n);")
        elif self.vector and self._varies(tuple(offset.names())) and self._is_contiguous(offset):
            past = op.access.buffer in self.layout.large
            call = f"store_where({op.access.buffer} + {self._index(offset)}, {narrow}, {mask}, n)" if spread_mask else \
                f"store{'_past' * past}({op.access.buffer} + {self._index(offset)}, {narrow}, n{f', {large_name(op)}' * past})"  # fmt: skip
            self.lines.append(f"{guard}{call};")
        elif self._varies(operands(op)):
            condition = f"if ({mask}[l]) " if spread_mask else ""
            source, address = f"{op.value}_to_{op.access.buffer}", f"{op.access.buffer}[{self._index(offset, 'l')}]"
            self.lines += [f"const auto {source} = {narrow};", f"{guard}for (int l = 0; l < n; ++l) {condition}{address} = {source}[l];"]
        else:
            self.lines.append(f"{guard}{op.access.buffer}[{self._index(offset)}] = {narrow}[0];")

    def _guard(self, op: Store) -> str:
        """An update happens once: at the first point of the axes in scope that it does not depend on."""
        if op.mode == "set":
            return ""
        missing = sorted(self.scope - self.layout.kernel.op_depends(op))
        return f"if ({' && '.join(f'{a} == 0' for a in missing)}) " if missing else ""

    def _update(self, op: Store, dtype: str, value: str, guard: str) -> None:
        """Read, combine, write: neighbours together, else lane after lane, since two lanes may hit one element."""
        if DTYPES[dtype].kind == "bool":
            raise CodegenError(f"cannot generate C++ for store.{op.mode} to a buffer of {dtype}")
        offset, mask = op.access.index[0], op.access.mask
        if self.vector and not self.pair and self._is_contiguous(offset) and not (mask is not None and self._varies((mask,))):
            self._update_neighbours(op, dtype, value, guard + (f"if ({mask}[0]) " if mask is not None else ""))
            return
        several = self._varies(operands(op))
        lane, count = ("l", "n") if several else ("0", "1")
        condition = f"if ({self._lane_of(op.access.mask) if several else f'{op.access.mask}[0]'}) " if op.access.mask is not None else ""
        combined = ops.compute(op.mode, dtype, ("before", f"splat({op.value}_in[{lane}])"))
        address = f"{op.access.buffer}[{self._index(op.access.index[0], 'l' if several else None)}]"
        self.lines += [
            f"const {ops.register(dtype)}v {op.value}_in = {value};",
            f"{guard}for (int l = 0; l < {count}; ++l) {condition}{{",
            f"  const {ops.register(dtype)}v before = widen_{dtype}(load_one(&{address}));",
            f"  {address} = narrow_{dtype}({combined})[0];",
            "}",
        ]
        self.lines[-5:] = ["{", *("  " + line for line in self.lines[-5:]), "}"]

    def _update_neighbours(self, op: Store, dtype: str, value: str, guard: str) -> None:
        """Each lane has an element of its own."""
        place, kind = f"{op.access.buffer} + {self._index(op.access.index[0])}", f"const {ops.register(dtype)}v"
        combined = ops.compute(op.mode, dtype, ("before", "added"))
        body = f"{kind} before = widen_{dtype}(load({place}, n)), added = {value}; store({place}, narrow_{dtype}({combined}), n);"
        self.lines.append(f"{guard}{{ {body} }}")


def large_name(op: Store) -> str:
    """The C++ variable that says whether this launch writes so much through `op` that it goes past the caches."""
    return f"{op.access.buffer}_large"


def _natural(literal: Arg) -> str:
    return "b1" if isinstance(literal, bool) else "i64" if isinstance(literal, int) else "f64"


def _other(other: Scalar | None, dtype: str) -> str:
    return ops.splat(0 if other is None else other, dtype)
