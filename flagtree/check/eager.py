"""What PyTorch itself computes for the outputs of one fused kernel: the kernel's calls of the captured graph, executed eagerly.

Needed calls are found backwards from what the kernel stores and cut at what it reads, then run in the graph's order on real memory, so
views and in-place calls mean what they mean in PyTorch.  A kernel without such a counterpart raises NoEager, never something else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from flagtree.errors import FlagtreeError
from flagtree.ir.canonical import Isolated
from flagtree.ir.gemm import is_product
from flagtree.ir.index import Index
from flagtree.ir.program import Kernel, Program
from flagtree.lower.builder import NotLowered
from flagtree.lower.sizes import Sizes
from flagtree.runtime import operators as operators  # registers torch.ops.flagtree.*

Tensor = torch.Tensor
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
_ATTENTION_ROWS = {3: 1, 4: 2}  # flagtree.attention: position of each cache to that of its new rows; start is operand 5


class NoEager(FlagtreeError):
    """A kernel that no part of the captured graph computes on the kernel's own inputs; `why` says what is missing."""


def eager_outputs(
    graph: fx.Graph, program: Program, kernel: Kernel, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], renamed: Mapping[str, str]
) -> dict[str, Tensor]:
    """The contents, after the kernel, of each buffer that it stores, as PyTorch computes them.

    `graph`: the normalised graph that `program` was lowered from; `kernel`: a kernel of it after any passes.  `tensors`: contents before
    the kernel of its buffers, by name (not written to).  `symbols`: values of the program's symbols; `renamed`: the shape
    environment's names to them (`Lowered.symbols`).  Raises NoEager.
    """
    return _Replay(graph, program, kernel, tensors, symbols, renamed).run()


def eager_of(
    graph: fx.Graph, program: Program, kernel: Kernel, isolated: Isolated, renamed: Mapping[str, str]
) -> Callable[[Mapping[str, Tensor], Mapping[str, int]], dict[str, Tensor]]:
    """`eager_outputs` over the isolated kernel's names: (tensors b0…, values of n0…) to the stored ones by b-name."""
    if is_product(isolated.program):  # a template: its kernel reads the names of the isolated form
        return lambda tensors, symbols: {"b2": torch.nn.functional.linear(tensors["b0"], tensors["b1"])}
    canonical = {name: f"b{i}" for i, name in enumerate(isolated.buffers)}

    def run(tensors: Mapping[str, Tensor], symbols: Mapping[str, int]) -> dict[str, Tensor]:
        actual = {name: tensors[b] for name, b in canonical.items()}
        values = {str(name): symbols[f"n{i}"] for i, name in enumerate(isolated.symbols)}
        found = eager_outputs(graph, program, kernel, actual, values, renamed)
        return {canonical[name]: value for name, value in found.items() if name in canonical}

    return run


class _Replay:
    """One evaluation.  Memory is one flat tensor a storage; every tensor node of a known storage is a view of it."""

    def __init__(self, graph: fx.Graph, program: Program, kernel: Kernel, tensors: Mapping[str, Tensor],
                 symbols: Mapping[str, int], renamed: Mapping[str, str]) -> None:  # fmt: skip
        self.program, self.kernel, self.tensors = program, kernel, tensors
        self.symbols, self.sizes = symbols, Sizes(renamed)  # sizes that guards equate are spelled as lowering spelled them
        self.nodes = list(graph.nodes)
        self.position = {n: k for k, n in enumerate(self.nodes)}
        self.base: dict[int, fx.Node] = {}  # storage -> the node whose buffer it is
        self.writers: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            if _is_tensor(node):
                self.base.setdefault(_storage(node), node)
            for storage in _written(node):
                self.writers.setdefault(storage, []).append(node)
        self.storage_of = {_buffer_name(n): s for s, n in self.base.items()}
        self.stored = self._stored()
        self.memory: dict[int, Tensor] = {}
        self.tuples: dict[fx.Node, Any] = {}

    def _stored(self) -> dict[str, int]:
        """Stored buffer -> its storage; what one lowering rule keeps to itself has no call that makes it."""
        out = {b: self.storage_of[self.program.root(b)] for b in self.kernel.writes if self.program.root(b) in self.storage_of}
        if not out:
            raise self.nothing(f"'{self.kernel.writes[0]}' is internal to one operator" if self.kernel.writes else "it stores nothing")
        return out

    def nothing(self, why: str) -> NoEager:
        return NoEager("the kernel has no eager counterpart", where=f"kernel {self.kernel.name}", why=why)

    def run(self) -> dict[str, Tensor]:
        self.given = self._given()
        needed = self._needed()
        for storage in sorted(self.given):
            self._place(storage)
        with torch.no_grad():
            for node in self.nodes:
                if node in needed:
                    self._execute(node)
        return {b: self._view(s, self._buffer_geometry(b, s)).clone() for b, s in self.stored.items()}

    # -- what to run -------------------------------------------------------------------------------------------------
    def _is_member(self, node: fx.Node) -> bool:
        """Does the kernel compute this call?  Told by its origin and its operator."""
        return node.meta.get("origin") in self.kernel.origins and str(node.target) in self.kernel.ops

    def _members(self, storage: int) -> list[fx.Node]:
        return [n for n in self.writers.get(storage, ()) if self._is_member(n)]

    def _given(self) -> set[int]:
        """Storages whose contents before the kernel matter: what it reads, and what it changes without making it."""
        read = {self.program.root(b) for b in (*self.kernel.reads, *(s.access.buffer for s in self.kernel.stores if s.mode != "set"))}
        given = {self.storage_of[r] for r in read if r in self.storage_of}
        for storage in self.stored.values():
            node = self.base[storage]
            if node.op == "placeholder" or (self._members(storage) and not self._is_member(node)):
                given.add(storage)
        return given

    def _needed(self) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        work: list[fx.Node] = []
        for buffer, storage in self.stored.items():
            members = self._members(storage)
            if storage in self.given and not members:
                raise self.nothing(f"no call of the captured graph that it computes writes '{buffer}'")
            work += members if storage in self.given else [self.base[storage], *members]
        while work:
            node = work.pop()
            if node in needed:
                continue
            needed.add(node)
            for operand in self._operands(node):
                if not _is_tensor(operand):
                    work.append(operand)  # a tuple that `getitem` takes apart
                    continue
                storage = _storage(operand)
                if storage not in self.given:
                    work.append(self.base[storage])
                local = storage not in self.given and storage not in self.stored.values()
                before = self.writers.get(storage, ()) if local else self._members(storage) if storage in self.stored.values() else ()
                work += [w for w in before if self.position[w] < self.position[node]]
        return needed

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        if node.op != "call_function":
            raise self.nothing(f"it needs '{_buffer_name(node)}', which the kernel does not read")
        if _is_attention(node):
            positions = [5, *(p for pair in self._caches(node).items() for p in pair)]
            return [n for p in positions if isinstance(n := node.args[p], fx.Node)]
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise self.nothing(f"{node.target} draws random numbers")
        return node.all_input_nodes

    def _caches(self, node: fx.Node) -> dict[int, int]:
        """The cache operands that this kernel writes, with their rows."""
        found = {c: r for c, r in _ATTENTION_ROWS.items() if _storage(node.args[c]) in self.stored.values()}
        if not found:
            raise self.nothing("it needs the result of an attention")
        return found

    # -- memory ------------------------------------------------------------------------------------------------------
    def _place(self, storage: int) -> None:
        """The given contents of a storage, in all the views that the kernel uses."""
        root = _buffer_name(self.base[storage])
        views = [b for b in self.tensors if self.program.root(b) == root]
        if not views:
            raise self.nothing(f"'{root}' is not given")
        geometries = [self._fake_geometry(self.base[storage]), *(self._buffer_geometry(b, storage) for b in views)]
        self.memory[storage] = torch.empty(max(_span(g) for g in geometries), dtype=self.tensors[views[0]].dtype)
        for buffer, geometry in zip(views, geometries[1:], strict=True):
            _fill(self._view(storage, geometry), self.tensors[buffer])
        for buffer, geometry in zip(views, geometries[1:], strict=True):
            if not torch.equal(torch.nan_to_num(self._view(storage, geometry)), torch.nan_to_num(self.tensors[buffer])):
                raise self.nothing(f"'{root}' is given through views that overlap")

    def _view(self, storage: int, geometry: Geometry) -> Tensor:
        return torch.as_strided(self.memory[storage], *geometry)

    def _fake_geometry(self, node: fx.Node) -> Geometry:
        fake = node.meta["val"]
        shape, strides = tuple(self._integer(n) for n in fake.shape), tuple(self._integer(n) for n in fake.stride())
        return shape, strides, self._integer(fake.storage_offset())

    def _buffer_geometry(self, name: str, storage: int) -> Geometry:
        """A buffer's place in its root's storage, following aliases."""
        buffer = self.program.buffer(name)
        shape, strides = tuple(self._index(e) for e in buffer.shape), tuple(self._index(e) for e in buffer.layout)
        offset = self._integer(self.base[storage].meta["val"].storage_offset())
        while buffer.alias_of is not None:
            offset += self._index(buffer.alias_of.offset)
            buffer = self.program.buffer(buffer.alias_of.base)
        return shape, strides, offset

    def _index(self, index: Index) -> int:
        missing = sorted(index.names() - self.symbols.keys())
        if missing:
            raise self.nothing(f"the size '{missing[0]}' is none of the kernel's")
        return index.evaluate(self.symbols)

    def _integer(self, value: Any) -> int:
        """A size of the trace at the given symbols."""
        if not isinstance(value, torch.SymInt):
            return int(value)
        try:
            return self._index(self.sizes.stride(value))
        except NotLowered as error:
            raise self.nothing(str(error)) from error

    # -- execution ---------------------------------------------------------------------------------------------------
    def _execute(self, node: fx.Node) -> None:
        if _is_attention(node):
            self._write_rows(node)
            return
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._argument)
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError) as error:
            raise self.nothing(f"eager refuses {node.target}: {str(error).splitlines()[0]}") from error
        if not isinstance(result, Tensor):
            self.tuples[node] = result
        elif self.base.get(_storage(node)) is node:
            self._adopt(node, result)

    def _adopt(self, node: fx.Node, result: Tensor) -> None:
        """A fresh result becomes memory in the strides that the trace saw."""
        geometry = self._fake_geometry(node)
        if tuple(result.shape) != geometry[0] or result.dtype != node.meta["val"].dtype:
            seen = f"{node.meta['val'].dtype} {list(geometry[0])}"
            raise self.nothing(f"{node.target} gives {result.dtype} {list(result.shape)} here, the trace saw {seen}")
        storage = _storage(node)
        self.memory[storage] = torch.empty(_span(geometry), dtype=result.dtype)
        _fill(self._view(storage, geometry), result)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._view(_storage(value), self._fake_geometry(value)) if _is_tensor(value) else self.tuples[value]
        if isinstance(value, torch.SymInt):
            return self._integer(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def _write_rows(self, node: fx.Node) -> None:
        """flagtree.attention's first half: cache row start[b] + t of sequence b is the new row t."""
        start = self._argument(node.args[5]).tolist()
        for cache_position, rows_position in self._caches(node).items():
            cache, rows = self._argument(node.args[cache_position]), self._argument(node.args[rows_position])
            for sequence, first in enumerate(start):
                cache[sequence, :, first : first + rows.shape[2]].copy_(rows[sequence])


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_attention(node: fx.Node) -> bool:
    return str(node.target) == "flagtree.attention.default"


def _storage(node: Any) -> int:
    return node.meta["val"].untyped_storage()._cdata


def _buffer_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else node.name


def _written(node: fx.Node) -> set[int]:
    """The storages that a call writes in place."""
    if node.op != "call_function" or node.target is operator.getitem or not node.target._schema.is_mutable:  # type: ignore[union-attr]
        return set()
    out = set()
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            out |= {_storage(n) for n in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(n, fx.Node)}
    return out


def _span(geometry: Geometry) -> int:
    shape, strides, offset = geometry
    return offset + (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0)


def _fill(place: Tensor, value: Tensor) -> None:
    """Copy into a view; along a dimension of stride 0 all elements are one."""
    for d, (size, stride) in enumerate(zip(place.shape, place.stride(), strict=True)):
        if size > 1 and stride == 0:
            place, value = place.narrow(d, 0, 1), value.narrow(d, 0, 1)
    place.copy_(value)
