"""Equal decoder layers of a traced graph, found by comparing the graph with itself shifted by one layer; all but a few are taken out.

Invariant: a layer is taken out only when its calls, their arguments and where these come from equal the layer's before it.  Works on
Dynamo's graph, before `capture/recorded.py` normalises what is left: every later stage sees the same few layers at any depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flagtree.runtime.capture_key import example_value

KEPT_INNER = 2  # inner layers that stay: passes/repeat.py compares them, and repeats the first of them
FEWEST = KEPT_INNER + 3  # layers of which some can go: the first and the last stand beside what is no layer
CANDIDATES = 12  # distances that are tried as the length of a layer


@dataclass(frozen=True, slots=True)
class Periods:
    """`module`: the graph with its first layer, two inner ones and the last.  `layers`: the names of what each inner layer takes, in
    corresponding order, at full depth.  `arguments`: the names of everything that the whole graph takes, in order."""

    module: fx.GraphModule
    layers: tuple[tuple[str, ...], ...]
    arguments: tuple[str, ...]


def find_periods(module: fx.GraphModule, names: Sequence[str]) -> Periods | None:
    """`names`: of the placeholders, in order.  None for a graph without enough equal layers.  `module` is left as it is."""
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    found = _Comparison(module).longest()
    if found is None:
        return None
    layers = found.inner_arguments()
    short = found.shortened(module, layers) if layers is not None else None
    if layers is None or short is None:
        return None
    name_of = dict(zip(given, names, strict=True))
    return Periods(short, tuple(tuple(name_of[n] for n in layer) for layer in layers), tuple(names))


class _Comparison:
    """The calls of a graph in order, each with a text that says all but where its arguments come from, and these apart."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.calls = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
        self.index = {n: i for i, n in enumerate(self.calls)}
        self.reads: list[list[fx.Node]] = []
        self.texts: list[str] = []
        for node in self.calls:
            self.reads.append([])
            form = fx.node.map_aggregate((node.args, node.kwargs), self._token)
            self.texts.append(f"{node.op} {node.target} {form!r} {_described(node.meta.get('example_value'))}")

    def _token(self, value: Any) -> Any:
        """An argument as its call's text has it; an operand is noted among what the last call reads."""
        if not isinstance(value, fx.Node):
            return value
        self.reads[-1].append(value)
        return f"@{_described(example_value(value))}" if value.op == "placeholder" else "%"

    def equal(self, i: int, period: int) -> bool:
        """Does the call one period later compute the same from corresponding arguments?"""
        if self.texts[i] != self.texts[i + period]:
            return False
        return all(self.relation(x, y, period) for x, y in zip(self.reads[i], self.reads[i + period]))

    def relation(self, x: fx.Node, y: fx.Node, period: int) -> str:
        """How two corresponding operands relate, empty for not at all."""
        if x is y:
            return "shared"
        if x.op == "placeholder" or y.op == "placeholder":
            return "own" if x.op == y.op else ""
        return "shifted" if self.index[y] - self.index[x] == period else ""

    def longest(self) -> _Run | None:
        """The run of equal periods that covers most of the graph; the shorter period of two that cover the same."""
        last: dict[str, int] = {}
        gaps: Counter[int] = Counter()
        for i, text in enumerate(self.texts):
            if text in last:
                gaps[i - last[text]] += 1
            last[text] = i
        runs = [run for period, _ in gaps.most_common(CANDIDATES) if (run := self._run(period)) is not None]
        return max(runs, key=lambda run: (run.period * run.count, -run.period), default=None)

    def _run(self, period: int) -> _Run | None:
        """The longest stretch of calls that equal those one period later, from the first call that takes a tensor of its layer's own."""
        best, begin = (0, 0), None
        for i in range(len(self.calls) - period + 1):
            if i < len(self.calls) - period and self.equal(i, period):
                begin = i if begin is None else begin
            elif begin is not None:
                best = max(best, (i - begin, begin))
                begin = None
        length, first = best
        starts = (i for i in range(first, first + length) if self._takes_own_tensor(i, period))
        start = next(starts, None)
        if start is None:
            return None
        count = (first + length + period - start) // period
        return _Run(self, start, period, count) if count >= FEWEST else None

    def _takes_own_tensor(self, i: int, period: int) -> bool:
        pairs = zip(self.reads[i], self.reads[i + period])
        return any(self.relation(x, y, period) == "own" and isinstance(example_value(x), torch.Tensor) for x, y in pairs)


@dataclass(frozen=True)
class _Run:
    """`count` equal periods of `period` calls from call `start`; the first and the last of them stay as they are."""

    graph: _Comparison
    start: int
    period: int
    count: int

    def begin(self, layer: int) -> int:
        """The first call of a layer."""
        return self.start + layer * self.period

    def inner_arguments(self) -> list[list[fx.Node]] | None:
        """What each inner layer takes that no other call does, in corresponding order; None when layers are not built alike."""
        layers: list[list[fx.Node]] = [[] for _ in range(1, self.count - 1)]
        wanted: list[int] | None = None
        for number, own in enumerate(layers, 1):
            places: dict[fx.Node, int] = {}
            pattern = []
            for x, relation in self._operands(number):
                if relation == "own":
                    pattern.append(places.setdefault(x, len(places)))
                elif not self._reachable(x, number, relation):
                    return None
                else:
                    pattern.append(-1 if relation == "shared" else -2)
            if (wanted is not None and pattern != wanted) or not self._private(places, number):
                return None
            wanted = pattern
            own += places
        return layers

    def _operands(self, layer: int) -> Iterator[tuple[fx.Node, str]]:
        """Each operand of a layer, and how it relates to that of the next one."""
        for i in range(self.begin(layer), self.begin(layer + 1)):
            for x, y in zip(self.graph.reads[i], self.graph.reads[i + self.period]):
                yield x, self.graph.relation(x, y, self.period)

    def _reachable(self, x: fx.Node, layer: int, relation: str) -> bool:
        """A layer reads what stands before all inner layers, its own results and those of the layer before it."""
        if x.op == "placeholder":
            return True
        i = self.graph.index[x]
        return i < self.begin(1) if relation == "shared" else i >= self.begin(layer - 1)

    def _private(self, arguments: dict[fx.Node, int], layer: int) -> bool:
        inside = range(self.begin(layer), self.begin(layer + 1))
        return all(user in self.graph.index and self.graph.index[user] in inside for x in arguments for user in x.users)

    def shortened(self, module: fx.GraphModule, layers: Sequence[Sequence[fx.Node]]) -> fx.GraphModule | None:
        """A copy without the inner layers behind the first two.  What follows reads the second where it read the last of them; None
        when it reads any other."""
        gone = {x for layer in layers[KEPT_INNER:] for x in layer}
        out = range(self.begin(KEPT_INNER + 1), self.begin(self.count - 1))
        graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in module.graph.nodes:
            i = self.graph.index.get(node, -1)
            if node in gone or i in out:
                continue
            if i >= out.stop or node.op == "output":
                if not all(self._seen_from_the_end(x) for x in node.all_input_nodes):
                    return None
            copied[node] = graph.node_copy(node, lambda x: copied[self._moved(x, out)])
        return fx.GraphModule(module, graph)

    def _seen_from_the_end(self, x: fx.Node) -> bool:
        i = self.graph.index.get(x, -1)
        return i < self.begin(1) or i >= self.begin(self.count - 2)

    def _moved(self, x: fx.Node, out: range) -> fx.Node:
        i = self.graph.index.get(x, -1)
        return self.graph.calls[i - len(out)] if i in out else x


def _described(value: Any) -> str:
    """What is known of a value, as text."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}{value.device}"
    if isinstance(value, (tuple, list)):
        return f"({','.join(map(_described, value))})"
    return str(value) if isinstance(value, (int, float, torch.SymInt)) else type(value).__name__
