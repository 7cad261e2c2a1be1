"""Normalised ATen FX graph to Program: every call becomes a Kernel, an Extern with its reason, or a view.

Views cost nothing: a result that shares storage with an earlier buffer becomes an alias with offset and strides, whatever
operator made it.  In-place operators store into their operand's buffer; order and aliases carry the meaning.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flagtree.errors import CaptureError
from flagtree.ir.dtypes import TORCH_NAMES
from flagtree.ir.index import ZERO, Index, contiguous_strides
from flagtree.ir.program import Alias, Buffer, Extern, Operand, Program, Ref, Step, TypeArg
from flagtree.lower.allocation import without_allocations
from flagtree.lower.backward import BACKWARD
from flagtree.lower.builder import Body, NotLowered, Tensor, Value, compute_type
from flagtree.lower.call import Call, packet_of
from flagtree.lower.experts import EXPERTS
from flagtree.lower.externs import effect_of, reason_for, written_operands
from flagtree.lower.memory import MEMORY
from flagtree.lower.normalisation import NORMALISATIONS
from flagtree.lower.pointwise import KEPT_OPERANDS, POINTWISE, REFUSED_OVERLOADS
from flagtree.lower.quantise import QUANTISATION
from flagtree.lower.quantised_products import QUANTISED_PRODUCTS
from flagtree.lower.reduction import REDUCTIONS
from flagtree.lower.sizes import Sizes

FROM_TORCH = {getattr(torch, v): k for k, v in TORCH_NAMES.items() if hasattr(torch, v)}
RULES = {**REDUCTIONS, **NORMALISATIONS, **MEMORY, **BACKWARD, **EXPERTS, **QUANTISATION, **QUANTISED_PRODUCTS}
# they change a tensor's autograd record, not its values
NO_OPERATION = frozenset({"aten.detach_", "aten.lift_fresh", "aten.requires_grad_"})


def lowers(op: torch._ops.OpOverload) -> bool:
    """Does lowering take this operator whole?  (What capture keeps; the rest is decomposed where it can be.)"""
    packet, name = packet_of(op), str(op)
    base = packet.removesuffix("_")
    return packet in RULES or name in RULES or packet in POINTWISE or (base in POINTWISE and packet.endswith("_"))


class Lowering:
    """State of one lowering: buffers by name, the buffer of each node, the root buffer of each storage, steps so far."""

    def __init__(self, name: str, refused: Mapping[str, str] | None = None, symbols: Mapping[str, str] | None = None) -> None:
        self.name, self.refused = name, refused or {}
        self.buffers: dict[str, Buffer] = {}
        self.of_node: dict[fx.Node, str] = {}
        self.root_of_storage: dict[int, str] = {}
        self.offset_of: dict[str, Index] = {}
        self.steps: list[Step] = []
        self.sizes = Sizes(symbols)
        self._step_names: set[str] = set()
        self.shared_inputs: set[str] = set()  # inputs that lie in one storage with another

    def index(self, value: object) -> Index:
        """Index of an int or SymInt; raises NotLowered for an expression that indices do not carry."""
        return self.sizes.index(value)

    # -- buffers -----------------------------------------------------------------------------------------------------
    def tensor(self, node: fx.Node) -> Tensor:
        buffer = self.buffers[self.of_node[node]]
        return Tensor(buffer.name, buffer.dtype, buffer.shape)

    def _geometry(self, fake: torch.Tensor) -> tuple[str, tuple[Index, ...], tuple[Index, ...]]:
        if fake.dtype not in FROM_TORCH:
            raise NotLowered(f"element type {fake.dtype}")
        if fake.layout is not torch.strided:
            raise NotLowered(f"layout {fake.layout}")
        return FROM_TORCH[fake.dtype], tuple(self.index(n) for n in fake.shape), tuple(self.sizes.stride(n) for n in fake.stride())

    def add_buffer(self, name: str, fake: torch.Tensor, role: str) -> str:
        dtype, shape, strides = self._geometry(fake)
        plain = None if strides == contiguous_strides(shape) else strides
        self.buffers[name] = Buffer(name, dtype, shape, role, plain)
        self.root_of_storage[_storage(fake)] = name
        self.offset_of[name] = self.index(fake.storage_offset())
        return name

    def temp(self, call: Call, suffix: str, dtype: str, shape: Sequence[Index]) -> Tensor:
        """An intermediate of one rule."""
        name = f"{call.node.name}_{suffix}"
        self.buffers[name] = Buffer(name, dtype, tuple(shape))
        return Tensor(name, dtype, tuple(shape))

    def result(self, node: fx.Node) -> Tensor:
        """The buffer of a call's result, declared on first use."""
        if node not in self.of_node:
            self.of_node[node] = self.add_buffer(node.name, node.meta["val"], "temp")
        return self.tensor(node)

    def alias(self, node: fx.Node, fake: torch.Tensor) -> str:
        """The view of an existing buffer that `fake` is."""
        dtype, shape, strides = self._geometry(fake)
        root = self._root_for(node, fake)
        base, offset = self.buffers[root], self.index(fake.storage_offset()) - self.offset_of[root]
        if base.dtype == dtype and base.shape == shape and base.layout == strides and offset == ZERO:
            return root
        if base.dtype != dtype:
            raise NotLowered(f"view of {base.dtype} memory as {dtype}")
        plain = None if strides == contiguous_strides(shape) else strides
        self.buffers[node.name] = Buffer(node.name, dtype, shape, base.role, plain, Alias(root, offset))
        return node.name

    def _root_for(self, node: fx.Node, fake: torch.Tensor) -> str:
        """The root behind the operand that shares the storage: two inputs may lie in one storage."""
        maker = node.args[0] if node.target is operator.getitem else node
        assert isinstance(maker, fx.Node)
        for operand in maker.all_input_nodes:
            value = operand.meta["val"]
            if operand in self.of_node and isinstance(value, torch.Tensor) and _storage(value) == _storage(fake):
                return self._root(self.of_node[operand])
        return self.root_of_storage[_storage(fake)]

    def overlaps(self, a: fx.Node, b: fx.Node) -> bool:
        """Different views of one root: element order matters."""
        first, second = (self.of_node[n] for n in (a, b))
        return first != second and self._root(first) == self._root(second)

    def _root(self, name: str) -> str:
        alias = self.buffers[name].alias_of
        return name if alias is None else self._root(alias.base)

    def step_name(self, name: str) -> str:
        unique, k = name, 1
        while unique in self._step_names:
            k += 1
            unique = f"{name}_{k}"
        self._step_names.add(unique)
        return unique

    # -- calls -------------------------------------------------------------------------------------------------------
    def lower_call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self._lower_item(node)
            return
        call = Call(self, node)
        if self._is_view(node) or call.packet in NO_OPERATION:
            return
        tables: tuple[dict, ...] = (self.buffers, self.of_node, self.root_of_storage, self.offset_of)
        before = len(self.steps), [len(t) for t in tables]
        try:
            if str(call.op) in self.refused:
                raise NotLowered(self.refused[str(call.op)])
            if not self._by_rule(call):
                self._extern(call, reason_for(call.packet))
        except NotLowered as refusal:
            del self.steps[before[0] :]
            for table, size in zip(tables, before[1], strict=True):  # what the rule declared comes last
                while len(table) > size:
                    table.popitem()
            self._extern(call, str(refusal))

    def _lower_item(self, node: fx.Node) -> None:
        if node in self.of_node or not isinstance(node.meta["val"], torch.Tensor):
            return
        if _storage(node.meta["val"]) in self.root_of_storage:
            self.of_node[node] = self.alias(node, node.meta["val"])

    def _is_view(self, node: fx.Node) -> bool:
        """Results that share storage with something known, made by an operator that writes nothing."""
        value = node.meta["val"]
        assert isinstance(node.target, torch._ops.OpOverload)
        if node.target._schema.is_mutable:
            return False
        if isinstance(value, torch.Tensor) and _storage(value) in self.root_of_storage:
            self.of_node[node] = self.alias(node, value)
            return True
        return isinstance(value, (tuple, list)) and bool(value) and all(
            isinstance(v, torch.Tensor) and _storage(v) in self.root_of_storage for v in value
        )

    def _by_rule(self, call: Call) -> bool:
        rule = RULES.get(str(call.op)) or RULES.get(call.packet)
        if rule is not None:
            rule(self, call)
            return True
        in_place = call.op._schema.is_mutable
        pointwise = POINTWISE.get(call.packet.removesuffix("_") if in_place else call.packet)
        if pointwise is None or str(call.op) in REFUSED_OVERLOADS or "out" in call.node.kwargs:
            return False
        self._pointwise(call, pointwise.formula, pointwise.promote, in_place)
        return True

    def _pointwise(self, call: Call, formula: Callable[..., Any], promote: str, in_place: bool) -> None:
        out = call.tensor(0) if in_place else call.out()
        if in_place and any(isinstance(a, fx.Node) and self.overlaps(call.node_argument(0), a) for a in call.node.args[1:]):
            raise NotLowered("in-place operation on overlapping views")
        body = Body(out.shape)
        kept = KEPT_OPERANDS.get(call.packet.removesuffix("_"), ())
        dtype = self._computing_type(call, out, promote)

        def operand(position: int, value: Any) -> Any:
            if isinstance(value, fx.Node):
                loaded = body.broadcast_load(self.tensor(value))
                return loaded if position in kept or dtype is None else body.cast(loaded, dtype)
            if isinstance(value, torch.SymInt):
                return call.number(body, value, dtype or "i64")
            if isinstance(value, (torch.SymFloat, torch.SymBool)):
                raise NotLowered("symbolic number that is not an integer")
            return value

        args = [operand(k, a) for k, a in enumerate(call.node.args)]
        kwargs = {k: operand(-1, v) for k, v in call.node.kwargs.items()}
        # a formula needs one value to know its type: a lone number takes the computing type
        if not any(isinstance(a, Value) and k not in kept for k, a in enumerate(args)):
            args = [body.constant(a, dtype or out.dtype) if isinstance(a, (int, float)) else a for a in args]
        value = formula(body, *args, **kwargs)
        body.store(out, body.point, value)
        call.emit(body)

    def _computing_type(self, call: Call, out: Tensor, promote: str) -> str | None:
        if promote == "none":
            return None
        if promote == "operands":
            fakes: list[Any] = [a.meta["val"] if isinstance(a, fx.Node) else a for a in call.node.args]
            joined = fakes[0].dtype if len(fakes) == 1 else torch.result_type(*fakes[:2])
            return compute_type(FROM_TORCH[joined])
        # in place, the computation is in the promoted type, then rounded into the operand
        value = call.node.meta["val"]
        return compute_type(FROM_TORCH[value.dtype])

    def _extern(self, call: Call, reason: str) -> None:
        node, value = call.node, call.node.meta["val"]
        args = tuple(self._operand(a) for a in node.args)
        kwargs = tuple((k, self._operand(v)) for k, v in node.kwargs.items())
        written = tuple(dict.fromkeys(self.of_node[n] for n in written_operands(node)))
        outputs: tuple[str | None, ...]
        if isinstance(value, torch.Tensor):
            outputs = (self._extern_output(node, value),)
        elif isinstance(value, (tuple, list)):
            items = {n.args[1]: n for n in node.users if n.target is operator.getitem}
            outputs = tuple(self._extern_output(items[k], value[k]) if k in items else None for k in range(len(value)))
        elif value is None:
            outputs = ()
        else:
            raise CaptureError(f"{call.op} returns {type(value).__name__}", where=call.origin.source, why="only tensors cross a program")
        step = Extern(self.step_name(node.name), str(call.op), args, outputs, kwargs, written, reason, effect_of(call.op), (call.origin,))
        self.steps.append(step)

    def _extern_output(self, node: fx.Node, fake: torch.Tensor) -> str | None:
        if _storage(fake) in self.root_of_storage:  # the operand itself, written in place
            self.of_node[node] = self.alias(node, fake)
            return None
        return self.result(node).name

    def _operand(self, value: Any) -> Operand:
        if isinstance(value, fx.Node):
            return Ref(self.of_node[value])
        if isinstance(value, torch.SymInt):
            return self.index(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._operand(v) for v in value)
        return plain_operand(value)


def plain_operand(value: Any) -> Operand:
    """An operand that holds no tensor and no size, for an extern.  CaptureError for one that has no place there."""
    if isinstance(value, torch.dtype):
        return TypeArg("dtype", FROM_TORCH.get(value) or str(value).removeprefix("torch."))
    for kind, cls in (("device", torch.device), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        if isinstance(value, cls):
            return TypeArg(kind, str(value).removeprefix("torch."))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CaptureError(f"an operand of type {type(value).__name__} cannot be carried by an extern")


def _storage(fake: torch.Tensor) -> int:
    return fake.untyped_storage()._cdata


@dataclass(frozen=True, slots=True)
class Lowered:
    """`results`: what the graph returns, in order: a buffer's name, an Index, or a plain value.  A buffer that a call made has the
    name of its node; `symbols`: the shape environment's name of each symbol to the program's."""

    program: Program
    results: list[object]
    symbols: dict[str, str]


def lower(
    graph: fx.Graph,
    name: str,
    roles: Mapping[str, str],
    refused: Mapping[str, str] | None = None,
    symbols: Mapping[str, str] | None = None,
) -> Lowered:
    """The Program of a normalised graph.

    `roles` gives input, weight, state or constant by placeholder (default input).  An input that some step writes
    becomes a state.  `refused`: operators that must stay externs, with the reason.  `symbols`: names for some of the shape
    environment's symbols; the others become s0, s1, … in order of appearance.  Raises CaptureError for what a program cannot carry at all.
    """
    lowering = Lowering(name, refused, symbols)
    results: list[object] = []
    for node in graph.nodes:
        try:
            if node.op == "placeholder":
                _declare_input(lowering, node, roles.get(str(node.target), "input"))
            elif node.op == "call_function":
                lowering.lower_call(node)
            elif node.op == "output":
                results = [_result(lowering, v) for v in node.args[0]]
        except NotLowered as refusal:  # not even an extern's operand or result
            raise CaptureError(f"no program carries this graph: {refusal}", where=str(node.target)) from refusal
    return Lowered(_finish(lowering, results), results, lowering.sizes.names)


def _declare_input(lowering: Lowering, node: fx.Node, role: str) -> None:
    value, name = node.meta["val"], str(node.target)
    if isinstance(value, torch.Tensor):
        twin = lowering.root_of_storage.get(_storage(value))
        lowering.of_node[node] = lowering.add_buffer(name, value, role)
        if twin is not None:
            lowering.shared_inputs |= {twin, name}
        # a symbol is known from the first dimension (else stride) that is exactly it
        for kind, sizes in (("dim", value.shape), ("stride", value.stride())):
            for k, size in enumerate(sizes):
                if isinstance(size, torch.SymInt):
                    lowering.sizes.declare(size, (kind, name, k))
    elif isinstance(value, torch.SymInt):
        lowering.buffers[name] = Buffer(name, "i64", (), "scalar")
        lowering.sizes.declare(value, ("scalar", name))
    else:
        lowering.buffers[name] = Buffer(name, "i64", (), "opaque")
        lowering.of_node[node] = name


def _result(lowering: Lowering, value: Any) -> object:
    if isinstance(value, fx.Node):
        return lowering.of_node[value]
    return lowering.index(value) if isinstance(value, torch.SymInt) else value


def _finish(lowering: Lowering, results: Sequence[object]) -> Program:
    lowering.steps = without_allocations(lowering.steps, lowering._root)
    written = {lowering._root(n) for s in lowering.steps for n in s.writes}
    if written & lowering.shared_inputs:
        raise CaptureError(f"the input '{min(written & lowering.shared_inputs)}' is written and shares memory with another input")
    buffers = []
    for b in lowering.buffers.values():
        root = lowering.buffers[lowering._root(b.name)]
        role = "state" if root.name in written and root.role == "input" else root.role
        buffers.append(b if b.role == role else Buffer(b.name, b.dtype, b.shape, role, b.strides, b.alias_of))
    outputs = tuple(dict.fromkeys(r for r in results if isinstance(r, str) and r in lowering.buffers))
    missing = sorted(_free_symbols(lowering) - set(lowering.sizes.declared))
    if missing:
        raise CaptureError(f"symbols {', '.join(missing)} have no source among the inputs", where=lowering.name)
    return Program(lowering.name, tuple(lowering.sizes.declared.values()), tuple(buffers), tuple(lowering.steps), outputs)


def _free_symbols(lowering: Lowering) -> set[str]:
    known = set(lowering.sizes.names.values())
    return {n for b in lowering.buffers.values() for i in (*b.shape, *b.layout) for n in i.names() if n in known}

