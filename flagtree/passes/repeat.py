"""Folding equal layers into one Repeat and giving it the model's full depth.

A model is captured a few layers deep.  After fusion the layers 1, 2, … are equal periods of steps (rotated: the next layer's norm
stands with the last residual); the pass proves that step by step, keeps the body once and binds every layer's weights, caches
and intermediates by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flagtree.errors import IRError
from flagtree.ir.canonical import digest, isolate, isolate_template
from flagtree.ir.program import Alias, Buffer, Extern, Kernel, Operand, Program, Ref, Repeat, Step, Template
from flagtree.passes.reinplace import renamed


@dataclass(frozen=True, slots=True)
class Run:
    """`count` equal layers from layer `first` on, of which the first `captured` are in the program."""

    first: int
    count: int
    captured: int


@dataclass(frozen=True, slots=True)
class Layers:
    """The model's layers as runs of one kind each, in order; `layer_of(name)` is a layer's number or None, `at_layer(name, i)` the same
    name in layer i."""

    runs: tuple[Run, ...]
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

    return Layers((Run(0, len(layers) + 1, 3),), layer_of, at_layer)


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
    """The program at full depth with the inner layers of each run as one Repeat.

    Raises IRError when two captured inner layers of a run differ: then the captured depth does not stand for the whole.
    A run of one or two layers is written out.
    """
    folders = []
    for run in layers.runs:
        if run.captured >= 3:
            folders.append(_Folder(program, layers, run, name if len(layers.runs) == 1 else f"{name}{run.first}"))
        elif run.captured != run.count:
            raise IRError("at least three captured layers are needed to repeat one", where=program.name)
    if not folders:
        return program
    steps: list[Step] = []
    last: dict[str, str] = {}  # what the steps after a run call its results: their names in the run's last layer
    done = 0
    for folder in folders:
        steps += [renamed(s, last) for s in program.steps[done : folder.starts[0]]]
        steps.append(renamed(folder.repeat(), last))
        last |= {other: folder.actual(n, folder.end) for n, other in folder.last_period().items()}
        done = folder.starts[-1] + folder.period
    steps += [renamed(s, last) for s in program.steps[done:]]
    outputs = tuple(last.get(n, n) for n in program.outputs)
    return program.with_(steps=tuple(steps), buffers=_buffers(program, folders, tuple(steps), outputs, last), outputs=outputs)


def _buffers(
    program: Program, folders: list[_Folder], steps: tuple[Step, ...], outputs: tuple[str, ...], last: Mapping[str, str]
) -> tuple[Buffer, ...]:
    """Declarations in the order in which a caller sees them: layers of a run ascending inside each role.

    A view that only the steps after a run take of its result (`last`) is one of what the run's last layer makes.
    """
    declared = {b.name: b for b in program.buffers}
    for b in program.buffers:
        if b.alias_of is not None and b.alias_of.base in last and b.name not in last:
            declared[b.name] = replace(b, alias_of=replace(b.alias_of, base=last[b.alias_of.base]))
    for folder in folders:
        folder.declare(declared)
    used = set(outputs) | {n for s in steps for n in (*s.reads, *s.writes)} | {formal(n) for f in folders for n in f.formals}
    for name in tuple(used):
        while (alias := declared[name].alias_of) is not None:
            name = alias.base
            used.add(name)
    return tuple(b for b in declared.values() if b.name in used or (b.role not in ("temp", "weight", "state") and b.alias_of is None))


def _first_step(program: Program, layers: Layers, layer: int) -> int:
    """Where a layer's period starts: the first step that reads one of its weights."""
    for k, step in enumerate(program.steps):
        if any(layers.layer_of(n) == layer and program.buffer(n).role == "weight" for n in step.reads):
            return k
    raise IRError(f"no step reads a weight of layer {layer}", where=program.name)


class _Pairing:
    """Proves that two periods are equal and pairs their buffers."""

    def __init__(self, program: Program, layers: Layers, inner: int) -> None:
        self.program, self.layers, self.inner = program, layers, inner

    def check_all(self, starts: list[int], period: int) -> None:
        if any(b - a != period for a, b in itertools.pairwise(starts)) or starts[-1] + period > len(self.program.steps):
            raise IRError("the captured layers have different numbers of steps", where=self.program.name)
        for k in range(1, len(starts)):
            self.pair(starts[0], starts[k], period, self.inner + k)

    def pair(self, first: int, other: int, period: int, layer: int) -> dict[str, str]:
        """Buffer of the period at `first` (the first inner layer) to the one at `other`; a difference is an IRError that names the step."""
        pairs: dict[str, str] = {}
        for a, b in zip(self.program.steps[first : first + period], self.program.steps[other : other + period], strict=True):
            for x, y in _operands(self.program, a, b):
                self._join(pairs, x, y, a, layer)
        return pairs

    def _join(self, pairs: dict[str, str], x: str, y: str, step: Step, layer: int) -> None:
        known = pairs.setdefault(x, y)
        outer = self.program.buffer(self.program.root(x)).role != "temp"
        expected = self.layers.at_layer(x, layer) if outer and self.layers.layer_of(x) == self.inner else x
        if known != y or (outer and self.program.buffer(x).alias_of is None and y != expected):
            raise IRError(f"layer {layer} differs from layer {self.inner}", where=f"step '{step.name}'", why=f"'{x}' corresponds to '{y}'")


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
    """One run: names of every buffer in every layer, from the pairing of its first two inner periods."""

    def __init__(self, program: Program, layers: Layers, run: Run, name: str) -> None:
        self.program, self.layers, self.name = program, layers, name
        self.inner, self.end = run.first + 1, run.first + run.count - 1  # the first inner layer and the last
        self.captured_end = run.first + run.captured - 1
        self.starts = [_first_step(program, layers, k) for k in range(self.inner, self.captured_end + 1)]
        self.period = self.starts[1] - self.starts[0]
        self.pairing = _Pairing(program, layers, self.inner)
        self.pairing.check_all(self.starts, self.period)
        self.body = program.steps[self.starts[0] : self.starts[0] + self.period]
        self.pairs = self.pairing.pair(self.starts[0], self.starts[1], self.period, self.inner + 1)
        self.made = {n for s in self.body for n in s.writes if program.buffer(program.root(n)).role == "temp"}
        self.made |= {b.name for b in program.buffers if b.alias_of is not None and program.root(b.name) in self.made}
        formals = [n for n in dict.fromkeys(n for s in self.body for n in (*s.reads, *s.writes)) if self.pairs.get(n, n) != n]
        self.formals = self._with_bases(formals)
        self.names: dict[tuple[str, int], str] = {}

    def actual(self, name: str, layer: int) -> str:
        """What `name`, as the first inner layer says it, is called in `layer`."""
        key = (name, layer)
        if key not in self.names:
            self.names[key] = self._actual(name, layer)
        return self.names[key]

    def _actual(self, name: str, layer: int) -> str:
        if layer == self.inner:
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

    def repeat(self) -> Repeat:
        """The body once, with every buffer that differs from layer to layer bound by name."""
        numbers = range(self.inner, self.end + 1)
        bindings = tuple((formal(n), tuple(self.actual(n, layer) for layer in numbers)) for n in self.formals)
        each = {n: formal(n) for n in self.formals}
        return Repeat(self.name, len(numbers), tuple(renamed(s, each) for s in self.body), bindings)

    def last_period(self) -> dict[str, str]:
        """The first inner layer's name of each buffer to the last captured layer's."""
        return self.pairing.pair(self.starts[0], self.starts[-1], self.period, self.captured_end)

    def declare(self, declared: dict[str, Buffer]) -> None:
        """Add the buffers of the layers that were not captured, and the formals."""
        for layer in range(self.inner + 1, self.end + 1):
            for name in self.formals:
                declared.setdefault(self.actual(name, layer), self._declaration(name, lambda n, k=layer: self.actual(n, k)))  # type: ignore[misc]
        for name in self.formals:
            declared[formal(name)] = self._declaration(name, lambda n: formal(n) if n in self.formals else n)

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
