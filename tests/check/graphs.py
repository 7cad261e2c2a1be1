"""Functions and small models traced, lowered and fused as the compiler does it, with the value of every call of the graph.

The values come from running the normalised graph call by call on real tensors: what `check.eager` must find again from the middle.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from flagtree.capture.normalise import Normalised, normalise
from flagtree.ir.program import Program
from flagtree.lower.decompositions import DECOMPOSITIONS
from flagtree.lower.lowering import Lowered, lower, lowers
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets import find_target


@dataclass(frozen=True)
class Traced:
    """`before`: the caller's tensors when the graph starts; `final`: every tensor of the graph by buffer name, when it has ended;
    `symbols`: values of the program's symbols."""

    graph: fx.Graph
    lowered: Lowered
    program: Program
    before: Mapping[str, torch.Tensor]
    final: Mapping[str, torch.Tensor]
    symbols: Mapping[str, int]


def trace(module: fx.GraphModule, names: list[str], fakes: list[Any], roles: Mapping[str, str], values: list[Any]) -> Traced:
    """Normalise, lower and fuse `module`, then run its normalised graph on `values`."""
    normal = normalise(module, names, fakes, lowers, DECOMPOSITIONS)
    lowered = lower(normal.graph, "traced", {**roles, **dict.fromkeys(normal.constants, "constant")})
    target = find_target("cpu")
    program, _ = run_pipeline(lowered.program, pipeline(target), target)
    given = {**dict(zip(names, values, strict=True)), **normal.constants}
    sizes = _sizes(normal, given)
    before = {n: v.clone() for n, v in given.items() if isinstance(v, torch.Tensor)}
    final = _run(normal.graph, given, sizes)
    symbols = {lowered.symbols[s.name]: v for s, v in sizes.items() if s.name in lowered.symbols}
    return Traced(normal.graph, lowered, program, before, final, symbols)


def trace_function(function: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False) -> Traced:
    """`trace` of what Dynamo hands to a backend for `function(*args)`."""
    found: list[Traced] = []

    def backend(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
        fakes = [n.meta["example_value"] for n in nodes]

        def call(*values: Any) -> Any:
            copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
            names = [n.name if isinstance(v, torch.Tensor) else f"size_{n.name}" for n, v in zip(nodes, fakes, strict=True)]
            found.append(trace(module, names, fakes, {}, copies))
            return module.forward(*values)

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    assert len(found) == 1
    return found[0]


def _sizes(normal: Normalised, given: Mapping[str, Any]) -> dict[sympy.Symbol, int]:
    sizes: dict[sympy.Symbol, int] = {}
    for node in normal.graph.nodes:
        if node.op == "placeholder":
            fake, real = node.meta["val"], given[str(node.target)]
            pairs = zip(fake.shape, real.shape, strict=True) if isinstance(real, torch.Tensor) else [(fake, real)]
            sizes |= {a.node.expr: int(b) for a, b in pairs if isinstance(a, torch.SymInt) and a.node.expr.is_Symbol}
    return sizes


def _run(graph: fx.Graph, given: Mapping[str, Any], sizes: Mapping[sympy.Symbol, int]) -> dict[str, torch.Tensor]:
    values: dict[fx.Node, Any] = {}

    def argument(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return values[x]
        return int(x.node.expr.xreplace({s: sympy.Integer(v) for s, v in sizes.items()})) if isinstance(x, torch.SymInt) else x

    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = given[str(node.target)]
            elif node.op == "call_function":
                args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), argument)
                values[node] = args[0][args[1]] if node.target is operator.getitem else node.target(*args, **kwargs)
    found = {str(n.target) if n.op == "placeholder" else n.name: v for n, v in values.items()}
    return {n: v for n, v in found.items() if isinstance(v, torch.Tensor)}
