"""What PyTorch computes for each kernel of a mixture of experts: its operator taken apart into calls, with the names that lowering gives.

Invariant: the calls are an independent path (ATen's stable sort, a library product for each expert), never the kernels' own text.
Used by check/eager.py and check/evidence.py.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from flagtree.check.recipe import FORMAT, no_eager
from flagtree.ir.experts import BLOCK, DOWN, DOWN_SCALED, LINEAR_SCALED, UP, UP_SCALED, Known
from flagtree.ir.index import Index
from flagtree.ir.program import Kernel, Program

aten, ours = torch.ops.aten, torch.ops.flagtree
_FUSED = ("flagtree.fused_moe.default", "flagtree.fused_moe_scaled.default")
_ACTIVATIONS = {"silu": aten.silu.default, "gelu": aten.gelu.default}


# -- the graph -------------------------------------------------------------------------------------------------------
def in_pieces(graph: fx.Graph) -> fx.Graph:
    """The graph with each `fused_moe` (`fused_moe_scaled`) as its sort, products, gate and weighted sum, whose results have the names of
    lowering's buffers; itself where it has none."""
    if not any(str(node.target) in _FUSED for node in graph.nodes):
        return graph
    out, moved = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if str(node.target) in _FUSED:
            moved[node] = _Pieces(out, node, moved).write()
        else:
            moved[node] = out.node_copy(node, lambda n: moved[n])
    return out


class _Pieces:
    """One call taken apart; every new node has a fake result and the call's origin."""

    def __init__(self, graph: fx.Graph, node: fx.Node, moved: dict[fx.Node, fx.Node]) -> None:
        self.graph, self.node = graph, node
        self.mode = node.meta["val"].fake_mode
        named = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)  # type: ignore[union-attr]
        self.activation = str(named.pop("activation", "silu"))
        self.given = [moved[n] for n in named.values()]  # type: ignore[index]
        self.x, self.weights, self.ids, self.scaled = self.given[0], *self.given[-2:], len(self.given) > 5

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
        top_k = self.ids.meta["val"].shape[1]
        both = self._product("both", (ours.experts_up, ours.experts_up_scaled), self.x, "x", self.given[1:3], order, starts, top_k)
        inner = both.meta["val"].shape[1] // 2
        first, second = (self.call(f"half_{k}", aten.slice.Tensor, both, 1, k * inner, (k + 1) * inner) for k in (0, 1))
        active = self.call("active", _ACTIVATIONS[self.activation], first)
        gated = self.call("gated", aten.mul.Tensor, active, second)
        down = self.given[3:5] if self.scaled else self.given[2:3]
        return self._summed(self._product("results", (ours.experts_down, ours.experts_down_scaled), gated, "gated", down, order, starts,
                                          top_k), top_k)  # fmt: skip

    def _product(self, name: str, callees: tuple[Any, Any], x: fx.Node, of: str, weight: Sequence[fx.Node], order: fx.Node,
                 starts: fx.Node, top_k: int) -> fx.Node:  # fmt: skip
        """A product of the rows by expert; with scales, of the rows quantised in groups."""
        if not self.scaled:
            return self.call(name, callees[0].default, x, weight[0], order, starts, top_k)
        both = self.call(f"{of}_both", ours.quantise.default, x, BLOCK, weight[0].meta["val"].dtype)
        q, scales = (self.call(f"{of}_{n}", operator.getitem, both, k) for k, n in enumerate(("quantised", "scales")))
        return self.call(name, callees[1].default, q, scales, *weight, order, starts, top_k, x.meta["val"].dtype)

    def _sorted(self) -> tuple[fx.Node, fx.Node]:
        """The choices by expert, and where each expert's begin."""
        flat = self.call("choices", aten.view.default, self.ids, [-1])
        both = self.call("sorted", aten.sort.stable, flat, stable=True)
        ids, places = (self.call(f"sorted_{k}", operator.getitem, both, k) for k in (0, 1))
        order = self.call("order", aten._to_copy.default, places, dtype=torch.int32)
        experts = self.given[1].meta["val"].shape[0]
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
    """The recipe of an isolated product: weights taken back, one library product for each expert, the gate; or the definition of the
    scaled product.  Its sizes `tokens`, `experts` and `columns` (of the result) may be given other values."""
    product, names, out = known.product, known.names, program.buffers[-1].name
    shapes = _shapes(program, known, out)
    views = {name: _view(name, dtype, shape) for name, (dtype, shape) in shapes.items()}
    if product.parts == 2:
        columns, (dtype, shape) = Index.of("columns"), shapes[out]
        views |= {f"half{k}": _view("both", dtype, shape, columns * 2, columns * k) for k in range(2)}
    tokens = program.buffer(out if not product.up else names.x).shape[0]
    experts = Index.of(1) if product.dense else program.buffer(names.w).shape[0]
    sizes = {"tokens": tokens.to_json(), "experts": experts.to_json(), "columns": product.inner}
    given = [n for n in (names.starts, names.order, names.x, names.x_scales, names.w, names.scales) if n]
    return {"format": FORMAT, "views": views, "given": [[n, n] for n in given], "steps": _steps(known, out, activation),
            "results": {out: out}, "sizes": sizes}  # fmt: skip


def _shapes(program: Program, known: Known, out: str) -> dict[str, tuple[str, list[Index]]]:
    """Type and shape of each operand, of the result, and of what is between."""
    product, names = known.product, known.names
    tokens, columns = Index.of("tokens"), Index.of("columns")
    rows, wide, depth = tokens * product.top_k, columns * product.parts, program.buffer(names.w).shape[-1]
    expert = [] if product.dense else [Index.of("experts")]
    x_rows = tokens if product.up else rows
    shapes: dict[str, tuple[str, list[Index]]] = {
        names.x: (program.buffer(names.x).dtype, [x_rows, depth]), names.w: (program.buffer(names.w).dtype, [*expert, wide, depth]),
    }  # fmt: skip
    if not product.dense:
        shapes |= {names.starts: ("i32", [Index.of("experts") + 1]), names.order: ("i32", [rows])}
    if names.scales:
        shared, blocks = product.shared or BLOCK, program.buffer(names.scales).shape[-1]
        shapes[names.scales] = ("f32", [*expert, wide if shared == 1 else (wide + (shared - 1)) // shared, blocks])
        shapes |= {names.x_scales: ("f32", [x_rows, blocks])} if product.scaled else {"plain": (product.dtype, [*expert, wide, depth])}
    result = [rows, columns] if product.up or product.dense else [tokens, Index.of(product.top_k), columns]
    shapes[out] = (product.dtype, result)
    if product.parts == 2:
        shapes |= {"both": (product.dtype, [rows, wide]), "active": (product.dtype, result)}
    return shapes


def _steps(known: Known, out: str, activation: str) -> list[dict[str, Any]]:
    product, names = known.product, known.names

    def call(callee: str, output: str, *args: object) -> dict[str, Any]:
        return {"extern": callee, "args": [{"buffer": a} if isinstance(a, str) else a for a in args], "kwargs": {}, "outputs": [output]}

    kind = {"type": ["dtype", product.dtype]}
    if product.scaled:
        rest = () if product.dense else (names.order, names.starts, product.top_k)
        callee = LINEAR_SCALED if product.dense else UP_SCALED if product.up else DOWN_SCALED
        return [call(callee, out, names.x, names.x_scales, names.w, names.scales, *rest, kind)]
    steps = []
    if product.quantised:
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
