"""Splits a graph around the calls that no program carries: complex numbers, rare element types, control flow.

The calls stay as they are, in their place; each stretch of other calls between them becomes a part that is compiled on its own.
Order never changes, so in-place writes keep their meaning.  Used by `compile.py` before the capture key, on hits too: torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from flagtree.runtime.capture_key import example_value
from flagtree.runtime.dtypes import DTYPES

_CARRIED = frozenset(DTYPES.values())


def uncarried(node: fx.Node) -> str | None:
    """Why a program cannot hold this call, None where it can."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"control flow, {node.target.name()}"
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())) and node.target in ("view", torch.ops.aten.view.dtype):
        return "memory seen as another element type"
    for value in (_known(n) for n in (node, *node.all_input_nodes)):
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.dtype not in _CARRIED:
                return f"element type {tensor.dtype}"
            if tensor.layout is not torch.strided:
                return f"layout {tensor.layout}"
    return None


def _known(node: fx.Node) -> Any:
    return example_value(node) if {"example_value", "val"} & node.meta.keys() else None


def split(module: fx.GraphModule, compile_part: Callable[[fx.GraphModule], Callable[..., Any]]) -> Callable[..., Any] | None:
    """The graph with each stretch of calls that a program carries compiled; None where every call is carried."""
    calls = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    if all(uncarried(n) is None for n in calls):
        return None
    whole = fx.GraphModule(module, fx.Graph())
    env: dict[fx.Node, fx.Node] = {}
    for stretch in _stretches(list(module.graph.nodes)):
        if uncarried(stretch[0]) is not None or stretch[0].op in ("placeholder", "get_attr", "output"):
            for node in stretch:
                env[node] = whole.graph.node_copy(node, env.__getitem__)
        else:
            _replace(module, stretch, whole, env, compile_part)
    whole.recompile()
    return whole.forward


def _stretches(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Neighbours of one kind: all carried calls, or none."""
    out: list[list[fx.Node]] = []
    kind: bool | None = None
    for node in nodes:
        carried = node.op not in ("placeholder", "get_attr", "output") and uncarried(node) is None
        if carried is not kind:
            out.append([])
            kind = carried
        out[-1].append(node)
    return out


def _replace(
    module: fx.GraphModule,
    stretch: list[fx.Node],
    whole: fx.GraphModule,
    env: dict[fx.Node, fx.Node],
    compile_part: Callable[[fx.GraphModule], Callable[..., Any]],
) -> None:
    """One call of the compiled stretch in `whole`; its results stand in `env` for the nodes that later ones use."""
    inside = set(stretch)
    used = dict.fromkeys(a for n in stretch for a in n.all_input_nodes if a not in inside)
    sizes = [n for n in module.graph.nodes if n.op == "placeholder" and isinstance(_known(n), torch.SymInt)]
    inputs = [*dict.fromkeys([*sizes, *(n for n in used if n.op != "get_attr")])]
    results = [n for n in stretch if any(u not in inside for u in n.users)]
    graph = fx.Graph()
    part: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        part[node] = graph.placeholder(node.name)
        part[node].meta = dict(node.meta)
    for node in (*(n for n in used if n.op == "get_attr"), *stretch):
        part[node] = graph.node_copy(node, part.__getitem__)
    graph.output(tuple(part[n] for n in results))
    name = f"flagtree_part_{len(env)}"
    whole.add_submodule(name, _Part(compile_part(fx.GraphModule(module, graph))))
    call = whole.graph.call_module(name, tuple(env[n] for n in inputs))
    for position, node in enumerate(results):
        env[node] = whole.graph.call_function(_item, (call, position))


def _item(results: Sequence[Any], position: int) -> Any:
    return results[position]


class _Part(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)
