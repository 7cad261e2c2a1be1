"""Splits a graph around the calls that no program carries: complex numbers, rare element types, control flow, another device.

The calls stay as they are, in their place; each stretch of other calls between them becomes a part that is compiled on its own.
Order never changes, so in-place writes keep their meaning.  Used by `compile.py` before the capture key, on hits too: torch only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from flagtree.runtime.capture_key import example_value
from flagtree.runtime.dtypes import DTYPES

_CARRIED = frozenset(DTYPES.values())
_INLINED = frozenset({"tag_activation_checkpoint"})  # tracing runs their body


def home_of(module: fx.GraphModule) -> torch.device:
    """Where a graph's tensors live: the first device that is not the CPU, since numbers and tables may stay there; else the CPU."""
    for node in module.graph.nodes:
        value = _known(node)
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
                return tensor.device
    return torch.device("cpu")


def uncarried(node: fx.Node, home: torch.device) -> str | None:
    """Why a program on the device `home` cannot hold this call, None where it can."""
    if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() not in _INLINED:
        return f"control flow, {node.target.name()}"
    if "batch_norm_legit" in str(node.target) and _known(node.all_input_nodes[0]).dtype in (torch.bfloat16, torch.float16):
        if not isinstance(_operand(node, "momentum"), float):  # else it is generated, with the types that torch declares
            return "torch declares float32 statistics and returns half ones"
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and not isinstance(_known(node.args[0]), torch.Tensor):
        return uncarried(node.args[0], home)  # what a call returns in parts stays beside it
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
            if tensor.device != home:
                return f"a tensor on {tensor.device} in a graph on {home}"
    return None


def _operand(node: fx.Node, name: str) -> Any:
    """An operand of an ATen call by its name in the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position = next(k for k, a in enumerate(node.target._schema.arguments) if a.name == name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _known(node: fx.Node) -> Any:
    return example_value(node) if {"example_value", "val"} & node.meta.keys() else None


def split(module: fx.GraphModule, compile_part: Callable[[fx.GraphModule], Callable[..., Any]]) -> Callable[..., Any] | None:
    """The graph with each stretch of calls that a program carries compiled; None where every call is carried."""
    calls = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    home = home_of(module)
    if all(uncarried(n, home) is None for n in calls):
        return None
    whole = fx.Graph()
    called: dict[str, Any] = {str(n.target): _attribute(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}
    env: dict[fx.Node, fx.Node] = {}
    for stretch in _stretches(list(module.graph.nodes), home):
        if uncarried(stretch[0], home) is not None or stretch[0].op in ("placeholder", "get_attr", "output"):
            for node in stretch:
                env[node] = whole.node_copy(node, env.__getitem__)
        else:
            part, inputs, results = _part(module, stretch)
            name = f"flagtree_part_{len(called)}"
            called[name] = _Called(compile_part(part))
            call = whole.call_module(name, tuple(env[n] for n in inputs))
            env |= {node: whole.call_function(operator.getitem, (call, k)) for k, node in enumerate(results)}
    return fx.GraphModule(called, whole).forward


def _attribute(module: fx.GraphModule, path: str) -> Any:
    return operator.attrgetter(path)(module)


def _stretches(nodes: Sequence[fx.Node], home: torch.device) -> list[list[fx.Node]]:
    """Neighbours of one kind: all carried calls, or none."""
    out: list[list[fx.Node]] = []
    kind: bool | None = None
    for node in nodes:
        carried = node.op not in ("placeholder", "get_attr", "output") and uncarried(node, home) is None
        if carried is not kind:
            out.append([])
            kind = carried
        out[-1].append(node)
    return out


def _part(module: fx.GraphModule, stretch: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """(the stretch as a graph of its own, what it takes, what others use of it).  It takes every size too, as symbols need a source."""
    inside = set(stretch)
    used = dict.fromkeys(a for n in stretch for a in n.all_input_nodes if a not in inside)
    sizes = [n for n in module.graph.nodes if n.op == "placeholder" and isinstance(_known(n), torch.SymInt)]
    inputs = [*dict.fromkeys([*sizes, *(n for n in used if n.op != "get_attr")])]
    results = [n for n in stretch if any(u not in inside for u in n.users)]
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    for node in (*(n for n in used if n.op == "get_attr"), *stretch):
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[n] for n in results))
    return fx.GraphModule(module, graph), inputs, results


class _Called(torch.nn.Module):
    """A compiled part where an fx graph wants a module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)
