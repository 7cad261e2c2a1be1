"""What PyTorch computes for each kernel of a mixture of experts: its operator taken apart into calls, with the names that lowering gives.

Invariant: the calls are an independent path (ATen's stable sort, a library product for each expert), never the kernels' own text.
Used by check/eager.py and check/evidence.py.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx

from flagtree.check.recipe import FORMAT, no_eager
from flagtree.ir.experts import BLOCK, Known
from flagtree.ir.index import Index
from flagtree.ir.program import Kernel, Program
from flagtree.lower.experts import DOWN, UP

aten, ours = torch.ops.aten, torch.ops.flagtree
_FUSED = "flagtree.fused_moe.default"
_ACTIVATIONS = {"silu": aten.silu.default, "gelu": aten.gelu.default}


# -- the graph -------------------------------------------------------------------------------------------------------
def in_pieces(graph: fx.Graph) -> fx.Graph:
    """The graph with each `fused_moe` as its sort, products, gate and weighted sum, whose results have the names of lowering's buffers;
    itself where it has none."""
    if not any(str(node.target) == _FUSED for node in graph.nodes):
        return graph
    out, moved = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if str(node.target) == _FUSED:
            moved[node] = _Pieces(out, node, moved).write()
        else:
            moved[node] = out.node_copy(node, lambda n: moved[n])
    return out


class _Pieces:
    """One call taken apart; every new node has a fake result and the call's origin."""

    def __init__(self, graph: fx.Graph, node: fx.Node, moved: dict[fx.Node, fx.Node]) -> None:
        self.graph, self.node = graph, node
        self.mode = node.meta["val"].fake_mode
        names = ("x", "gate_up", "down", "weights", "ids", "activation")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        self.x, self.gate_up, self.down, self.weights, self.ids = (moved[given[n]] for n in names[:5])  # type: ignore[index]
        self.activation = str(given.get("activation", "silu"))

    def call(self, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call; views of what exists share its memory."""
        fake = fx.node.map_aggregate((args, kwargs), lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)
        with torch.no_grad(), self.mode:
            value = target(*fake[0], **fake[1])
        node = self.graph.create_node("call_function", target, args, kwargs, f"{self.node.name}_{name}")
        node.meta = {**copy.copy(self.node.meta), "val": value}
        return node

    def write(self) -> fx.Node:
        order, starts = self._sorted()
        top_k, inner = self.ids.meta["val"].shape[1], self.down.meta["val"].shape[2]
        both = self.call("both", ours.experts_up.default, self.x, self.gate_up, order, starts, top_k)
        first, second = (self.call(f"half_{k}", aten.slice.Tensor, both, 1, k * inner, (k + 1) * inner) for k in (0, 1))
        active = self.call("active", _ACTIVATIONS[self.activation], first)
        gated = self.call("gated", aten.mul.Tensor, active, second)
        return self._summed(self.call("results", ours.experts_down.default, gated, self.down, order, starts, top_k), top_k)

    def _sorted(self) -> tuple[fx.Node, fx.Node]:
        """The choices by expert, and where each expert's begin."""
        flat = self.call("choices", aten.view.default, self.ids, [-1])
        both = self.call("sorted", aten.sort.stable, flat, stable=True)
        ids, places = (self.call(f"sorted_{k}", operator.getitem, both, k) for k in (0, 1))
        order = self.call("order", aten._to_copy.default, places, dtype=torch.int32)
        experts = self.down.meta["val"].shape[0]
        all_ = self.call("experts", aten.arange.default, experts + 1, dtype=torch.int32, device=self.ids.meta["val"].device)
        return order, self.call("starts", aten.searchsorted.Tensor, ids, all_, out_int32=True)

    def _summed(self, results: fx.Node, top_k: int) -> fx.Node:
        """Over a token's choices in their order, in f32, rounded once; under the call's own name."""
        total: fx.Node | None = None
        for k in range(top_k):
            weight = self.call(f"weight_{k}", aten.slice.Tensor, self.weights, 1, k, k + 1)
            term = self.call(f"term_{k}", aten.mul.Tensor, weight, self.call(f"result_{k}", aten.select.int, results, 1, k))
            total = term if total is None else self.call(f"sum_{k}", aten.add.Tensor, total, term)
        assert total is not None
        last = self.call("out", aten._to_copy.default, total, dtype=self.x.meta["val"].dtype)
        last.name = self.node.name
        return last


def activation_of(graph: fx.Graph, kernel: Kernel) -> str:
    """The activation of the experts that a kernel is of, as the ATen call in a graph `in_pieces`.  NoEager for another graph."""
    for node in graph.nodes:
        if node.target in _ACTIVATIONS.values() and node.name.endswith("_active") and node.meta.get("origin") in kernel.origins:
            return str(node.target)
    raise no_eager("which activation follows the product is not known", f"kernel {kernel.name}")


# -- a product as a kernel -------------------------------------------------------------------------------------------
def product_recipe(program: Program, known: Known, activation: str) -> dict[str, Any]:
    """The recipe of an isolated product: weights taken back, one library product for each expert, the gate.  Its sizes `tokens`,
    `experts` and `columns` (of the result) may be given other values."""
    product, names = known.product, known.names
    out = program.buffers[-1].name
    tokens = program.buffer(names.x if product.up else out).shape[0]
    depth, wide = program.buffer(names.w).shape[2], Index.of("columns") * product.parts
    rows, blocks = Index.of("tokens") * product.top_k, [-(-n // BLOCK) for n in (depth.constant or 0,)]
    shapes: dict[str, tuple[str, list[Index]]] = {
        names.starts: ("i32", [Index.of("experts") + 1]), names.order: ("i32", [rows]),
        names.x: (product.dtype, [Index.of("tokens") if product.up else rows, depth]),
        names.w: (program.buffer(names.w).dtype, [Index.of("experts"), wide, depth]),
    }  # fmt: skip
    if product.quantised:
        across = (Index.of("columns") * product.parts + (BLOCK - 1)) // BLOCK
        shapes[names.scales] = ("f32", [Index.of("experts"), across, Index.of(blocks[0])])
        shapes["plain"] = (product.dtype, [Index.of("experts"), wide, depth])
    columns = Index.of("columns")
    result = [rows, columns] if product.up else [Index.of("tokens"), Index.of(product.top_k), columns]
    shapes[out] = (product.dtype, result)
    if product.parts == 2:
        shapes |= {"both": (product.dtype, [rows, wide]), "active": (product.dtype, result)}
    views = {name: _view(name, dtype, shape) for name, (dtype, shape) in shapes.items()}
    views |= {f"half{k}": _view("both", product.dtype, result, wide, columns * k) for k in range(2) if product.parts == 2}
    given = [n for n in (names.starts, names.order, names.x, names.w, names.scales) if n]
    sizes = {"tokens": tokens.to_json(), "experts": program.buffer(names.w).shape[0].to_json(), "columns": product.inner}
    return {"format": FORMAT, "views": views, "given": [[n, n] for n in given], "steps": _steps(known, out, activation),
            "results": {out: out}, "sizes": sizes}  # fmt: skip


def _steps(known: Known, out: str, activation: str) -> list[dict[str, Any]]:
    product, names = known.product, known.names

    def call(callee: str, output: str, *args: object) -> dict[str, Any]:
        return {"extern": callee, "args": [{"buffer": a} if isinstance(a, str) else a for a in args], "kwargs": {}, "outputs": [output]}

    steps = []
    if product.quantised:
        kind = {"type": ["dtype", product.dtype]}
        steps.append(call("flagtree.dequantise.default", "plain", names.w, names.scales, BLOCK, BLOCK, kind))
    w, first = "plain" if product.quantised else names.w, "both" if product.parts == 2 else out
    steps.append(call(UP if product.up else DOWN, first, names.x, w, names.order, names.starts, product.top_k))
    if product.parts == 2:
        steps += [call(activation, "active", "half0"), call("aten.mul.Tensor", out, "active", "half1")]
    return steps


def _view(storage: str, dtype: str, shape: list[Index], row: Index | None = None, offset: Index | int = 0) -> dict[str, Any]:
    """A view that lies densely, or whose rows are `row` elements apart."""
    strides = [Index.of(1)]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    if row is not None:
        strides[0] = row
    return {"storage": storage, "dtype": dtype, "shape": [n.to_json() for n in shape], "strides": [n.to_json() for n in strides],
            "offset": Index.of(offset).to_json() if isinstance(offset, int) else offset.to_json()}  # fmt: skip
