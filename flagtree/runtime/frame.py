"""A frame: everything that a launch list needs for one combination of sizes.

Arena, the words where kernels find addresses and symbols, and a flat list of closures, one a step.  It serves one call at a
time: the call writes the addresses of what is new and runs the closures.  `launch.py` makes and pools frames.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flagtree.errors import BindError
from flagtree.runtime import memory
from flagtree.runtime.direct import result_sizes
from flagtree.runtime.expand import Declared
from flagtree.runtime.index import Expression, evaluate, same_strides
from flagtree.runtime.prepare import Allocate, Build, Call, Launch, Layout, Prepared, Release, Step, check_symbol, read_symbol

# what Inductor's generated code calls for its outputs: it goes past the dispatcher, in half the time
empty_strided_cpu: Callable[..., torch.Tensor] = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
Positions = tuple[tuple[int, int], ...]  # (word of the pointer block, bytes after element 0)


class Frame:
    """Everything for one combination of sizes: `inputs` come with each call, `bound` stay, `values` are the symbols'.

    On a GPU it is also for one `stream`: its arena is memory of that stream, its launches go there."""

    def __init__(
        self, prepared: Prepared, inputs: Sequence[Declared], bound: Mapping[str, Any], values: Sequence[int], stream: int = 0
    ) -> None:
        self.prepared, self.tensors = prepared, prepared.tensors
        self.values = list(values)
        self.words = array("Q", bytes(8 * max(1, prepared.pointer_count)))
        self.numbers = array("q", bytes(8 * max(1, len(prepared.symbol_words))))
        self._early = [(i, e) for i, e in enumerate(prepared.symbol_words) if not isinstance(e, int) and i not in set(prepared.late_words)]
        self._late = [(i, prepared.symbol_words[i]) for i in prepared.late_words]
        for i, e in enumerate(prepared.symbol_words):
            self.numbers[i] = e if isinstance(e, int) else 0
        self.slots = list(prepared.slots)
        self.persistent: set[str] = set()
        self._allocate_arena()
        for name, value in bound.items():
            self._fix(name, value)
        self._views = self._fix_views()
        self._inputs = self._input_writers(inputs)
        self.steps = self._closures(stream)
        self.template = list(self.slots)
        self._refresh(self.values)

    # -- what stays from call to call --------------------------------------------------------------------------------
    def _allocate_arena(self) -> None:
        prepared = self.prepared
        shapes = {n: prepared.layouts[n].at(self.values) for n in prepared.homes.arena}
        sizes = {n: _extent(*shapes[n]) * prepared.layouts[n].dtype.itemsize for n in shapes}
        offsets, self.arena_bytes = memory.place(sizes, prepared.homes.lifetimes)
        raw = torch.empty(self.arena_bytes + memory.ALIGNMENT, dtype=torch.uint8, device=self.tensors)
        self.arena = raw[-raw.data_ptr() % memory.ALIGNMENT :][: self.arena_bytes]
        self.arena_start = self.arena.data_ptr()
        needed = {n for c in prepared.calls for n in (*c.step.operands, *c.step.mutates, c.into) if n}
        roots = {prepared.program.root(n) for n in needed}
        for name, offset in offsets.items():
            self._point(name, self.arena_start + offset)
            if name in roots:
                tensor = self.arena[offset : offset + sizes[name]].view(prepared.layouts[name].dtype)
                self.slots[prepared.slot[name]] = tensor.as_strided(*shapes[name], tensor.storage_offset())
                self.persistent.add(name)

    def _fix(self, name: str, value: Any) -> None:
        self.slots[self.prepared.slot[name]] = value
        if isinstance(value, torch.Tensor):
            self._point(name, value.data_ptr())
            self.persistent.add(name)

    def _fix_views(self) -> set[str]:
        """Views of what stays are made once; returns their names."""
        program, fixed = self.prepared.program, set()
        for call in self.prepared.calls:
            for name in call.views:
                if name not in fixed and program.root(name) in self.persistent and not self.prepared.layouts[name].late:
                    self.slots[self.prepared.slot[name]] = self.prepared.view(name)(self.slots, self.values)
                    fixed.add(name)
        return fixed

    def positions(self, name: str) -> Positions:
        """Where kernels look for the buffer's address, and for its views'."""
        return tuple((at, evaluate(offset, self.values)) for at, offset in self.prepared.words.get(name, ()))

    def _point(self, name: str, address: int) -> None:
        for at, offset in self.positions(name):
            self.words[at] = address + offset

    def _input_writers(self, inputs: Sequence[Declared]) -> list[tuple[int, int, Positions, torch.Tensor | None]]:
        """Per argument: its place, its slot, the words that hold its address, the cell where a number is kept for kernels."""
        out = []
        for i, buffer in enumerate(inputs):
            positions, cell = self.positions(buffer.name), None
            if buffer.role == "scalar" and positions:
                cell = torch.empty((), dtype=self.prepared.layouts[buffer.name].dtype, device=self.tensors)
                self._point(buffer.name, cell.data_ptr())
                positions = ()
            out.append((i, self.prepared.slot[buffer.name], positions, cell))
        return out

    def _refresh(self, values: Sequence[int]) -> None:
        self.values[:] = values
        for i, expression in self._early:
            self.numbers[i] = expression(self.values)

    # -- one call ----------------------------------------------------------------------------------------------------
    def run(self, args: Sequence[Any], values: list[int]) -> tuple:
        """Run the steps on `args`; `values` are the symbols'."""
        if values != self.values:
            self._refresh(values)
        slots, words = self.slots, self.words
        for i, slot, positions, cell in self._inputs:
            slots[slot] = value = args[i]
            if positions:
                address = value.data_ptr()
                for at, offset in positions:
                    words[at] = address + offset
            elif cell is not None:
                cell.fill_(value)
        for step in self.steps:
            step()
        outputs = tuple([build(slots, self.values) for build in self.prepared.outputs])
        slots[:] = self.template
        return outputs

    # -- steps as closures -------------------------------------------------------------------------------------------
    def _closures(self, stream: int) -> list[Callable[[], object]]:
        words, numbers = self.words.buffer_info()[0], self.numbers.buffer_info()[0]
        out: list[Callable[[], object]] = []
        steps = [self._at_these_sizes(step) for step in self.prepared.steps]
        for launches, group in itertools.groupby(steps, lambda step: isinstance(step, Launch)):
            if launches and self.prepared.library is not None:
                calls = [(s.kernel, words + s.pointers, numbers + s.symbols) for s in group if isinstance(s, Launch)]
                out += self.prepared.library.launch(calls, stream)
            else:
                out += [self._compile(s) for s in group if not isinstance(s, Launch)]
        return out

    def _at_these_sizes(self, step: Step) -> Step:
        """The platform's call for a product of more rows than its kernel takes; the rows are sizes of a buffer of ours, so this frame's."""
        if isinstance(step, Launch) and step.above is not None and evaluate(step.above[0], self.values) > step.above[1]:
            return step.above[2]
        return step

    def _compile(self, step: Call | Allocate | Release) -> Callable[[], object]:
        if isinstance(step, Allocate):
            return self._allocate(step.name)
        if isinstance(step, Release):
            return self._release(step.slots)
        return self._call(step)

    def _release(self, dead: tuple[int, ...]) -> Callable[[], None]:
        slots = self.slots

        def run() -> None:
            for slot in dead:
                slots[slot] = None

        return run

    def _allocate(self, name: str) -> Callable[[], None]:
        layout, put = self.prepared.layouts[name], self._put(name)
        fixed, dtype = None if layout.late else layout.at(self.values), layout.dtype
        make = empty_strided_cpu if self.tensors.type == "cpu" else functools.partial(_empty_strided, self.tensors)

        def run() -> None:
            sizes, strides = fixed or layout.at(self.values)
            put(make(sizes, strides, dtype))

        return run

    def _number(self, name: str) -> Callable[[Any], None]:
        """A number that an extern returns: into the slot, and into a cell for the kernels that read it."""
        slots, slot = self.slots, self.prepared.slot[name]
        cell = torch.empty((), dtype=self.prepared.layouts[name].dtype, device=self.tensors)
        self._point(name, cell.data_ptr())

        def put(value: Any) -> None:
            slots[slot] = value
            cell.fill_(value)

        return put

    def _put(self, name: str) -> Callable[[Any], None]:
        """Into the slot, and the address where kernels look for it."""
        slots, words, slot = self.slots, self.words, self.prepared.slot[name]
        moving = self.prepared.words.get(name, ())
        if any(not isinstance(offset, int) for _, offset in moving):
            return lambda value: self._put_moving(slot, moving, value)
        positions = self.positions(name)

        def put(value: Any) -> None:
            slots[slot] = value
            if positions:
                address = value.data_ptr()
                for at, offset in positions:
                    words[at] = address + offset

        return put

    def _put_moving(self, slot: int, moving: Sequence[tuple[int, Expression]], value: Any) -> None:
        self.slots[slot] = value
        address = value.data_ptr()
        for at, offset in moving:
            self.words[at] = address + evaluate(offset, self.values)

    def _call(self, step: Call) -> Callable[[], None]:
        slots, values, prepared = self.slots, self.values, self.prepared
        views = [(prepared.slot[n], prepared.view(n)) for n in step.views if n not in self._views]
        before = [*views, *step.computed]
        function, keywords = self._with_keywords(step)
        take = _taker(step.arguments)
        if step.into is not None:
            return self._direct_call(step, step.into, before, function)
        receive = self._receiver(step)
        resolve = self._resolver(step)
        if not before and not keywords and resolve is None and (plain := self._plain_output(step)) is not None:
            return self._plain_call(function, take, plain, receive)

        def run() -> None:
            for slot, build in before:
                slots[slot] = build(slots, values)
            result = function(*take(slots), **{k: slots[s] for k, s in keywords}) if keywords else function(*take(slots))
            receive(result)
            if resolve is not None:
                resolve()

        return run

    def _direct_call(self, step: Call, into: str, before: list[tuple[int, Build]], function: Callable[..., Any]) -> Callable[[], None]:
        """The operator writes the tensor that its result's slot holds already; BindError where the sizes would not be the declared ones."""
        slots, values, layouts = self.slots, self.values, self.prepared.layouts
        names = [a["buffer"] for a in step.step.args if isinstance(a, dict) and "buffer" in a]
        given, declared = [layouts[n].at(values)[0] for n in names], layouts[into].at(values)[0]
        if (found := result_sizes(step.step.callee, given)) != declared:
            raise BindError(f"{step.step.callee} returns {found}", where=step.step.name, why=f"{declared} was declared")
        arguments, out = step.arguments, self.prepared.slot[into]
        if step.step.callee == "aten.linear.default":  # as one matrix: it never expands the weight by the batch
            rows = math.prod(declared[:-1])
            arguments = (self._reshaped(names[0], arguments[0], (rows, given[0][-1]), before), *arguments[1:])
            out = self._reshaped(into, out, (rows, declared[-1]), before)
        take = _taker(arguments)

        def run() -> None:
            for slot, build in before:
                slots[slot] = build(slots, values)
            function(*take(slots), out=slots[out])

        return run

    def _reshaped(self, name: str, slot: int, sizes: tuple[int, ...], before: list[tuple[int, Build]]) -> int:
        """A slot of this frame with the buffer in other sizes: made once where its tensor stays, else before each call."""
        new = len(self.slots)
        stays = name in self.persistent or name in self._views
        tensor = self.slots[slot].reshape(sizes) if stays else None
        if tensor is None or tensor.data_ptr() != self.slots[slot].data_ptr():
            tensor = None
            before.append((new, lambda slots, values: slots[slot].reshape(sizes)))
        self.slots.append(tensor)
        return new

    def _plain_output(self, step: Call) -> str | None:
        """The one result whose sizes are known and which needs nothing but a look, if the call is of that common kind."""
        name = step.step.outputs[0] if len(step.step.outputs) == 1 else None
        if name is None or step.copied or self.prepared.layouts[name].late or self.prepared.layouts[name].role == "scalar":
            return None
        returned = self.prepared.homes.lifetimes[name].last == len(self.prepared.program.steps)
        moving = any(not isinstance(offset, int) for _, offset in self.prepared.words.get(name, ()))
        return None if returned or moving else name

    def _plain_call(
        self, function: Callable[..., Any], take: Callable[[list[Any]], tuple], name: str, receive: Callable[[Any], None]
    ) -> Callable[[], None]:
        """The common call in one closure, which is half the time: what does not look as declared goes to `receive`."""
        slots, words, slot, positions = self.slots, self.words, self.prepared.slot[name], self.positions(name)
        layout, tensor = self.prepared.layouts[name], torch.Tensor
        (sizes, strides), dtype = layout.at(self.values), layout.dtype

        def run() -> None:
            result = function(*take(slots))
            if result.__class__ is tensor and result.shape == sizes and result.stride() == strides and result.dtype is dtype:
                slots[slot] = result
                if positions:
                    address = result.data_ptr()
                    for at, offset in positions:
                        words[at] = address + offset
            else:
                receive(result)

        return run

    def _with_keywords(self, step: Call) -> tuple[Callable[..., Any], tuple[tuple[str, int], ...]]:
        """Keywords that never change are bound once."""
        fixed = {k: self.slots[s] for k, s in step.keywords if s in self.prepared.fixed}
        rest = tuple((k, s) for k, s in step.keywords if s not in self.prepared.fixed)
        return (functools.partial(step.operator, **fixed) if fixed else step.operator), rest

    def _receiver(self, step: Call) -> Callable[[Any], None]:
        """What to do with an operator's result: check it against the declaration and put it where it belongs."""
        settlers = [None if o is None else self._settler(step, o) for o in step.step.outputs]
        if not any(settlers):
            return lambda result: None
        if len(settlers) == 1 and settlers[0] is not None:
            single = settlers[0]
            return lambda result: single(result[0] if isinstance(result, (list, tuple)) else result)

        def receive(result: Any) -> None:
            if not isinstance(result, (list, tuple)) or len(result) < len(settlers):
                raise BindError(f"{step.step.callee} returned something else than {len(settlers)} results", where=step.step.name)
            for settle, value in zip(settlers, result):
                if settle is not None:
                    settle(value)

        return receive

    def _settler(self, step: Call, name: str) -> Callable[[Any], None]:
        layout = self.prepared.layouts[name]
        if layout.role == "scalar":
            return self._number(name)
        put = self._put(name)
        fixed = None if layout.late or any(s.buffer == name for _, _, s in step.resolves) else layout.at(self.values)
        returned = self.prepared.homes.lifetimes[name].last == len(self.prepared.program.steps)
        dtype, copied = layout.dtype, step.copied
        low, high = self.arena_start, self.arena_start + self.arena_bytes

        def settle(value: Any) -> None:
            sizes, strides = fixed or self._late_layout(step, layout, value)
            if value.shape != sizes or value.stride() != strides or value.dtype is not dtype or copied:
                value = self._fit(step, layout, value, sizes, strides)
            if returned and low <= value.data_ptr() < high:  # the caller may not see the arena
                value = value.clone()
            put(value)

        return settle

    def _late_layout(self, step: Call, layout: Layout, value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for i, _, symbol in step.resolves:
            if symbol.buffer == layout.name:
                self.values[i] = read_symbol(symbol, value)
        return layout.at(self.values)

    def _fit(self, step: Call, layout: Layout, value: Any, sizes: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        """A result in the declared layout; BindError when its type or sizes are others."""
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != sizes or value.dtype is not layout.dtype:
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise BindError(f"{step.step.callee} returned {found}", where=step.step.name, why=f"{layout.dtype} {sizes} was declared")
        if not step.copied:
            if same_strides(sizes, value.stride(), strides):
                return value
            self.prepared.restrided[step.step.name] = self.prepared.restrided.get(step.step.name, 0) + 1
        return torch.empty_strided(sizes, strides, dtype=layout.dtype, device=self.tensors).copy_(value)

    def _resolver(self, step: Call) -> Callable[[], None] | None:
        if not step.resolves:
            return None
        slots, values, numbers = self.slots, self.values, self.numbers

        def resolve() -> None:
            for i, slot, symbol in step.resolves:
                values[i] = value = read_symbol(symbol, slots[slot])
                check_symbol(symbol, value)
            for at, expression in self._late:
                numbers[at] = evaluate(expression, values)

        return resolve


def _empty_strided(device: torch.device, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device)


def _extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last touched."""
    return 0 if 0 in sizes else 1 + sum((n - 1) * s for n, s in zip(sizes, strides))


def _taker(places: tuple[int, ...]) -> Callable[[list[Any]], tuple]:
    if len(places) > 1:
        return operator.itemgetter(*places)
    if len(places) == 1:
        place = places[0]
        return lambda slots: (slots[place],)
    return lambda slots: ()
