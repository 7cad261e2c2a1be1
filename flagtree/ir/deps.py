"""Dependences between the steps of a program, derived from what they read, write and order: never stored, never closed.

Nodes are step positions; memory conflicts are on root buffers, so aliases of one root conflict.  An edge goes to the last
writer and from the readers since, which implies the rest: building is near linear in the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import networkx as nx

from flagtree.errors import IRError
from flagtree.ir.program import Extern, Program, Repeat, Step, Store, Template


def dependences(program: Program) -> nx.DiGraph:
    """The graph of `program.steps`: an edge (a, b), a < b, with attribute `kinds`, a set of RAW, WAR, WAW and effect, when b must
    come after a.  What follows from a path over other steps may be left out."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(program.steps)))
    roots = {b.name: program.root(b.name) for b in program.buffers}
    writer: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    effects: dict[str, int] = {}
    for k, step in enumerate(program.steps):
        reads, writes = ({roots[n] for n in names} for names in touched(step))
        for root in sorted(reads):
            if root in writer:
                _edge(graph, writer[root], k, "RAW")
        for root in sorted(writes):
            for reader in readers.get(root, ()):
                _edge(graph, reader, k, "WAR")
            if root in writer:
                _edge(graph, writer[root], k, "WAW")
            writer[root], readers[root] = k, []
        for root in reads - writes:
            readers.setdefault(root, []).append(k)
        for effect in sorted(step_effects(step)):
            if effect in effects:
                _edge(graph, effects[effect], k, "effect")
            effects[effect] = k
    return graph


def _edge(graph: nx.DiGraph, a: int, b: int, kind: str) -> None:
    if graph.has_edge(a, b):
        graph.edges[a, b]["kinds"].add(kind)
    else:
        graph.add_edge(a, b, kinds={kind})


def touched(step: Step) -> tuple[set[str], set[str]]:
    """(read, written) buffers of a step; what it adds or takes a maximum into it reads too."""
    reads, writes = set(step.reads), set(step.writes)
    if isinstance(step, Repeat):
        bound = dict(step.bindings)
        for inner in step.body:
            reads |= {a for n in touched(inner)[0] for a in bound.get(n, (n,))}
    elif not isinstance(step, Extern):
        body = step.epilogue if isinstance(step, Template) else step.body
        reads |= {op.access.buffer for op in body if isinstance(op, Store) and op.mode != "set"}
    return reads, writes


def step_effects(step: Step) -> set[str]:
    """The named effects of a step, those of a repeat's body included."""
    if isinstance(step, Repeat):
        return {e for inner in step.body for e in step_effects(inner)}
    return {step.effect} if isinstance(step, Extern) and step.effect else set()


def reachable_without(graph: nx.DiGraph, a: int, b: int) -> bool:
    """Is there a path from step a to step b other than the edge (a, b)?  Looks only at steps between the two."""
    return _other_path(graph, a, b, lambda n: n)


def _other_path(graph: nx.DiGraph, a: int, b: int, position: Callable[[int], int]) -> bool:
    return any(b in graph.successors(n) for n in _between(graph, a, position(b), position))


def _between(graph: nx.DiGraph, a: int, end: int, position: Callable[[int], int]) -> Iterator[int]:
    """Steps that a reaches and that stand before `end`."""
    seen: set[int] = set()
    waiting = [n for n in graph.successors(a) if position(n) < end]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += (n for n in graph.successors(node) if position(n) < end)


class Dependences:
    """The dependences of one program while a pass merges steps: one graph, kept right by `merge`.

    Nodes keep the position that their step had in the program; a merged step has the position of its consumer.
    """

    def __init__(self, program: Program) -> None:
        self.graph = dependences(program)
        self._order = list(range(len(program.steps)))
        self._place = list(range(len(program.steps)))

    @property
    def order(self) -> tuple[int, ...]:
        """The steps left, in a valid order."""
        return tuple(n for n in self._order if n in self.graph)

    def place(self, node: int) -> int:
        """Where a step stands: smaller comes first."""
        return self._place[node]

    def reachable_without(self, a: int, b: int) -> bool:
        """Is there a path from a to b other than the edge (a, b)?  Then merging the two would make a circle."""
        return _other_path(self.graph, a, b, self.place)

    def merge(self, a: int, b: int) -> None:
        """Contract a into b, a standing before b: b takes a's edges and their kinds, a is gone.  Steps between the two that
        depend on a move behind b.  Raises IRError where another path leads from a to b."""
        if self._place[a] >= self._place[b] or self.reachable_without(a, b):
            raise IRError(f"steps {a} and {b} cannot merge", why="another dependence runs between them, or b stands first")
        start, end = self._place[a], self._place[b]
        moved = set(_between(self.graph, a, end, self.place))
        window = [n for n in self._order[start : end + 1] if n != a]
        window = [n for n in window if n not in moved] + [n for n in self._order[start:end] if n in moved]
        # `a` keeps a place, first in the window, so that positions stay a permutation
        for offset, node in enumerate([a, *window]):
            self._order[start + offset], self._place[node] = node, start + offset
        for n, _, kinds in list(self.graph.in_edges(a, data="kinds")):
            self._join(n, b, kinds)
        for _, n, kinds in list(self.graph.out_edges(a, data="kinds")):
            if n != b:
                self._join(b, n, kinds)
        self.graph.remove_node(a)

    def _join(self, a: int, b: int, kinds: set[str]) -> None:
        for kind in kinds:
            _edge(self.graph, a, b, kind)
