"""Any traced callable to one normalised ATen FX graph: the form that lowering reads.

The callable runs once on fake tensors under a dispatch mode that sits below autograd, so composite operators arrive whole;
those that lowering knows (or that a platform library does best whole) are kept, the others are decomposed.
Views and in-place operators stay as they are: the IR has memory, aliases and order, so nothing is functionalised.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._library.fake_class_registry import FakeScriptObject
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flagtree.errors import CaptureError
from flagtree.ir.program import Origin

aten = torch.ops.aten

# kept whole as externs: decomposing them would hide what a library does best, or copy their operands
WHOLE = frozenset(
    {
        aten.linear.default,  # its decomposition over a 3-D slice expands the weight by the batch
        aten.scaled_dot_product_attention.default,
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
        aten.einsum.default, aten.bilinear.default,
        aten.lstm.input, aten.gru.input,
        aten.max_pool2d.default, aten.adaptive_avg_pool2d.default,
    }
)  # fmt: skip
_DROPPED = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range")


@dataclass
class Normalised:
    """`graph`: placeholders in the callable's argument order, ATen calls with `meta["val"]` (fake results, symbolic sizes) and
    `meta["origin"]`; `constants`: real tensors that the trace met, by placeholder name."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]


class _Recorder(TorchDispatchMode):
    """Writes every operator call that reaches it into an fx.Graph."""

    def __init__(self, keep: Callable[[torch._ops.OpOverload], bool], decompositions: dict, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.keep, self.decompositions, self.fake_mode = keep, decompositions, fake_mode
        self.node_of: dict[int, fx.Node] = {}
        self.alive: list[object] = []  # ids stay unique only while the tensors live
        self.constants: dict[str, torch.Tensor] = {}
        self.origin = Origin("")

    def bind(self, value: torch.Tensor | FakeScriptObject, node: fx.Node) -> None:
        self.node_of[id(value)] = node
        self.alive.append(value)

    def placeholder(self, name: str, value: object) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        if isinstance(value, (torch.Tensor, FakeScriptObject)):
            self.bind(value, node)
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
            return func(*args, **kwargs)
        if not self.keep(func):
            rule = self.decompositions.get(func)
            if rule is not None:
                with self:
                    return rule(*args, **kwargs)
            if _is_composite(func):
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if func is aten._local_scalar_dense.default:
            return func(*args, **kwargs)  # a Python number: used below as what it is
        args, kwargs = _mapped((args, kwargs), lambda v: _plain_number(self._to_fake(v)))
        with enable_python_dispatcher():  # shape functions in Python call views with symbolic sizes, which C++ kernels refuse
            result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _record(self, func: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any) -> None:
        if func.overloadpacket.__name__.startswith(_DROPPED) or not _has_tensor((args, kwargs, result)):
            return
        nodes = _mapped((args, kwargs), self._argument)
        node = self.graph.call_function(func)
        node.args, node.kwargs = nodes  # set here: create_node warns of SymInts, which only code generated from an fx graph cannot carry
        node.meta["val"], node.meta["origin"] = result, self.origin
        if isinstance(result, torch.Tensor):
            self.node_of.setdefault(id(result), node)
            self.alive.append(result)
        elif isinstance(result, (tuple, list)):
            for i, value in enumerate(result):
                if isinstance(value, torch.Tensor) and id(value) not in self.node_of:
                    item = self.graph.call_function(operator.getitem, (node, i))
                    item.meta["val"], item.meta["origin"] = value, self.origin
                    self.bind(value, item)

    def _to_fake(self, value: object) -> object:
        """A real tensor that the program carries (a Python constant, a captured buffer) becomes a named constant."""
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        node = self.node_of.get(id(value))
        if node is not None:
            return node.meta["val"]
        fake = self.fake_mode.from_tensor(value, static_shapes=True)
        name = f"const_{len(self.constants)}"
        self.constants[name] = value
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first):
            node = self.placeholder(name, fake)
        self.bind(value, node)
        return fake

    def _argument(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            node = self.node_of.get(id(value))
            if node is None:
                raise CaptureError("a tensor appears in the trace that no recorded call made", why=f"{tuple(value.shape)} {value.dtype}")
            return node
        if isinstance(value, FakeScriptObject):  # an object that operators hand on, such as a layer's name
            if id(value) not in self.node_of:
                raise CaptureError(f"an object of type {value.script_class_name} is no input of the graph")
            return self.node_of[id(value)]
        return value


def _mapped(values: Any, one: Callable[[Any], Any]) -> Any:
    return fx.node.map_aggregate(values, one)


def _plain_number(value: object) -> object:
    """A float that Dynamo made symbolic (`dynamic=True`) is specialised: `float` adds the guard on its value."""
    if isinstance(value, torch.SymFloat):
        return float(value)
    return bool(value) if isinstance(value, torch.SymBool) else value


def _is_composite(func: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _has_tensor(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, (tuple, list)):
        return any(_has_tensor(v) for v in value)
    return isinstance(value, dict) and any(_has_tensor(v) for v in value.values())


class _Tracer(fx.Interpreter):
    """Runs a graph module node by node, telling the recorder where each call comes from."""

    def __init__(self, module: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> object:
        if n.op not in ("placeholder", "output"):
            self.recorder.origin = Origin(n.name, _module_path(n), _source_line(n))
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> object:
        if target is operator.getitem and isinstance(args[0], torch.Tensor) and _is_elsewhere(args[0]):
            return _indexed(*args)
        return super().call_function(target, args, kwargs)


def _is_elsewhere(tensor: torch.Tensor) -> bool:
    """Is it of a device for which this torch was not built?"""
    return tensor.device.type not in ("cpu", "meta") and torch.accelerator.current_accelerator() is None


def _indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    """`x[index]` by the views that it means; Python's own way asks the library of the device for a guard."""
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, (torch.Tensor, list, bool)) for i in items):
        return operator.getitem(x, index)
    dim, skipped = 0, x.dim() - sum(i is not None and i is not Ellipsis for i in items)
    for i in items:
        if i is Ellipsis:
            dim += skipped
        elif i is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(i, slice):
            x, dim = x if i == slice(None) else torch.ops.aten.slice.Tensor(x, dim, i.start, i.stop, i.step or 1), dim + 1
        else:
            x = x.select(dim, i)
    return x


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return path.removeprefix("L['self'].").removeprefix("L__self___")


def _source_line(node: fx.Node) -> str:
    """`file.py:12` of the innermost frame; only the file's name, so that text does not depend on where it lies."""
    trace = node.meta.get("stack_trace") or node.stack_trace
    found = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    return f"{found[-1][0].rsplit('/', 1)[-1]}:{found[-1][1]}" if found else ""


def normalise(
    module: fx.GraphModule,
    names: Sequence[str],
    values: Sequence[object],
    keep: Callable[[torch._ops.OpOverload], bool],
    decompositions: dict | None = None,
    fake_mode: FakeTensorMode | None = None,
) -> Normalised:
    """Trace `module` on `values` (fake tensors, SymInts, numbers: one a placeholder, in order) and return its ATen graph.

    `keep(op)` tells which operators lowering takes whole.  Raises CaptureError when the module does what no graph can hold.
    """
    if fake_mode is None:
        fake_mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    recorder = _Recorder(lambda op: op in WHOLE or keep(op), decompositions or {}, fake_mode)
    for name, value in zip(names, values, strict=True):
        recorder.placeholder(name, value)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), fake_mode, recorder:
        results = _Tracer(module, recorder).run(*values)
    outputs = results if isinstance(results, (tuple, list)) else (results,)
    flat = _mapped(tuple(outputs), lambda v: recorder._argument(recorder._to_fake(v)) if isinstance(v, torch.Tensor) else v)
    recorder.graph.output(flat)
    return Normalised(recorder.graph, recorder.constants)
