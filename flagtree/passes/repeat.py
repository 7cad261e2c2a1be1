"""Folding equal layers into one Repeat and giving it the model's full depth.

A model is captured a few layers deep.  After fusion the layers 1, 2, … are equal periods of steps (rotated: the next layer's norm
stands with the last residual); the pass proves that step by step, keeps the body once and binds every layer's weights, caches
and intermediates by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flagtree.errors import IRError
from flagtree.ir.canonical import digest, isolate, isolate_template
from flagtree.ir.program import Alias, Buffer, Extern, Kernel, Operand, Program, Ref, Repeat, Step, Template
from flagtree.passes.reinplace import renamed


@dataclass(frozen=True, slots=True)
class Layers:
    """How names vary with depth: `layer_of(name)` is a layer's number or None, `at_layer(name, i)` the same name in layer i."""

    captured: int
    depth: int
    layer_of: Callable[[str], int | None]
    at_layer: Callable[[str, int], str]


def named_layers(layers: Sequence[Sequence[str]]) -> Layers:
    """Layers whose buffers have any names: `layers[k]` names those of layer k + 1 in corresponding order, and two of them and the first
    layer, which is in no list, are captured."""
    place = {name: (number, slot) for number, names in enumerate(layers, 1) for slot, name in enumerate(names)}

    def layer_of(name: str) -> int | None:
        return place[name][0] if name in place else None

    def at_layer(name: str, layer: int) -> str:
        return layers[layer - 1][place[name][1]] if name in place else name

    return Layers(3, len(layers) + 1, layer_of, at_layer)


def unrolled(program: Program) -> Program:
    """Every repeat as its steps, one iteration after the other; fold_layers bound all that differs from one to the next."""
    steps: list[Step] = []
    for step in program.steps:
        if not isinstance(step, Repeat):
            steps.append(step)
            continue
        for i in range(step.count):
            actual = {formal: names[i] for formal, names in step.bindings}
            steps += [replace(renamed(inner, actual), name=f"{inner.name}.{i}") for inner in step.body]
    formals = {f for s in program.steps if isinstance(s, Repeat) for f, _ in s.bindings}
    return program.with_(steps=tuple(steps), buffers=tuple(b for b in program.buffers if b.name not in formals))


def fold_layers(program: Program, layers: Layers, name: str = "layer") -> Program:
    """The program at full depth with its inner layers as one Repeat.

    Raises IRError when two captured inner layers differ: then the captured depth does not stand for the whole.
    A model captured at its full depth of one or two layers is returned as it is.
    """
    if layers.captured < 3:
        if layers.captured != layers.depth:
            raise IRError("at least three captured layers are needed to repeat one", where=program.name)
        return program
    starts = [_first_step(program, layers, k) for k in range(1, layers.captured)]
    period = starts[1] - starts[0]
    _Pairing(program, layers).check_all(starts, period)
    return _Folder(program, layers, starts, period).fold(name)


def _first_step(program: Program, layers: Layers, layer: int) -> int:
    """Where a layer's period starts: the first step that reads one of its weights."""
    for k, step in enumerate(program.steps):
        if any(layers.layer_of(n) == layer and program.buffer(n).role == "weight" for n in step.reads):
            return k
    raise IRError(f"no step reads a weight of layer {layer}", where=program.name)


class _Pairing:
    """Proves that two periods are equal and pairs their buffers."""

    def __init__(self, program: Program, layers: Layers) -> None:
        self.program, self.layers = program, layers

    def check_all(self, starts: list[int], period: int) -> None:
        if any(b - a != period for a, b in itertools.pairwise(starts)) or starts[-1] + period > len(self.program.steps):
            raise IRError("the captured layers have different numbers of steps", where=self.program.name)
        for k in range(1, len(starts)):
            self.pair(starts[0], starts[k], period, k + 1)

    def pair(self, first: int, other: int, period: int, layer: int) -> dict[str, str]:
        """Buffer of the period at `first` (layer 1) to the one at `other`; a difference is an IRError that names the step."""
        pairs: dict[str, str] = {}
        for a, b in zip(self.program.steps[first : first + period], self.program.steps[other : other + period], strict=True):
            for x, y in _operands(self.program, a, b):
                self._join(pairs, x, y, a, layer)
        return pairs

    def _join(self, pairs: dict[str, str], x: str, y: str, step: Step, layer: int) -> None:
        known = pairs.setdefault(x, y)
        outer = self.program.buffer(self.program.root(x)).role != "temp"
        expected = self.layers.at_layer(x, layer) if outer and self.layers.layer_of(x) == 1 else x
        if known != y or (outer and self.program.buffer(x).alias_of is None and y != expected):
            raise IRError(f"layer {layer} differs from layer 1", where=f"step '{step.name}'", why=f"'{x}' corresponds to '{y}'")


def _operands(program: Program, a: Step, b: Step) -> Iterator[tuple[str, str]]:
    """Corresponding buffers of two steps that compute the same; IRError when they do not."""
    if isinstance(a, Kernel) and isinstance(b, Kernel):
        one, two = isolate(program, a), isolate(program, b)
        if digest(one.program) == digest(two.program) and one.symbols == two.symbols:
            yield from zip(one.buffers, two.buffers, strict=True)
            return
    if isinstance(a, Template) and isinstance(b, Template) and (a.kind, a.attrs, a.numerics) == (b.kind, b.attrs, b.numerics):
        one, two = isolate_template(program, a), isolate_template(program, b)
        if one.program == two.program and one.symbols == two.symbols:
            yield from zip(one.buffers, two.buffers, strict=True)
            return
    if isinstance(a, Extern) and isinstance(b, Extern) and a.callee == b.callee and len(a.outputs) == len(b.outputs):
        left, right = (*a.args, *(v for _, v in a.kwargs)), (*b.args, *(v for _, v in b.kwargs))
        found = list(_pairs(left, right))
        if all(x == y or isinstance(x, Ref) for x, y in found) and [k for k, _ in a.kwargs] == [k for k, _ in b.kwargs]:
            yield from ((x.buffer, y.buffer) for x, y in found if isinstance(x, Ref) and isinstance(y, Ref))
            yield from ((x, y) for x, y in zip(a.outputs, b.outputs, strict=True) if x is not None and y is not None)
            return
    raise IRError("two captured layers differ", where=f"steps '{a.name}' and '{b.name}'")


def _pairs(a: tuple[Operand, ...], b: tuple[Operand, ...]) -> Iterator[tuple[Operand, Operand]]:
    for x, y in zip(a, b, strict=True):
        if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
            yield from _pairs(x, y)
        else:
            yield x, y


class _Folder:
    """Names of every buffer in every layer, from the pairing of the first two periods."""

    def __init__(self, program: Program, layers: Layers, starts: list[int], period: int) -> None:
        self.program, self.layers, self.starts, self.period = program, layers, starts, period
        self.body = program.steps[starts[0] : starts[0] + period]
        self.pairs = _Pairing(program, layers).pair(starts[0], starts[1], period, 2)
        self.made = {n for s in self.body for n in s.writes if program.buffer(program.root(n)).role == "temp"}
        self.made |= {b.name for b in program.buffers if b.alias_of is not None and program.root(b.name) in self.made}
        self.names: dict[tuple[str, int], str] = {}

    def actual(self, name: str, layer: int) -> str:
        """What `name`, as layer 1 says it, is called in `layer`."""
        key = (name, layer)
        if key not in self.names:
            self.names[key] = self._actual(name, layer)
        return self.names[key]

    def _actual(self, name: str, layer: int) -> str:
        if layer == 1:
            return name
        other = self.pairs.get(name, name)
        if other == name:
            return name
        if name in self.made:
            return f"{name}.{layer}"
        if self.program.buffer(self.program.root(name)).role == "temp":
            return self.actual(other, layer - 1)  # handed from layer to layer: layer 2 reads what layer 1 made
        if self.program.buffer(name).alias_of is not None:
            return f"{name}.{layer}"
        return self.layers.at_layer(name, layer)

    def fold(self, name: str) -> Program:
        depth, first = self.layers.depth, self.starts[0]
        count = depth - 1
        formals = [n for n in dict.fromkeys(n for s in self.body for n in (*s.reads, *s.writes)) if self.pairs.get(n, n) != n]
        formals = self._with_bases(formals)
        bindings = tuple((formal(n), tuple(self.actual(n, layer) for layer in range(1, depth))) for n in formals)
        each = {n: formal(n) for n in formals}
        repeat = Repeat(name, count, tuple(renamed(s, each) for s in self.body), bindings)
        last = {other: self.actual(n, depth - 1) for n, other in self._last_period().items()}
        end = self.starts[-1] + self.period
        tail = tuple(renamed(s, last) for s in self.program.steps[end:])
        outputs = tuple(last.get(n, n) for n in self.program.outputs)
        steps = (*self.program.steps[:first], repeat, *tail)
        return self.program.with_(steps=steps, buffers=self._buffers(formals, steps, outputs), outputs=outputs)

    def _last_period(self) -> dict[str, str]:
        """Layer 1's name of each buffer to the last captured layer's."""
        return _Pairing(self.program, self.layers).pair(self.starts[0], self.starts[-1], self.period, self.layers.captured - 1)

    def _buffers(self, formals: list[str], steps: tuple[Step, ...], outputs: tuple[str, ...]) -> tuple[Buffer, ...]:
        """Declarations in the order in which a caller sees them: layers ascending inside each role."""
        declared = {b.name: b for b in self.program.buffers}
        for layer in range(2, self.layers.depth):
            for name in formals:
                declared.setdefault(self.actual(name, layer), self._declaration(name, lambda n, k=layer: self.actual(n, k)))  # type: ignore[misc]
        for name in formals:
            declared[formal(name)] = self._declaration(name, lambda n: formal(n) if n in formals else n)
        used = set(outputs) | {n for s in steps for n in (*s.reads, *s.writes)} | {formal(n) for n in formals}
        for name in tuple(used):
            while (alias := declared[name].alias_of) is not None:
                name = alias.base
                used.add(name)
        return tuple(b for b in declared.values() if b.name in used or (b.role not in ("temp", "weight", "state") and b.alias_of is None))

    def _with_bases(self, formals: list[str]) -> list[str]:
        out = dict.fromkeys(formals)
        for name in formals:
            while (alias := self.program.buffer(name).alias_of) is not None:
                name = alias.base
                out[name] = None
        return list(out)

    def _declaration(self, name: str, naming: Callable[[str], str]) -> Buffer:
        buffer = self.program.buffer(name)
        alias = buffer.alias_of
        return replace(buffer, name=naming(name), alias_of=alias and Alias(naming(alias.base), alias.offset))


def formal(name: str) -> str:
    """What the body calls a buffer that is another one in each layer."""
    return f"{name}.each"
