"""One operator call as a rule of lowering sees it: operands, results, and where its kernels go.

A rule reads operands by position or name and emits kernels or one extern; it never touches the state of the lowering.
Between `lowering.py`, which makes the calls, and the tables of rules.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from flagtree.ir.program import Extern, Operand, Origin
from flagtree.lower.builder import Body, NotLowered, Tensor, Value

if TYPE_CHECKING:
    from flagtree.lower.lowering import Lowering


def packet_of(op: torch._ops.OpOverload) -> str:
    """`aten.add` of `aten.add.Tensor`."""
    return f"{op.namespace}.{op.overloadpacket.__name__}"


class Call:
    """One operator call as a rule sees it: operands by position or name, results as tensors, `emit` for its kernels."""

    def __init__(self, lowering: Lowering, node: fx.Node) -> None:
        self.lowering, self.node = lowering, node
        assert isinstance(node.target, torch._ops.OpOverload)
        self.op = node.target
        self.packet, self.overload = packet_of(self.op), self.op._overloadname
        self.origin = node.meta.get("origin") or Origin(node.name)

    def node_argument(self, position: int) -> Any:
        return self.node.args[position] if position < len(self.node.args) else None

    def argument(self, position: int, name: str) -> Any:
        """Operand by position, else by keyword, else the schema's default."""
        if position < len(self.node.args):
            return self.node.args[position]
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        return next((a.default_value for a in self.op._schema.arguments if a.name == name and a.has_default_value()), None)

    def is_tensor(self, position: int) -> bool:
        return isinstance(self.node_argument(position), fx.Node)

    def tensor(self, position: int) -> Tensor:
        value = self.node_argument(position)
        if not isinstance(value, fx.Node):
            raise NotLowered(f"operand {position} is not a tensor")
        return self.lowering.tensor(value)

    def optional_tensor(self, position: int, name: str) -> Tensor | None:
        value = self.argument(position, name)
        return self.lowering.tensor(value) if isinstance(value, fx.Node) else None

    def tensors(self, position: int) -> list[Tensor]:
        return [self.lowering.tensor(n) for n in self.node_argument(position)]

    def number(self, body: Body, value: Any, dtype: str) -> Value:
        if isinstance(value, torch.SymInt):
            return body.cast(body.index(self.lowering.index(value)), dtype)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise NotLowered("symbolic number that is not an integer")
        return body.constant(value, dtype)

    def device(self, position: int) -> str:
        value = self.node_argument(position)
        return str(value.meta["val"].device) if isinstance(value, fx.Node) else ""

    def out(self) -> Tensor:
        return self.lowering.result(self.node)

    def outs(self) -> list[Tensor | None]:
        """Results in order; None for one that nobody reads."""
        if isinstance(self.node.meta["val"], torch.Tensor):
            return [self.out()]
        items = {n.args[1]: n for n in self.node.users if n.target is operator.getitem}
        count = len(self.node.meta["val"])
        return [self.lowering.result(items[k]) if k in items and items[k].users else None for k in range(count)]

    def emit(self, body: Body, suffix: str = "") -> None:
        name = f"{self.node.name}_{suffix}" if suffix else self.node.name
        kernel = body.kernel(self.lowering.step_name(name), origins=(self.origin,), ops=(str(self.op),))
        self.lowering.steps.append(kernel)

    def extern(self, callee: str, args: tuple[Operand, ...], reason: str) -> None:
        """A call with one result that takes the place of this one."""
        out = self.out()
        name = self.lowering.step_name(self.node.name)
        self.lowering.steps.append(Extern(name, callee, args, (out.name,), reason=reason, origins=(self.origin,)))
