"""Dependences against brute force over all pairs, on random programs; merging against a path search on the contracted graph."""

from __future__ import annotations

import random

import networkx as nx
import pytest

from flagtree.errors import IRError
from flagtree.ir.deps import Dependences, dependences, reachable_without, step_effects, touched
from flagtree.ir.index import ZERO, Index
from flagtree.ir.program import Access, Alias, Axis, Buffer, Extern, Kernel, Load, Program, Ref, Repeat, Store
from flagtree.ir.text import parse_program
from tests.work import calls

I0 = Index.of("i")
SHAPE = (Index.of(4),)


def random_program(rng: random.Random, steps: int, buffers: int) -> Program:
    names = [f"b{i}" for i in range(buffers)]
    declared = [Buffer(n, "f32", SHAPE, "state") for n in names]
    declared += [Buffer(f"{n}.view", "f32", SHAPE, "state", None, Alias(n, ZERO)) for n in names[::2]]
    every = [b.name for b in declared]
    out: list = []
    for k in range(steps):
        reads, writes = rng.sample(every, rng.randint(0, 2)), rng.sample(every, rng.randint(0, 1))
        if rng.random() < 0.3:
            effect = rng.choice(["", "rng", "state:s"])
            out.append(Extern(f"e{k}", "f", tuple(Ref(n) for n in reads), tuple(writes), effect=effect))
        else:
            loads = tuple(Load(f"v{i}", "f32", Access(n, (I0,))) for i, n in enumerate(reads))
            mode = rng.choice(["set", "add"])
            stores = tuple(Store(Access(n, (I0,)), "v0", mode) for n in writes)
            kernel = Kernel(f"k{k}", (Axis("i", SHAPE[0]),), (*loads, *stores))
            out.append(kernel if rng.random() < 0.8 else Repeat(f"r{k}", 2, (kernel,), ((every[0], (every[1], every[2])),)))
    return Program("p", (), tuple(declared), tuple(out), ())


def conflicts(program: Program, a: int, b: int) -> set[str]:
    (r0, w0), (r1, w1) = (tuple({program.root(n) for n in names} for names in touched(program.steps[k])) for k in (a, b))
    kinds = {"RAW": w0 & r1, "WAR": r0 & w1, "WAW": w0 & w1, "effect": step_effects(program.steps[a]) & step_effects(program.steps[b])}
    return {kind for kind, found in kinds.items() if found}


@pytest.mark.parametrize("seed", range(30))
def test_paths_are_exactly_the_conflicts_closed(seed: int) -> None:
    rng = random.Random(seed)
    program = random_program(rng, rng.randint(1, 25), 4)
    graph = dependences(program)
    brute = nx.DiGraph()
    brute.add_nodes_from(range(len(program.steps)))
    brute.add_edges_from((a, b) for b in range(len(program.steps)) for a in range(b) if conflicts(program, a, b))
    assert nx.transitive_closure(graph).edges == nx.transitive_closure(brute).edges
    for a, b, kinds in graph.edges(data="kinds"):
        assert kinds
        assert kinds <= conflicts(program, a, b)
    for a, b in graph.edges:
        other = graph.copy()
        other.remove_edge(a, b)
        assert reachable_without(graph, a, b) == nx.has_path(other, a, b)


@pytest.mark.parametrize("seed", range(30))
def test_merging_keeps_one_right_graph(seed: int) -> None:
    rng = random.Random(seed)
    program = random_program(rng, 25, 5)
    live, brute = Dependences(program), dependences(program)
    for _ in range(40):
        edges = list(live.graph.edges)
        if not edges:
            break
        a, b = rng.choice(edges)
        other = brute.copy()
        other.remove_edge(a, b)
        circle = nx.has_path(other, a, b)
        assert live.reachable_without(a, b) == circle
        if circle:
            with pytest.raises(IRError):
                live.merge(a, b)
            continue
        live.merge(a, b)
        brute = nx.contracted_nodes(brute, b, a, self_loops=False)
        assert set(live.graph.edges) == set(brute.edges)
        place = {n: i for i, n in enumerate(live.order)}
        assert place.keys() == set(live.graph)
        assert all(place[x] < place[y] for x, y in live.graph.edges)
        assert all((live.place(x) < live.place(y)) == (place[x] < place[y]) for x in place for y in place)


def test_independent_steps_may_merge_and_edges_join_their_kinds() -> None:
    text = """program p
  buffer x: f32[4] input
  buffer a: f32[4] state
  buffer b: f32[4] state
  kernel k0 {i < 4} numerics(eager, contract=off, acc=f32)
    v: f32 = load x[i]
    store a[i] = v
  kernel k1 {i < 4} numerics(eager, contract=off, acc=f32)
    v: f32 = load x[i]
    store b[i] = v
  kernel k2 {i < 4} numerics(eager, contract=off, acc=f32)
    v: f32 = load a[i]
    w: f32 = load b[i]
    z: f32 = add v, w
    store a[i] = z
  outputs a
"""
    live = Dependences(parse_program(text))
    assert set(live.graph.edges) == {(0, 2), (1, 2)}
    assert live.graph.edges[0, 2]["kinds"] == {"RAW", "WAW"}
    live.merge(0, 1)
    assert set(live.graph.edges) == {(1, 2)}
    assert live.graph.edges[1, 2]["kinds"] == {"RAW", "WAW"}
    with pytest.raises(IRError):
        live.merge(2, 1)
    live.merge(1, 2)
    assert live.order == (2,)


def test_building_is_near_linear() -> None:
    work = []
    for steps in (500, 2000):
        program = random_program(random.Random(0), steps, steps)
        assert dependences(program).number_of_edges() < 4 * steps
        work.append(calls(lambda program=program: dependences(program)))  # type: ignore[misc]
    assert work[1] < 5 * work[0]
