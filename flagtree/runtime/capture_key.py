"""The capture key: identity of the FX graph that Dynamo hands over, computed with torch alone.

Two captures of one computation get one key: node and parameter names do not enter, symbols are renamed in order of appearance,
and everything that a compiled launch list depends on does: targets, arguments, dtype, shape, stride, device, symbol ranges.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._library.fake_class_registry import FakeScriptObject


class Unkeyed(Exception):
    """The graph holds something whose identity this key cannot express; the graph is compiled afresh in each process."""


class _Writer:
    """The canonical text of the graph, a line a fact."""

    def __init__(self, inference: bool = False) -> None:
        self.inference = inference
        self.lines: list[str] = []
        self.symbols: dict[str, str] = {}
        self.sizes: dict[str, torch.SymInt] = {}
        self.nodes: dict[fx.Node, int] = {}

    def text(self, *parts: str) -> None:
        self.lines.append("\x1f".join(parts))

    def expression(self, value: torch.SymInt | torch.SymFloat | torch.SymBool) -> str:
        """A symbolic expression with symbols renamed by first appearance; a new symbol also states its range."""
        expr = value.node.expr
        names = {}
        for symbol in sorted(expr.free_symbols, key=lambda s: s.name):
            if symbol.name not in self.symbols:
                self.symbols[symbol.name] = f"s{len(self.symbols)}"
                found = value.node.shape_env.var_to_range.get(symbol)
                self.text("symbol", self.symbols[symbol.name], str(found))
            names[symbol.name] = self.symbols[symbol.name]
        if expr.is_Symbol:
            if isinstance(value, torch.SymInt):
                self.sizes.setdefault(names[expr.name], value)
            return names[expr.name]
        return str(expr.xreplace({s: s.func(names[s.name], integer=True) for s in expr.free_symbols}))

    def size(self, value: int | torch.SymInt) -> str:
        return str(value) if isinstance(value, int) else self.expression(value)

    def value(self, value: Any) -> str:
        """A placeholder's example: what guards make true of every call."""
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or type(value) not in _PLAIN_TENSORS():
                raise Unkeyed(f"tensor type {type(value).__name__}")
            shape = ",".join(self.size(n) for n in value.shape)
            stride = ",".join(self.size(n) for n in value.stride())
            grad = "grad" if value.requires_grad and not self.inference else ""
            device = value.device.type if self.inference else value.device  # the rank's own device is the current one
            return f"tensor({value.dtype}[{shape}]({stride})@{device}{grad})"
        if isinstance(value, FakeScriptObject):  # handed on to operators unread: only its kind can matter
            return f"opaque({value.script_class_name})"
        return self.argument(value)

    def argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{self.nodes[value]}"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return f"sym({self.expression(value)})"
        if isinstance(value, (tuple, list)):
            return f"{type(value).__name__}({';'.join(self.argument(v) for v in value)})"
        if isinstance(value, dict):
            return "{" + ";".join(f"{self.argument(k)}={self.argument(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self.argument(value.start)};{self.argument(value.stop)};{self.argument(value.step)})"
        if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str)):
            return f"{type(value).__name__}:{value!r}"
        if isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.layout)):
            return f"{type(value).__name__}:{value}"
        raise Unkeyed(f"argument of type {type(value).__name__}")


def _PLAIN_TENSORS() -> tuple[type, ...]:
    from torch._subclasses.fake_tensor import FakeTensor

    return (torch.Tensor, torch.nn.Parameter, FakeTensor)


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    if not name or "<locals>" in name or "<lambda>" in name:
        raise Unkeyed(f"call of {target!r}")
    return re.sub(r"pybind11_detail_function_record\w*\.", "", f"{module}.{name}")  # how torch was compiled is not what is called


@dataclass(frozen=True, slots=True)
class CaptureKey:
    """`digest`: SHA-256 of `text`, one line a fact.  `renamed`: the shape environment's symbol to the key's; `sizes`: the key's symbol
    to the size itself."""

    digest: str
    text: str
    renamed: dict[str, str]
    sizes: dict[str, torch.SymInt]


def example_value(node: fx.Node) -> Any:
    """What Dynamo or AOTAutograd knows of a placeholder."""
    return node.meta["example_value"] if "example_value" in node.meta else node.meta["val"]


def capture_key(module: fx.GraphModule, factors: dict[str, str], *, inference: bool = False) -> CaptureKey:
    """Identity of the graph under `factors` (versions, target, options).  `inference`: nobody asks for gradients, so which inputs
    could have one is left out.  Raises Unkeyed for what it cannot express."""
    writer = _Writer(inference)
    for name in sorted(factors):
        writer.text("factor", name, factors[name])
    for position, node in enumerate(module.graph.nodes):
        writer.nodes[node] = position
        if node.op == "placeholder":
            writer.text("placeholder", writer.value(example_value(node)))
        elif node.op == "get_attr":
            writer.text("get_attr", _attribute(module, str(node.target)))
        elif node.op == "output":
            writer.text("output", writer.argument(node.args[0]))
        else:
            kwargs = {k: node.kwargs[k] for k in sorted(node.kwargs)}
            writer.text(node.op, _target(node), writer.argument(node.args), writer.argument(kwargs))
    for line in sorted(_relations(writer)):
        writer.text("guard", line)
    text = "\n".join(writer.lines) + "\n"
    return CaptureKey(hashlib.sha256(text.encode()).hexdigest(), text, writer.symbols, writer.sizes)


def _relations(writer: _Writer) -> Iterator[str]:
    """What Dynamo has guarded about the sizes so far: one captured graph may be specialised to several such sets."""
    size = next(iter(writer.sizes.values()), None)
    if size is None:
        return
    for guard in size.node.shape_env.guards:
        expr = size.node.shape_env.replace(guard.expr)  # sizes that are known to be equal have one symbol in the graph
        free = expr.free_symbols
        known = [s for s in free if s.name in writer.symbols]
        if known and len(known) < len(free):
            raise Unkeyed(f"a guard on a size that the graph does not take: {expr}")
        if known:
            yield str(expr.xreplace({s: s.func(writer.symbols[s.name], integer=True) for s in known}))


def _attribute(module: fx.GraphModule, path: str) -> str:
    """A constant of the graph enters by its content."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor) or value.numel() > 4096 or value.is_meta:
        raise Unkeyed(f"attribute '{path}'")
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype}{tuple(value.shape)}{value.stride()}:{hashlib.sha256(data).hexdigest()}"
