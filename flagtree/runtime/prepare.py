"""A launch list made executable, once: callees resolved, every buffer a slot, every address a word, every index a closure.

Nothing here depends on the sizes of a call; `launch.py` builds frames from it.  All errors of a bad launch list come
from here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Union

import torch

from flagtree.errors import BindError, BundleError
from flagtree.runtime import memory, operands
from flagtree.runtime.direct import out_form, written_into
from flagtree.runtime.dtypes import torch_dtype
from flagtree.runtime.expand import GIVEN, Above, Declared, ExternCall, KernelCall, Unrolled, expand
from flagtree.runtime.gpu import Device
from flagtree.runtime.index import Expression, Values, compile_index, evaluate, row_major, symbols_of

Slots = list[Any]
Build = Callable[[Slots, Values], object]
CPU = torch.device("cpu")  # always named: a caller may have set another default device
WORD = 8  # bytes of an address and of a symbol in the kernels' ABI


class Library(Protocol):
    """Compiled kernels.  `tensors`: where their tensors live; `device`: what launches go to, None where they run at once."""

    @property
    def tensors(self) -> torch.device: ...
    @property
    def device(self) -> Device | None: ...

    def kernel(self, digest: str) -> Any:
        """What `launch` needs of a kernel, all of it loaded."""

    def launch(self, calls: Sequence[tuple[Any, int, int]], stream: int) -> list[Callable[[], object]]:
        """Closures that run neighbouring (kernel, address of its pointers, address of its symbols), in order."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a buffer lies in memory; `offset` in elements from its root.  `late`: an extern's result decides it."""

    name: str
    role: str
    dtype: torch.dtype
    shape: tuple[Expression, ...]
    strides: tuple[Expression, ...] | None
    offset: Expression
    late: bool

    def at(self, values: Values) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and strides in elements."""
        sizes = tuple([evaluate(e, values) for e in self.shape])
        return sizes, row_major(sizes) if self.strides is None else tuple([evaluate(e, values) for e in self.strides])


@dataclass(frozen=True, slots=True)
class SymbolSpec:
    """A symbol's promise and where its value is read: ("dim" | "stride", buffer, dimension) or ("scalar", buffer)."""

    name: str
    lo: int
    hi: int
    multiple: int
    kind: str
    buffer: str
    dimension: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Kernel call: bytes from the start of the pointer block and of the symbol block.  `above`: (rows, the most that the kernel takes,
    the call for more)."""

    kernel: Any
    pointers: int
    symbols: int
    above: tuple[Expression, int, Call] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """Operator call.  `arguments`, `keywords`: slots; `computed`: slots filled just before; `views`: buffers whose slot must
    hold a view; `outputs`: slot or None; `resolves`: (symbol, output slot, spec); `copied`: results must be made our own; `into`: the
    buffer that the operator, then its `out` form, writes."""

    step: ExternCall
    operator: torch._ops.OpOverload
    arguments: tuple[int, ...]
    keywords: tuple[tuple[str, int], ...]
    computed: tuple[tuple[int, Build], ...]
    views: tuple[str, ...]
    outputs: tuple[int | None, ...]
    resolves: tuple[tuple[int, int, SymbolSpec], ...]
    copied: bool
    into: str | None = None


@dataclass(frozen=True, slots=True)
class Allocate:
    name: str


@dataclass(frozen=True, slots=True)
class Release:
    slots: tuple[int, ...]


Step = Union[Launch, Call, Allocate, Release]


class Prepared:
    """The result: `steps` over `slots` (initial values), `words` root to [(place in the pointer block, byte offset)]."""

    def __init__(self, launch: Mapping[str, Any], library: Library | None) -> None:
        self.program: Unrolled = expand(launch)
        self.library = library
        self.device = None if library is None else library.device
        self.tensors = CPU if library is None else library.tensors
        self.symbols = [_symbol(s, self.program) for s in self.program.symbols]
        self.places = {s.name: i for i, s in enumerate(self.symbols)}
        self.homes = memory.assign(self.program)
        self.layouts = {name: self._layout(b) for name, b in self.program.buffers.items() if b.role != "formal"}
        self.slots: Slots = []
        self.slot: dict[str, int] = {}
        self._slots_of_root: dict[str, list[int]] = {}
        self.fixed: set[int] = set()  # slots that hold a constant operand
        self.words: dict[str, list[tuple[int, Expression]]] = {}
        self.pointer_count = 0
        self.symbol_words: list[Expression] = []
        self._symbol_blocks: dict[str, int] = {}
        self.late_words: list[int] = []
        self.restrided: dict[str, int] = {}
        for name in (*(b.name for b in self.program.given), *self.homes.fresh, *self.homes.produced):
            self._slot_of(name)
        self.written = {self.program.root(n) for s in self.program.steps for n in (s.writes if isinstance(s, KernelCall) else s.mutates)}
        self.steps = self._steps()
        self.outputs = [self._output(o) for o in self.program.outputs]
        self.key_symbols = self._key_symbols()

    # -- declarations ------------------------------------------------------------------------------------------------
    def expression(self, json: object) -> Expression:
        return compile_index(json, self.places)

    def _layout(self, buffer: Declared) -> Layout:
        offset = self.program.offset(buffer.name)
        used = symbols_of([buffer.shape, buffer.strides or [], offset])
        if buffer.base is not None and buffer.dtype != self.program.buffers[self.program.root(buffer.name)].dtype:
            raise BundleError(f"the view '{buffer.name}' has another element type than its base")
        return Layout(
            buffer.name,
            self.program.buffers[self.program.root(buffer.name)].role,
            torch.uint8 if buffer.role == "opaque" else torch_dtype(buffer.dtype),
            tuple(map(self.expression, buffer.shape)),
            None if buffer.strides is None else tuple(map(self.expression, buffer.strides)),
            self.expression(offset),
            bool(used & self.homes.late),
        )

    def _key_symbols(self) -> tuple[int, ...]:
        """The symbols that decide sizes of ours: a frame serves one combination of their values."""
        used: set[str] = set()
        for buffer in self.program.buffers.values():
            if buffer.role not in GIVEN or buffer.base is not None:
                used |= symbols_of([buffer.shape, buffer.strides or [], buffer.offset])
        return tuple(sorted(self.places[n] for n in used - self.homes.late if n in self.places))

    def _slot_of(self, name: str) -> int:
        if name not in self.slot:
            self.slot[name] = self._new_slot(None)
            self._slots_of_root.setdefault(self.program.root(name), []).append(self.slot[name])
        return self.slot[name]

    def _new_slot(self, value: object) -> int:
        self.slots.append(value)
        return len(self.slots) - 1

    # -- steps -------------------------------------------------------------------------------------------------------
    def _steps(self) -> list[Step]:
        steps: list[Step] = []
        lives = self.homes.lifetimes
        allocate: dict[int, list[str]] = {}
        dead: dict[int, list[str]] = {}
        for name in self.homes.fresh:
            allocate.setdefault(lives[name].first, []).append(name)
        for name in (*self.homes.fresh, *self.homes.produced):
            dead.setdefault(lives[name].last, []).append(name)
        pending: list[str] = []
        for i, step in enumerate(self.program.steps):
            if pending and (isinstance(step, ExternCall) or i in allocate):  # freed before memory is asked for again
                steps.append(Release(self._with_views(pending)))
                pending = []
            steps += [Allocate(name) for name in allocate.get(i, ())]
            steps.append(self._launch(step) if isinstance(step, KernelCall) else self._call(step, self._into(step)))
            pending += dead.get(i, ())
        return steps

    def _into(self, step: ExternCall) -> str | None:
        return step.outputs[0] if len(step.outputs) == 1 and step.outputs[0] in self.homes.direct else None

    @property
    def calls(self) -> list[Call]:
        """Every operator call that a frame may make."""
        return [c for s in self.steps if (c := s if isinstance(s, Call) else s.above[2] if isinstance(s, Launch) and s.above else None)]

    def _with_views(self, roots: list[str]) -> tuple[int, ...]:
        return tuple(slot for root in roots for slot in self._slots_of_root.get(root, ()))

    def _launch(self, step: KernelCall) -> Launch:
        if self.library is None:
            raise BundleError(f"the kernel '{step.name}' has no library to run from")
        start = self.pointer_count
        for place, name in enumerate(step.buffers, start):
            layout, root = self.layouts[name], self.program.root(name)
            self._slot_of(root)
            self.words.setdefault(root, []).append((place, _scaled(layout.offset, layout.dtype.itemsize)))
        self.pointer_count += len(step.buffers)
        above = None if step.above is None else (self.expression(step.above.rows), step.above.at_most, self._call_above(step.above))
        return Launch(self.library.kernel(step.digest), start * WORD, self._symbol_block(step.symbols) * WORD, above)

    def _call_above(self, above: Above) -> Call:
        if written_into(self.program, above.call, self.homes.late) is None:
            raise BundleError(f"the call above the kernel '{above.call.name}' cannot write the kernel's result", where=above.call.callee)
        return self._call(above.call, above.call.outputs[0])

    def _symbol_block(self, symbols: tuple) -> int:
        """Kernels with equal symbol expressions share their words."""
        key = repr(symbols)
        if key in self._symbol_blocks:
            return self._symbol_blocks[key]
        start = self._symbol_blocks[key] = len(self.symbol_words)
        for json in symbols:
            if symbols_of(json) & self.homes.late:
                self.late_words.append(len(self.symbol_words))
            self.symbol_words.append(self.expression(json))
        return start

    def _call(self, step: ExternCall, into: str | None) -> Call:
        """`into`: the buffer of ours that the operator writes instead of returning it."""
        operator = operands.resolve(step.callee if into is None else out_form(step.callee))
        computed: list[tuple[int, Build]] = []
        arguments = tuple(self._operand(a, computed) for a in step.args)
        keywords = tuple((k, self._operand(v, computed)) for k, v in sorted(step.kwargs.items()))
        for name in (*step.operands, *step.mutates):
            self._slot_of(name)
            self._slot_of(self.program.root(name))
        aliased = next((o for o in step.outputs if o and self.program.buffers[o].base is not None), None)
        if aliased is not None:
            raise BundleError(f"the extern '{step.name}' returns into the view '{aliased}'")
        outputs = tuple(None if o is None else self._slot_of(o) for o in step.outputs)
        resolves = tuple(
            (i, self.slot[s.buffer], s) for i, s in enumerate(self.symbols) if s.name in self.homes.late and s.buffer in step.outputs
        )
        used = (*step.operands, *(o for o in step.outputs if o))
        only_read = all(self.layouts[n].role in GIVEN for n in step.operands)
        only_read = only_read and not any(self.program.root(n) in self.written for n in used)
        views = tuple(n for n in step.operands if self.program.buffers[n].base is not None)
        copied = into is None and operands.returns_view(operator) and not only_read
        return Call(step, operator, arguments, keywords, tuple(computed), views, outputs, resolves, copied, into)

    def _operand(self, json: object, computed: list[tuple[int, Build]]) -> int:
        if isinstance(json, dict) and "buffer" in json:
            return self._slot_of(json["buffer"])
        build = self._build(json)
        if build is None:
            slot = self._new_slot(operands.constant(json))
            self.fixed.add(slot)
        else:
            slot = self._new_slot(None)
            computed.append((slot, build))
        return slot

    def _build(self, json: object) -> Build | None:
        """A closure for an operand that changes from call to call, None for a constant one."""
        if isinstance(json, dict) and "buffer" in json:
            slot = self._slot_of(json["buffer"])
            return lambda slots, values: slots[slot]
        if isinstance(json, dict) and "index" in json:
            expression = self.expression(json["index"])
            return lambda slots, values: evaluate(expression, values)
        if isinstance(json, dict) and "list" in json:
            parts = [(self._build(v), v) for v in json["list"]]
            if all(b is None for b, _ in parts):
                return None
            builds = [b or _always(operands.constant(v)) for b, v in parts]
            return lambda slots, values: [b(slots, values) for b in builds]
        return None

    def _output(self, output: object) -> Build:
        if output is None:
            return _always(None)
        if isinstance(output, dict) and "index" in output:
            expression = self.expression(output["index"])
            return lambda slots, values: evaluate(expression, values)
        if not isinstance(output, str) or output not in self.layouts:
            raise BundleError("the launch list hands back an unknown buffer", where=repr(output)[:200])
        return self.view(output)

    def view(self, name: str) -> Build:
        """A closure that gives the buffer's tensor from its root's, which is in its slot by then."""
        layout, root = self.layouts[name], self._slot_of(self.program.root(name))
        if self.program.buffers[name].base is None:
            return lambda slots, values: slots[root]

        def build(slots: Slots, values: Values) -> object:
            base = slots[root]
            return base.as_strided(*layout.at(values), base.storage_offset() + evaluate(layout.offset, values))

        return build


def _always(value: object) -> Build:
    return lambda slots, values: value


def _scaled(offset: Expression, itemsize: int) -> Expression:
    return offset * itemsize if isinstance(offset, int) else lambda values: offset(values) * itemsize


def _symbol(record: Mapping[str, Any], program: Unrolled) -> SymbolSpec:
    kind, buffer, *rest = record["source"]
    if kind not in ("dim", "stride", "scalar") or buffer not in program.buffers or (kind != "scalar" and len(rest) != 1):
        raise BundleError(f"the symbol '{record['name']}' has no source that is known", where=repr(record["source"])[:200])
    rank = len(program.buffers[buffer].shape)
    if rest and not (isinstance(rest[0], int) and 0 <= rest[0] < rank):
        raise BundleError(f"the symbol '{record['name']}' names a dimension that '{buffer}' does not have")
    return SymbolSpec(record["name"], record["min"], record["max"], record["multiple"], kind, buffer, rest[0] if rest else 0)


def read_symbol(symbol: SymbolSpec, value: Any) -> int:
    """The symbol's value from its source."""
    if symbol.kind == "dim":
        return value.shape[symbol.dimension]
    return value.stride(symbol.dimension) if symbol.kind == "stride" else int(value)


def check_symbol(symbol: SymbolSpec, value: int) -> None:
    """BindError when a value breaks the symbol's promise."""
    where = f"{symbol.kind} {symbol.dimension} of {symbol.buffer}" if symbol.kind != "scalar" else symbol.buffer
    if not symbol.lo <= value <= symbol.hi:
        hint = "what was compiled covers no other size: compile for a wider range"
        raise BindError(f"{symbol.name} = {value} is out of range", where=where, why=f"{symbol.lo} to {symbol.hi} is promised", hint=hint)
    if value % symbol.multiple:
        raise BindError(f"{symbol.name} = {value} is not a multiple of {symbol.multiple}", where=where)
