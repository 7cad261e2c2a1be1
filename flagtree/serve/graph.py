"""The server's graph in the form that has a key: its platform's packed products are plain ones, what differs by rank is an argument.

Two ranks of one degree, two starts and two depths of one process give one text.  Works on Dynamo's graph with torch alone, before the
capture key; what was taken out is handed over as arguments (`Served.extra`) or put back into the launch list (serve/launch_list.py).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from flagtree.runtime.capture_key import CaptureKey, capture_key, example_value
from flagtree.runtime.dtypes import DTYPES

_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
_COLLECTIVES = ("allreduce", "all_reduce", "all_gather", "reduce_scatter")
_RANKS = ("rank", "tp_rank", "ep_rank")  # what any operator calls the argument by which it is told its rank
MARK = 0x66745F00  # no handle of any process is this number, and no rank
# integers beside these operators number rows of a table or vocabulary, and a rank has its own
_INDEXING = (operator.add, operator.sub, operator.mul, operator.ge, operator.gt, operator.le, operator.lt)


ONEDNN, TILED = "_C.onednn_mm", "_C.weight_packed_linear"  # products of packed weights: of a handle to them, of tiles of them


@dataclass(frozen=True, slots=True)
class Packed:
    """An argument that arrives in another form than the module with a key takes it.  `position`: among what that takes; `callee`: the
    product that takes this form; `dtype` (our name) and `shape`: as it arrives.  A bias has the callee of its weight."""

    position: int
    callee: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def form(self) -> tuple[str, str, tuple[int, ...]]:
        """All but which argument it is."""
        return self.callee, self.dtype, self.shape


@dataclass(frozen=True, slots=True)
class Served:
    """`module`: the graph with a key.  `takes`: which of the caller's arguments it takes, in order; `extra`: integers that follow
    them.  `packed`: what of them arrives packed where the module takes the weight.  `marks`: what stands in the module for a handle or
    the name of a group, to what it stands for."""

    module: fx.GraphModule
    takes: tuple[int, ...]
    extra: tuple[int, ...]
    packed: tuple[Packed, ...]
    marks: tuple[tuple[int | str, int | str], ...]


def served_graph(module: fx.GraphModule) -> Served:
    """`module` is left as it is."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    copy = fx.GraphModule(module, graph)
    position = {node: k for k, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    arrives = _unpack_products(copy)
    _weights_before_biases(graph, position)
    extra = _lift(copy)
    marks = _mark(graph)
    graph.eliminate_dead_code(_is_impure)
    _without_device_numbers(graph)
    takes = _drop_sizes(graph, position)
    given = [n for n in graph.nodes if n.op == "placeholder"]
    packed = tuple(Packed(k, *arrives[node]) for k, node in enumerate(given) if node in arrives)
    return Served(copy, tuple(takes), tuple(extra), packed, marks)


def key_of(served: Served) -> CaptureKey:
    """The capture key of a prepared graph.  Raises Unkeyed for what it cannot express."""
    return capture_key(served.module, {"format": "vllm 1"}, inference=True)


def _drop_sizes(graph: fx.Graph, position: Mapping[fx.Node, int]) -> list[int]:
    """Leave out sizes that nobody reads: whether Dynamo hands them over depends on how packed products ask for shapes.  Returns the
    positions of what stays of the caller's arguments."""
    stays = []
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if isinstance(example_value(node), torch.SymInt) and not node.users:
            graph.erase_node(node)
        elif node in position:
            stays.append(position[node])
    return stays


def _is_impure(node: fx.Node) -> bool:
    """Only sizes and views that nobody needs any more go."""
    return node.op in ("placeholder", "output") or not (node.target in ("size", "reshape", "view") or node.target is torch.Size)


# -- packed products ---------------------------------------------------------------------------------------------------
def _unpack_products(module: fx.GraphModule) -> dict[fx.Node, tuple[str, str, tuple[int, ...]]]:
    """`onednn_mm(empty(…, n), reshape(x), bias, handle)` becomes `linear(x, weight, bias)`: the form of every other platform, and so does
    `weight_packed_linear(reshape(empty(…, n)), reshape(x), tiles, bias, …)`.

    The weight takes the place of its packed form among the arguments; its shape follows from what it is multiplied with.  Returns what
    arrives packed, and how: the rest of `Packed`.
    """
    arrives: dict[fx.Node, tuple[str, str, tuple[int, ...]]] = {}
    for node in list(module.graph.nodes):
        callee = _name_of(node.target)
        if callee not in (ONEDNN, TILED):
            continue
        if callee == ONEDNN:
            made, rows, bias, weight = node.args
            calls = [node, made]
        else:
            viewed, rows, weight, bias, _ = node.args
            made = viewed.args[0] if viewed.target == "reshape" else viewed
            calls = [node, viewed, made] if viewed is not made else [node, made]
        x = rows.args[0] if rows.target == "reshape" else rows
        fake_out, fake_x = example_value(made), example_value(x)
        given = [argument for argument in (weight, bias) if argument is not None]
        if any(a.op != "placeholder" or len(a.users) != 1 for a in given) or fake_x.dim() != 2 or made.target is not torch.empty:
            continue
        with module.graph.inserting_before(node):
            linear = module.graph.call_function(torch._C._nn.linear, (x, weight, bias))
        linear.meta = dict(made.meta)
        made.replace_all_uses_with(linear, delete_user_cb=lambda user, calls=calls: user not in calls)
        for dead in calls:
            module.graph.erase_node(dead)
        for argument in given:
            value, shape = example_value(argument), (fake_out.shape[-1], fake_x.shape[-1])
            plain = _like(fake_out, shape if argument is weight else shape[:1])
            if argument is weight or value.dtype != plain.dtype:
                arrives[argument] = callee, _DTYPES[value.dtype], tuple(int(n) for n in value.shape)
            argument.meta["example_value"] = plain
    return arrives


def _weights_before_biases(graph: fx.Graph, position: Mapping[fx.Node, int]) -> None:
    """One order of a product's arguments: Dynamo lists a weight and its bias in the order in which it meets them, and which it meets
    first depends on the platform's form of the product."""
    for node in graph.nodes:
        weight, bias = (*node.args, None, None)[1:3] if node.target is torch._C._nn.linear else (None, None)
        if weight in position and bias in position and position[bias] < position[weight]:
            bias.prepend(weight)


def _like(fake: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    assert isinstance(fake, FakeTensor)
    with fake.fake_mode:
        return torch.empty(shape, dtype=fake.dtype, device=fake.device)


def _name_of(target: Any) -> str:
    """`_C.onednn_mm` of an operator or its packet, else nothing."""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return str(target) if isinstance(target, torch._ops.OpOverloadPacket) else ""


# -- what differs by rank ----------------------------------------------------------------------------------------------
def _lift(module: fx.GraphModule) -> list[int]:
    """Replace integers that number rows by placeholders at the end of the list; returns their values."""
    found: list[int] = []
    mode = next((v.fake_mode for n in module.graph.nodes if isinstance(v := n.meta.get("example_value"), FakeTensor)), None)
    last = next((n for n in reversed(module.graph.nodes) if n.op == "placeholder"), None)
    if mode is None or last is None:
        return found
    for node in list(module.graph.nodes):
        for place in _row_numbers(node):
            with module.graph.inserting_after(last):
                last = module.graph.placeholder(f"rank_{len(found)}")
            last.meta["example_value"] = _symbol(mode, node.args[place], len(found))
            found.append(node.args[place])
            node.update_arg(place, last)
    return found


def _row_numbers(node: fx.Node) -> list[int]:
    """Positions of the integers that are computed with integer tensors."""
    if node.op != "call_function" or node.target not in _INDEXING:
        return []
    tensors = [v for a in node.args if isinstance(a, fx.Node) and isinstance(v := example_value(a), torch.Tensor)]
    if not tensors or any(v.dtype.is_floating_point or v.dtype.is_complex for v in tensors):
        return []
    return [i for i, a in enumerate(node.args) if type(a) is int]


def _mark(graph: fx.Graph) -> tuple[tuple[int | str, int | str], ...]:
    """Handles and group names of collectives, and ranks that operators are told, by marks in order of appearance."""
    marks: dict[tuple[str, int | str], int | str] = {}
    for node in graph.nodes:
        names = _argument_names(node.target)
        collective = any(word in _name_of(node.target) for word in _COLLECTIVES)
        given = [(names[i], a, functools.partial(node.update_arg, i)) for i, a in enumerate(node.args) if names]
        given += [(name, a, functools.partial(node.update_kwarg, name)) for name, a in node.kwargs.items()]
        for name, value, update in given:
            if isinstance(value, str) and collective and name in ("group_name", "group"):
                update(marks.setdefault((name, value), f"flagtree.group.{len(marks)}"))
            elif type(value) is int and (name in _RANKS or (collective and name == "handle")):
                update(marks.setdefault((name, value), MARK + len(marks)))
    return tuple((mark, value) for (_, value), mark in marks.items())


def _argument_names(target: Any) -> list[str]:
    """Of an operator; empty for anything else."""
    op = getattr(target, "default", None) if isinstance(target, torch._ops.OpOverloadPacket) else target
    return [a.name for a in op._schema.arguments] if isinstance(op, torch._ops.OpOverload) else []


def _symbol(mode: FakeTensorMode, value: int, number: int) -> torch.SymInt:
    env = mode.shape_env
    assert isinstance(env, ShapeEnv)
    source = ConstantSource(f"flagtree_rank_{number}")
    symbol = env.create_symbol(value, source, DimDynamic.DYNAMIC, None, positive=None, do_not_specialize_zero_one=True)
    size = env.create_symintnode(symbol, hint=value, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def _without_device_numbers(graph: fx.Graph) -> None:
    """`cuda:1` is `cuda`: the rank's own device is the current one."""
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            node.args = fx.node.map_aggregate(node.args, _plain_device)
            node.kwargs = fx.node.map_aggregate(node.kwargs, _plain_device)


def _plain_device(value: Any) -> Any:
    return torch.device(value.type) if isinstance(value, torch.device) else value
