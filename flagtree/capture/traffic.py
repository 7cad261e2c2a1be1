"""Bytes that a captured model moves before fusion: each call of the graph in core ATen reads its inputs and writes its outputs once.

Rules: views move nothing; a tensor expanded by stride 0 counts its real storage; a gather reads the rows it takes; `aten.linear` and
our operators stay whole: attention reads each cached key and value once and writes only the new rows, experts read the weights of those
taken (as many as tokens and choices can reach) once.
The graph is run on fake tensors of given sizes; nothing is allocated.  Reports compare this with the loads and stores of the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flagtree.capture.captured import CapturedModel
from flagtree.ir.traffic import EXPERTS

aten = torch.ops.aten

# results that live in an input's memory though the schema does not say so
_VIEWS = frozenset({aten._unsafe_view.default, aten.detach.default, aten.alias.default, aten.lift_fresh.default})
_GATHERS = frozenset({aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default})
_OURS = (
    "attention", "attend", "full_attention", "varlen_attention", "paged_attention", "moe_route", "fused_moe", "fused_moe_scaled",
    "scaled_linear", "quantise", "all_reduce", "all_gather",
)  # fmt: skip
_WHOLE = frozenset({aten.linear.default, *(getattr(torch.ops.flagtree, name).default for name in _OURS)})
_CHECKS = frozenset({aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default})


@dataclass(frozen=True, slots=True)
class AtenCall:
    """One call in core ATen: its operator, the node of the captured graph that it came from, that node's decoder layer (None outside
    the layers), and the bytes it reads and writes."""

    target: str
    node: str
    layer: int | None
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class Traffic:
    """All calls of one run in order, at `sizes`; a context counts the positions attended to, the call's own tokens included."""

    sizes: Mapping[str, int]
    calls: tuple[AtenCall, ...]

    def layer_bytes(self, layer: int = 1) -> int:
        """Bytes of one decoder layer; layer 1 of a capture of three is an interior one."""
        return sum(call.bytes for call in self.calls if call.layer == layer)

    def model_bytes(self, captured: CapturedModel) -> int:
        """Bytes of the whole model at its full depth: what stands outside the layers, and each run's interior layer as often as it is."""
        outside = sum(call.bytes for call in self.calls if call.layer is None)
        return outside + sum(run.count * self.layer_bytes(run.first + min(1, run.captured - 1)) for run in captured.runs)

    def node_bytes(self) -> dict[str, int]:
        """Bytes by node of the captured graph; nodes that move nothing are left out."""
        found: dict[str, int] = {}
        for call in self.calls:
            found[call.node] = found.get(call.node, 0) + call.bytes
        return found


def count_traffic(captured: CapturedModel, *, sequence: int = 1, batch: int = 1, **others: int) -> Traffic:
    """Count one call of a captured part at the given sizes: `sequence` new tokens of each of `batch` sequences, the last of which sees
    `context` positions; a tower has sizes of its own.  ValueError where the tokens do not fit, KeyError names a size that is missing.
    """
    if sequence < 1 or sequence > others.get("context", sequence):
        raise ValueError(f"{sequence} tokens do not fit into {others['context']} positions")
    sizes = {"batch": batch, "sequence": sequence, **others}
    symbols = {symbol: sizes[name] for name, symbol in captured.dims.items()}
    with FakeTensorMode(), torch.no_grad():
        arguments = [_sized(p.value, symbols) for p in captured.placeholders]
        run = _Run(captured)
        run.run(*arguments)
    return Traffic(sizes, tuple(run.calls))


def _sized(value: torch.Tensor, symbols: Mapping[str, int]) -> torch.Tensor:
    shape = [size if isinstance(size, int) else symbols[str(size.node.expr)] for size in value.shape]
    return torch.empty(shape, dtype=value.dtype)


def tensor_bytes(value: torch.Tensor) -> int:
    """Bytes of the distinct elements: dimensions of stride 0 repeat one element."""
    elements = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        elements *= size if stride else 1
    return elements * value.element_size()


@lru_cache(maxsize=1)
def _decompositions() -> dict[Any, Any]:
    from torch.export import default_decompositions

    return dict(default_decompositions().items())


class _Run(torch.fx.Interpreter):
    """Executes the captured graph node by node under a counter, so that each core ATen call is known by the node it came from."""

    def __init__(self, captured: CapturedModel) -> None:
        super().__init__(captured.graph_module)
        self.captured = captured
        self.calls: list[AtenCall] = []

    def run_node(self, node: torch.fx.Node) -> Any:
        if node.op != "call_function" or node.target in _CHECKS:
            return None if node.target in _CHECKS else super().run_node(node)
        self.node, self.layer = node.name, self.captured.layer_of_node(node)
        if node.target in _WHOLE:
            result = super().run_node(node)
            self.note(node.target, self.fetch_args_kwargs_from_env(node), result)
            return result
        with _Counter(self):
            return super().run_node(node)

    def note(self, target: Any, arguments: Any, result: Any) -> None:
        """Record one call unless it is a view or makes no tensor."""
        inputs = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if target.is_view or target in _VIEWS or not outputs:
            return
        read, written = sum(map(tensor_bytes, inputs)), sum(map(tensor_bytes, outputs))
        if target is torch.ops.flagtree.attention.default:
            # q, the new rows and start; the caches hold the new rows at their end, so the rest of them is read as well
            rows = sum(map(tensor_bytes, inputs[1:3]))
            read, written = read - rows, written + rows
        elif target in _GATHERS:
            read += sum(map(tensor_bytes, outputs)) - tensor_bytes(inputs[0])
        elif str(target) in EXPERTS:  # a weight is read once for each expert that some token takes
            weights, choices = EXPERTS[str(target)]
            experts, taken = inputs[weights[0]].shape[0], inputs[choices].numel()
            read -= sum(tensor_bytes(inputs[k]) for k in weights) * max(0, experts - taken) // experts
        self.calls.append(AtenCall(str(target), self.node, self.layer, read, written))


class _Counter(TorchDispatchMode):
    """Decomposes each call as far as core ATen goes, and notes what is left."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question such as "which device", no call of the model
            return func(*args, **kwargs)
        with self:  # a call that PyTorch itself composes of others (`to`, `reshape`) says so through `decompose`
            result = _decompositions().get(func, func.decompose)(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self.run.note(func, (args, kwargs), result)
        return result
