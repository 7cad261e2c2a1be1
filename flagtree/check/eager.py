"""The eager computation of one fused kernel: the kernel's calls of the captured graph, written as a recipe (check/recipe.py).

Needed calls are found backwards from what the kernel stores and cut at what it reads, then kept in the graph's order over real memory, so
views and in-place calls mean what they mean in PyTorch.  A kernel without such a counterpart raises NoEager, never something else.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from flagtree.check.experts_eager import activation_of, product_recipe
from flagtree.check.recipe import FORMAT, NoEager, no_eager
from flagtree.codegen import launch
from flagtree.ir import attention, experts
from flagtree.ir.canonical import Isolated
from flagtree.ir.evaluate import IR_NAMES
from flagtree.ir.gemm import PRODUCT, is_product
from flagtree.ir.index import Index
from flagtree.ir.program import Kernel, Program
from flagtree.lower.builder import NotLowered
from flagtree.lower.lowering import plain_operand
from flagtree.lower.sizes import Sizes

_ATTENTION_ROWS = {3: 1, 4: 2}  # flagtree.attention: position of each cache to that of its new rows; start is operand 5


def recipe_of(
    graph: fx.Graph, program: Program, kernel: Kernel, buffers: Mapping[str, str], symbols: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, Any]:
    """The recipe of `kernel`, a kernel of `program` after any passes; `graph`: the normalised graph that `program` was lowered from.

    `buffers` and `symbols`: the program's names to those that the recipe uses; a buffer that is none of them is not given.  `renamed`:
    the shape environment's names to the program's symbols (`Lowered.symbols`).  Raises NoEager.
    """
    return _Writer(graph, program, kernel, buffers, symbols, renamed).recipe()


def eager_of(graph: fx.Graph, program: Program, kernel: Kernel, isolated: Isolated, renamed: Mapping[str, str]) -> dict[str, Any]:
    """`recipe_of` over the isolated kernel's names b0… and n0…"""
    if is_product(isolated.program):  # a template: its kernel has the names of the isolated form only
        return _call_recipe(isolated.program, PRODUCT, tuple({"buffer": b.name} for b in isolated.program.buffers[:-1]))
    if (known := experts.known(isolated.program, isolated.kernel)) is not None:
        return product_recipe(isolated.program, known, activation_of(graph, kernel) if known.product.parts == 2 else "")
    if (form := attention.form_of(isolated.program)) is not None:
        if form.kind == attention.FULL and (form.causal or form.mask):
            return _sdpa_recipe(isolated.program, form)
        return _call_recipe(isolated.program, *_attention_call(isolated.program, form))
    buffers = {name: f"b{i}" for i, name in enumerate(isolated.buffers)}
    symbols = {str(name): f"n{i}" for i, name in enumerate(isolated.symbols)}
    return recipe_of(graph, program, kernel, buffers, symbols, renamed)


def _call_recipe(program: Program, callee: str, args: tuple[object, ...]) -> dict[str, Any]:
    """One call that computes the whole kernel: the last buffer from the others."""
    views = {
        b.name: {"storage": b.name, "dtype": b.dtype, "shape": [n.to_json() for n in b.shape], "strides": [n.to_json() for n in b.layout],
                 "offset": 0} for b in program.buffers
    }  # fmt: skip
    *given, out = (b.name for b in program.buffers)
    call = {"extern": callee, "args": list(args), "kwargs": {}, "outputs": [out]}
    return {"format": FORMAT, "views": views, "given": [[n, n] for n in given], "steps": [call], "results": {out: out}}


def _sdpa_recipe(program: Program, form: attention.Form) -> dict[str, Any]:
    """PyTorch's own call, whose result has heads before tokens."""
    q, k, v, *mask, out = attention.operands(program, form)
    tensors = tuple({"buffer": b.name} for b in (q, k, v))
    recipe = _call_recipe(program, attention.SDPA, (*tensors, {"buffer": mask[0].name} if mask else None, 0.0, form.causal))
    by_head = dict(recipe["views"][out.name])
    by_head |= {key: [by_head[key][d] for d in (0, 2, 1, 3)] for key in ("shape", "strides")}
    recipe["views"]["by_head"] = by_head
    recipe["steps"][0] |= {"kwargs": {"scale": form.scale, "enable_gqa": attention.group_of(q, k) > 1}, "outputs": ["by_head"]}
    return recipe


def _attention_call(program: Program, form: attention.Form) -> tuple[str, tuple[object, ...]]:
    """The operator whose form it is, with its operands."""
    callee = next(name for name, kind in attention.OPERATORS.items() if kind == form.kind)
    *given, _ = attention.operands(program, form)
    tensors: list[object] = [{"buffer": b.name} for b in given]
    further = {attention.CACHED: (form.window,), attention.FULL: (), attention.PACKED: (form.causal,)}[form.kind]
    return callee, (*tensors, *([None] if form.operands == 3 else []), form.scale, *further)


class _Writer:
    """One recipe.  Memory is one storage a root; every tensor node of a known storage is a view of it."""

    def __init__(self, graph: fx.Graph, program: Program, kernel: Kernel, buffers: Mapping[str, str],
                 symbols: Mapping[str, str], renamed: Mapping[str, str]) -> None:  # fmt: skip
        self.program, self.kernel, self.buffers = program, kernel, buffers
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
        self.views: dict[str, dict[str, object]] = {}
        self.steps: list[dict[str, object]] = []

    def _stored(self) -> dict[str, int]:
        """Stored buffer -> its storage; what one lowering rule keeps to itself has no call that makes it."""
        out = {b: self.storage_of[self.program.root(b)] for b in self.kernel.writes if self.program.root(b) in self.storage_of}
        if not out:
            raise self.nothing(f"'{self.kernel.writes[0]}' is internal to one operator" if self.kernel.writes else "it stores nothing")
        return out

    def nothing(self, why: str) -> NoEager:
        return no_eager(why, f"kernel {self.kernel.name}")

    def recipe(self) -> dict[str, Any]:
        self.given = self._given()
        needed = self._needed()
        given = [pair for storage in self.base if storage in self.given for pair in self._places(storage)]
        for node in self.nodes:
            if node in needed and _is_attention(node):
                self._write_rows(node)
            elif node in needed and node.target is not operator.getitem:
                self._step(node, needed)
        results = {self.buffers[b]: self._buffer_view(b, s) for b, s in self.stored.items() if b in self.buffers}
        return {"format": FORMAT, "views": self.views, "given": given, "steps": self.steps, "results": results}

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
    def _places(self, storage: int) -> list[list[str]]:
        """The given contents of a storage: each buffer of it that the recipe is given, with its view."""
        root = _buffer_name(self.base[storage])
        found = [b for b in self.buffers if self.program.root(b) == root]
        if not found:
            raise self.nothing(f"'{root}' is not given")
        self._node_view(self.base[storage])
        return [[self.buffers[b], self._buffer_view(b, storage)] for b in found]

    def _view(self, storage: int, dtype: str, shape: list[object], strides: list[object], offset: object) -> str:
        """The name of a view; equal views are one."""
        view = {"storage": f"s{storage_number(self.base, storage)}", "dtype": dtype, "shape": shape, "strides": strides, "offset": offset}
        known = next((name for name, other in self.views.items() if other == view), None)
        if known is None:
            known = f"v{len(self.views)}"
            self.views[known] = view
        return known

    def _node_view(self, node: fx.Node) -> str:
        fake = node.meta["val"]
        shape, strides = [self._json(n) for n in fake.shape], [self._json(n) for n in fake.stride()]
        return self._view(_storage(node), IR_NAMES[fake.dtype], shape, strides, self._json(fake.storage_offset()))

    def _buffer_view(self, name: str, storage: int) -> str:
        """A buffer's place in its root's storage, following aliases."""
        buffer = self.program.buffer(name)
        dtype, shape, strides = buffer.dtype, [self._renamed(e) for e in buffer.shape], [self._renamed(e) for e in buffer.layout]
        offset = self._index(self.base[storage].meta["val"].storage_offset())
        while buffer.alias_of is not None:
            offset = offset + buffer.alias_of.offset
            buffer = self.program.buffer(buffer.alias_of.base)
        return self._view(storage, dtype, shape, strides, self._renamed(offset))

    def _renamed(self, index: Index) -> object:
        """An index over the program's symbols as JSON over the recipe's."""
        missing = sorted(index.names() - self.symbols.keys())
        if missing:
            raise self.nothing(f"the size '{missing[0]}' is none of the kernel's")
        return index.rename(dict(self.symbols)).to_json()

    def _index(self, value: Any) -> Index:
        """A size of the trace."""
        try:
            return self.sizes.stride(value) if isinstance(value, torch.SymInt) else Index.of(int(value))
        except NotLowered as error:
            raise self.nothing(str(error)) from error

    def _json(self, value: Any) -> object:
        return self._renamed(self._index(value))

    # -- calls -------------------------------------------------------------------------------------------------------
    def _step(self, node: fx.Node, needed: set[fx.Node]) -> None:
        """A call; what it makes becomes memory in the strides that the trace saw."""
        if isinstance(node.meta.get("val"), (tuple, list)):
            items = {n.args[1]: n for n in node.users if n.target is operator.getitem and n in needed}
            made = [items.get(k) for k in range(len(node.meta["val"]))]
        else:
            made = [node]
        outputs = [self._node_view(n) if n is not None and self.base.get(_storage(n)) is n else None for n in made]
        args, kwargs = [self._operand(a) for a in node.args], {k: self._operand(v) for k, v in sorted(node.kwargs.items())}
        self.steps.append({"extern": str(node.target), "args": args, "kwargs": kwargs, "outputs": outputs})

    def _operand(self, value: Any) -> object:
        if isinstance(value, fx.Node):
            if not _is_tensor(value):
                raise self.nothing(f"it needs the results of {value.target} together")
            return {"buffer": self._node_view(value)}
        if isinstance(value, torch.SymInt):
            return {"index": self._json(value)}
        if isinstance(value, (list, tuple)):
            return {"list": [self._operand(v) for v in value]}
        return launch.operand(plain_operand(torch.device("cpu") if isinstance(value, torch.device) else value))

    def _write_rows(self, node: fx.Node) -> None:
        """flagtree.attention's first half, as indexing: cache row start[b] + t of sequence b is the new row t, for every head."""
        start = node.args[5]
        assert isinstance(start, fx.Node)
        for cache_position, rows_position in self._caches(node).items():
            cache, rows = node.args[cache_position], node.args[rows_position]
            assert isinstance(cache, fx.Node) and isinstance(rows, fx.Node)
            batch, heads, tokens = (self._json(n) for n in rows.meta["val"].shape[:3])
            places = [self._positions(f"{node.name}.{rows_position}.{k}", count, k) for k, count in enumerate((batch, heads, tokens))]
            stride, offset = self._json(start.meta["val"].stride(0)), self._json(start.meta["val"].storage_offset())
            first = self._view(_storage(start), "i64", [batch, 1, 1], [stride, 0, 0], offset)
            row = self._own_view(f"{node.name}.{rows_position}.row", [batch, 1, tokens], [tokens, 0, 1])
            self._call("aten.add.Tensor", [{"buffer": first}, {"buffer": places[2]}], row)
            where = {"list": [{"buffer": places[0]}, {"buffer": places[1]}, {"buffer": row}]}
            self._call("aten.index_put_.default", [{"buffer": self._node_view(cache)}, where, {"buffer": self._node_view(rows)}], None)

    def _positions(self, storage: str, count: object, dimension: int) -> str:
        """0, 1, …, count - 1 along one dimension of three."""
        plain = self._own_view(storage, [count], [1])
        self._call("aten.arange.default", [{"index": count}], plain)
        shape: list[object] = [1, 1, 1]
        strides: list[object] = [0, 0, 0]
        shape[dimension], strides[dimension] = count, 1
        return self._own_view(storage, shape, strides)

    def _own_view(self, storage: str, shape: list[object], strides: list[object]) -> str:
        name = f"v{len(self.views)}"
        self.views[name] = {"storage": storage, "dtype": "i64", "shape": shape, "strides": strides, "offset": 0}
        return name

    def _call(self, callee: str, args: list[object], output: str | None) -> None:
        self.steps.append({"extern": callee, "args": args, "kwargs": {}, "outputs": [output]})


def storage_number(base: Mapping[int, fx.Node], storage: int) -> int:
    """A storage's place in the graph: the same in every process, which its address is not."""
    return list(base).index(storage)


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
