"""vLLM's single operators as formulas with a key each, and the kernels that answer for them, whichever door asks.

A formula rounds where vLLM's own `forward_native` rounds.  The key says operator, numbers, element types and widths; the number of rows
is free.  A known key needs no trace and no compiler; a missing one is recorded and built, or refused, as the settings say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flagtree.artifact.files import sha256
from flagtree.serve.agreement import facts_of, settings_of
from flagtree.serve.callee import Eager, ServedGraph
from flagtree.serve.configuration import resolved
from flagtree.serve.counts import COUNTS
from flagtree.serve.metrics import publish
from flagtree.serve.server import FormulaCall, Server

Tensor = torch.Tensor
FORMULAS_VERSION = 1  # raised when a formula changes what it computes


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """vllm/ir/ops/layernorm.py, rms_norm: the norm is rounded before its weight."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    if weight is not None:
        wide = wide.to(weight.dtype) * weight
    return wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """vllm/ir/ops/layernorm.py, fused_add_rms_norm: the sum is taken in f32, rounded once for the residual, not for the norm."""
    wide = x.to(torch.float32) + residual.to(torch.float32)
    total = wide.to(x.dtype)
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    if weight is not None:
        wide = wide.to(weight.dtype) * weight
    return wide.to(x.dtype), total


def silu_and_mul(x: Tensor) -> Tensor:
    """vllm/model_executor/layers/activation.py, SiluAndMul."""
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]) * x[..., half:]


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """vllm/model_executor/layers/activation.py, GeluAndMul."""
    half = x.shape[-1] // 2
    return torch.nn.functional.gelu(x[..., :half], approximate=approximate) * x[..., half:]


def rotary(positions: Tensor, x: Tensor, table: Tensor, head_size: int, rotary_size: int, halves: bool) -> Tensor:
    """vllm/model_executor/layers/rotary_embedding, RotaryEmbedding.forward_static for one of query and key: x is [tokens, heads x
    head_size], `table` [positions, rotary_size] holds cosines, then sines; `halves` pairs the first half with the second."""
    cos, sin = table.index_select(0, positions).to(x.dtype).unsqueeze(-2).chunk(2, dim=-1)
    heads = x.view(x.shape[0], -1, head_size)
    turned, rest = heads[..., :rotary_size], heads[..., rotary_size:]
    a, b = torch.chunk(turned, 2, dim=-1) if halves else (turned[..., ::2], turned[..., 1::2])
    c, d = a * cos - b * sin, b * cos + a * sin
    turned = torch.cat((c, d), dim=-1) if halves else torch.stack((c, d), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1).reshape(x.shape)


FORMULAS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (rms_norm, add_rms_norm, silu_and_mul, gelu_and_mul, rotary)}


class Operators:
    """The kernels of one server's single operators."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.device = dict(server.facts).get("device") or "cpu"  # the kind of torch's device that the server computes on
        self._known: dict[tuple, ServedGraph | Eager] = {}

    def __call__(self, name: str, rows: Sequence[Tensor], fixed: Sequence[Tensor | None] = (), numbers: Sequence[Any] = ()) -> tuple:
        """Results of the formula `name` on `rows` (tensors whose first dimension is the tokens), `fixed` (weights and tables) and
        `numbers`, in the order of the formula's parameters.  MissingGraph in a strict mode when no bundle has the kernel."""
        rows = [_dense_inside(x) for x in rows]
        key = (name, *numbers, *(_row_spec(x) for x in rows), *(_fixed_spec(x) for x in fixed))
        kernel = self._known.get(key)
        if kernel is None:
            kernel = self._known[key] = self._find(name, rows, fixed, numbers)
        return kernel(*rows, *(x for x in fixed if x is not None))

    def _find(self, name: str, rows: Sequence[Tensor], fixed: Sequence[Tensor | None], numbers: Sequence[Any]) -> ServedGraph | Eager:
        text = key_text(name, rows, fixed, numbers)
        call = FormulaCall(FORMULAS[name], text, tuple(rows), tuple(map(_is_dense, rows)), tuple(fixed), tuple(numbers))
        return self.server.operator(sha256(text.encode()), call)


def operators_of(config: Any, door: str) -> Operators | None:
    """The kernels for vLLM's configuration, None where its settings do not ask for them.  Raises what is wrong with settings or bundle."""
    settings = settings_of(config)
    if not settings.custom_ops:
        return None
    bundle = "" if settings.bundle is None else str(resolved(settings.bundle))
    named = _IN_A_NAME.search(str(getattr(config.compilation_config, "backend", "")))  # a whole graph's name says it as well
    digest = settings.digest or (named.group(1) if named is not None else "")
    operators = _shared(Server(settings, facts_of(config), bundle=bundle, digest=digest))
    COUNTS.took_over(door, f"norms, gated activations and rotary from {bundle or 'the store'}, strict '{settings.strict}'")
    return operators


_IN_A_NAME = re.compile(r"\.d_([0-9a-f]{64})\Z")


@functools.cache
def _shared(server: Server) -> Operators:
    server.open()
    return Operators(server)


def key_text(name: str, rows: Sequence[Tensor], fixed: Sequence[Tensor | None], numbers: Sequence[Any]) -> str:
    """The canonical text of an operator's graph: what its kernel depends on, a line a fact."""
    lines = [f"operator {name} {FORMULAS_VERSION}", *(f"number {n!r}" for n in numbers)]
    lines += [f"rows {_row_spec(x)}" for x in rows] + [f"fixed {_fixed_spec(x)}" for x in fixed]
    return "\n".join(lines) + "\n"


def _inner(x: Tensor) -> int:
    return x[0].numel() if x.shape[0] else max(1, x.numel())


def _is_dense(x: Tensor) -> bool:
    return x.dim() == 1 or x.shape[0] <= 1 or x.stride(0) == _inner(x)


def _dense_inside(x: Tensor) -> Tensor:
    """A row of a wider row, such as the queries within merged projections, is taken as it lies; anything else is copied."""
    wanted = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:])):
        if size != 1 and stride != wanted:
            return x.contiguous()
        wanted *= size
    return x


def _row_spec(x: Tensor) -> str:
    return f"{x.dtype}{list(x.shape[1:])}{'' if _is_dense(x) else ' within wider rows'}"


def _fixed_spec(x: Tensor | None) -> str:
    return "none" if x is None else f"{x.dtype}{list(x.shape)}"


def count_replaced(name: str) -> None:
    """One more instance of a vLLM operator answers with our kernels."""
    COUNTS.operators[name] = COUNTS.operators.get(name, 0) + 1
    publish()
