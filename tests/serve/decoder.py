"""A decoder written as a server writes one: merged projections, norms rounded before their weight, the residual added in f32 and rounded
once, rotary from a table, and opaque operators for the cache update and attention that find their layer by an object.

The operators stand for a server's own: they keep a cache that no operand is.  Guards are dropped after one trace, as a server does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase

HEADS, KV_HEADS, HEAD, WIDTH, MIDDLE, VOCABULARY = 4, 2, 8, 64, 64, 64
CACHES: dict[str, list[torch.Tensor]] = {}
PACKED: dict[int, torch.Tensor] = {}


class LayerName(OpaqueBase):
    """A layer's name as an object that a graph takes as an argument."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerName) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        return f"LayerName({self.value!r})", {"LayerName": LayerName}


register_opaque_type(LayerName, typ="value", hoist=True)
_LIBRARIES = [torch.library.Library(name, "FRAGMENT") for name in ("toyserver", "_C")]
_NAME = f"{LayerName.__module__}.{LayerName.__qualname__}"


def _update(key: torch.Tensor, value: torch.Tensor, layer: LayerName) -> torch.Tensor:
    CACHES.setdefault(layer.value, []).append(torch.cat((key, value), -1).clone())
    return key.new_empty(0)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, layer: LayerName, after: torch.Tensor
) -> None:
    cached = CACHES[layer.value][-1]
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for t in cached.split(HEAD, -1))
    q = query.transpose(0, 1)
    output.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))


def _packed_product(c: torch.Tensor, a: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor) -> None:
    c.copy_(nn.functional.linear(a, PACKED[int(handle)], bias))


def _tiled_product(out: torch.Tensor, a: torch.Tensor, tiles: torch.Tensor, bias: torch.Tensor | None, tiled: bool) -> None:
    out.copy_(nn.functional.linear(a, tiles.flip(0).to(a.dtype), None if bias is None else bias.to(a.dtype)))


def _allreduce(handle: int, data: torch.Tensor) -> None:
    data.mul_(handle)  # no sum, but what the handle is decides the result


def _define() -> None:
    ours, theirs = _LIBRARIES
    ours.define(f"update(Tensor key, Tensor value, {_NAME} layer) -> Tensor")
    ours.define(f"attend(Tensor q, Tensor k, Tensor v, Tensor(a!) output, {_NAME} layer, Tensor after) -> ()")
    ours.impl("update", _update, "CPU")
    ours.impl("attend", _attend, "CPU")
    torch.library.register_fake("toyserver::update", lambda key, value, layer: key.new_empty(0), lib=ours)
    torch.library.register_fake("toyserver::attend", lambda q, k, v, output, layer, after: None, lib=ours)
    ours.define("told(Tensor x, int tp_rank, int tp_world) -> Tensor")
    ours.impl("told", lambda x, tp_rank, tp_world: x * (1 + (tp_rank + 1) / tp_world), "CPU")
    torch.library.register_fake("toyserver::told", lambda x, tp_rank, tp_world: torch.empty_like(x), lib=ours)
    # the operators of a server's own library that are rewritten before the key is taken
    theirs.define("onednn_mm(Tensor(a!) c, Tensor a, Tensor? bias, Tensor handler_tensor) -> ()")
    theirs.impl("onednn_mm", _packed_product, "CPU")
    torch.library.register_fake("_C::onednn_mm", lambda c, a, bias, handler_tensor: None, lib=theirs)
    theirs.define("weight_packed_linear(Tensor(a!) out, Tensor a, Tensor tiles, Tensor? bias, bool tiled) -> ()")
    theirs.impl("weight_packed_linear", _tiled_product, "CPU")
    torch.library.register_fake("_C::weight_packed_linear", lambda out, a, tiles, bias, tiled: None, lib=theirs)
    theirs.define("shm_allreduce(int handle, Tensor(a!) data) -> ()")
    theirs.impl("shm_allreduce", _allreduce, "CPU")
    torch.library.register_fake("_C::shm_allreduce", lambda handle, data: None, lib=theirs)


_define()


class Linear(nn.Module):
    """A linear layer; packed, it keeps the weight behind a handle, or in tiles and its bias in a wider type, as a server on a CPU does."""

    def __init__(self, inputs: int, outputs: int, packed: str, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.2, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outputs), requires_grad=False) if bias else None
        if bias and packed == "tiles":
            self.bias = nn.Parameter(self.bias.double(), requires_grad=False)
        self.outputs, self.packed = outputs, packed
        if packed == "tiles":
            self.tiles = self.weight.detach().flip(0).double()
        if packed == "handle":
            self.handle = torch.tensor(id(self))
            PACKED[id(self)] = self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            return nn.functional.linear(x, self.weight, self.bias)
        out = torch.empty((*x.shape[0:-1], self.outputs), dtype=x.dtype)
        if self.packed == "tiles":
            torch.ops._C.weight_packed_linear(out.reshape(-1, self.outputs), x.reshape(-1, x.shape[-1]), self.tiles, self.bias, True)
        else:
            torch.ops._C.onednn_mm(out, x.reshape(-1, x.shape[-1]), self.bias, self.handle)
        return out


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        kind = x.dtype
        wide = x.to(torch.float32)
        if residual is not None:
            wide = wide + residual.to(torch.float32)
            residual = wide.to(kind)
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        out = (wide.to(self.weight.dtype) * self.weight.data).to(kind)
        return out if residual is None else (out, residual)


class Layer(nn.Module):
    def __init__(self, number: int, packed: str, prefix: str) -> None:
        super().__init__()
        self.name = LayerName(f"{prefix}.{number}")
        self.qkv, self.o = Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD, packed, bias=True), Linear(HEADS * HEAD, WIDTH, packed)
        self.gate_up, self.down = Linear(WIDTH, 2 * MIDDLE, packed), Linear(MIDDLE, WIDTH, packed)
        self.before, self.after, self.q_norm, self.k_norm = Norm(WIDTH), Norm(WIDTH), Norm(HEAD), Norm(HEAD)
        self.register_buffer("table", torch.randn(128, HEAD))

    def turn(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cos, sin = (t.unsqueeze(-2) for t in self.table.index_select(0, positions).chunk(2, dim=-1))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = (self.before(hidden), hidden) if residual is None else self.before(hidden, residual)
        q, k, v = self.qkv(normed).split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], dim=-1)
        q = self.turn(positions, self.q_norm(q.view(-1, HEADS, HEAD)))
        k = self.turn(positions, self.k_norm(k.view(-1, KV_HEADS, HEAD)))
        v = v.view(-1, KV_HEADS, HEAD)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        after = torch.ops.toyserver.update(k, v, self.name)
        torch.ops.toyserver.attend(q, k, v, out, self.name, after)
        hidden, residual = self.after(self.o(out.view(-1, HEADS * HEAD)), residual)
        gate_up = self.gate_up(hidden)
        return self.down(nn.functional.silu(gate_up[..., :MIDDLE]) * gate_up[..., MIDDLE:]), residual


class Decoder(nn.Module):
    """`rank`: this one's part of a vocabulary that two share; its sum over both is a call with a handle of the process, and each layer
    ends with an operator that is told the rank."""

    def __init__(
        self, layers: int = 2, packed: str = "", rank: int | None = None, prefix: str = "model.layers", handle: int = 1
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.layers = nn.ModuleList(Layer(i, packed, prefix) for i in range(layers))
        self.norm = Norm(WIDTH)
        self.rank, self.handle = rank, handle

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        if self.rank is None:
            return nn.functional.embedding(ids.long(), self.embedding)
        first, last = self.rank * VOCABULARY // 2, (self.rank + 1) * VOCABULARY // 2
        mine = (ids >= first) & (ids < last)
        rows = nn.functional.embedding((ids - first).long() * mine, self.embedding[: VOCABULARY // 2])
        rows = rows * mine.unsqueeze(-1)
        torch.ops._C.shm_allreduce(self.handle, rows)
        return rows

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.embed(ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
            if self.rank is not None:
                hidden = torch.ops.toyserver.told(hidden, self.rank, 2)
        return self.norm(hidden, residual)[0]


def step(tokens: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions of one step of a server."""
    ids = (torch.arange(tokens, dtype=torch.int32) * 7 + 3) % VOCABULARY
    return ids, torch.arange(first, first + tokens)


def served(model: nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """`model` as a server runs it: traced once with a free number of tokens, all guards dropped."""
    torch._dynamo.reset()
    unguarded = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False, options=unguarded)
    ids, positions = step(6)
    for tensor in (ids, positions):
        torch._dynamo.mark_dynamic(tensor, 0)
    with torch.inference_mode():
        compiled(ids, positions)
    return compiled


def graph_of(model: nn.Module) -> fx.GraphModule:
    """The graph that the server hands to its compiler."""
    found: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, inputs: list, **options: object) -> Callable[..., Any]:
        found.append(module)
        return module.forward

    served(model, keep)
    return found[0]
