"""A stand-in for the dispatcher of vllm-plugin-FL: the registry that it publishes and the way it chooses and goes on after an error.

Written from its README (github.com/flagos-ai/vllm-plugin-FL, vllm_fl/dispatch): kinds, priorities, `_is_available`, selection order by
kind, the highest priority first, and after an error the next implementation unless the policy is strict.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class BackendImplKind(enum.Enum):
    DEFAULT = "flagos"
    VENDOR = "vendor"
    REFERENCE = "reference"


class BackendPriority:
    DEFAULT, VENDOR, REFERENCE = 150, 100, 50


@dataclass(frozen=True)
class OpImpl:
    op_name: str
    impl_id: str
    kind: BackendImplKind
    fn: Callable[..., Any]
    vendor: str | None = None
    priority: int = 0

    def is_available(self) -> bool:
        ask = getattr(self.fn, "_is_available", None)
        return bool(ask()) if callable(ask) else True


class OpRegistry:
    def __init__(self) -> None:
        self.by_name: dict[str, dict[str, OpImpl]] = {}

    def register_impl(self, impl: OpImpl) -> None:
        if impl.impl_id in self.by_name.setdefault(impl.op_name, {}):
            raise ValueError(f"Duplicate impl_id '{impl.impl_id}' for op='{impl.op_name}'")
        self.by_name[impl.op_name][impl.impl_id] = impl

    def snapshot(self) -> SimpleNamespace:
        return SimpleNamespace(impls_by_op={name: list(known.values()) for name, known in self.by_name.items()})


@dataclass
class Manager:
    """`order`: kinds or `impl:NAME` for one operator; `strict`: an error is final; `used`: what answered the last call of each."""

    registry: OpRegistry = field(default_factory=OpRegistry)
    strict: bool = False
    order: dict[str, list[str]] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)

    def call(self, name: str, *args: Any) -> Any:
        available = [i for i in self.registry.snapshot().impls_by_op[name] if i.is_available() and (name, i.impl_id) not in self.failed]
        chosen = []
        for token in self.order.get(name, ["flagos", "vendor", "reference"]):
            matching = [i for i in available if token in (i.kind.value, f"impl:{i.impl_id}")]
            chosen += sorted(matching, key=lambda i: (i.priority, i.impl_id), reverse=True)
        for impl in chosen:
            try:
                result = impl.fn(*args)
            except Exception:
                if self.strict:
                    raise
                self.failed.add((name, impl.impl_id))
                continue
            self.used[name] = impl.impl_id
            return result
        raise RuntimeError(f"no implementation for {name}")


def rms_norm(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    total = x if residual is None else (x.double() + residual.double())
    normed = total.double() / (total.double().pow(2).mean(-1, keepdim=True) + layer.variance_epsilon).sqrt()
    out = (normed * layer.weight.double()).to(x.dtype)
    return out if residual is None else (out, total.to(x.dtype))


def silu_and_mul(layer: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = x.double().chunk(2, -1)
    return (a * torch.sigmoid(a) * b).to(x.dtype)


def gelu_and_mul(layer: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = x.double().chunk(2, -1)
    return (torch.nn.functional.gelu(a, approximate=layer.approximate) * b).to(x.dtype)


def rotary_embedding(layer: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
                     rotary_interleaved: bool = False, inplace: bool = True) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """By complex numbers: each pair turned by its angle."""
    turn = torch.complex(cos.double(), sin.double())[positions].unsqueeze(1)
    out = []
    for x in (q.double(), k.double()):
        pairs = x.unflatten(-1, (-1, 2)) if rotary_interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        out.append((turned if rotary_interleaved else turned.transpose(-1, -2)).flatten(-2).to(q.dtype))
    return tuple(out)


REFERENCE = {f.__name__: f for f in (rms_norm, silu_and_mul, gelu_and_mul, rotary_embedding)}


def install(patch: pytest.MonkeyPatch) -> Manager:
    """Its modules in this process, and a manager whose registry holds the reference implementations."""
    types = ModuleType("vllm_fl.dispatch.types")
    types.__dict__.update(OpImpl=OpImpl, BackendImplKind=BackendImplKind, BackendPriority=BackendPriority)
    for name, module in (("vllm_fl", ModuleType("vllm_fl")), ("vllm_fl.dispatch", ModuleType("d")), ("vllm_fl.dispatch.types", types)):
        patch.setitem(sys.modules, name, module)
    manager = Manager()
    for name, fn in REFERENCE.items():
        manager.registry.register_impl(OpImpl(name, "reference.torch", BackendImplKind.REFERENCE, fn, priority=BackendPriority.REFERENCE))
        theirs = OpImpl(name, "default.flagos", BackendImplKind.DEFAULT, fn, priority=BackendPriority.DEFAULT)
        manager.registry.register_impl(theirs)
    return manager


class Layer(torch.nn.Module):
    """What vLLM's layers publish: attributes by name, and the operator's plain form."""

    def __init__(self, operator: str, **attributes: Any) -> None:
        super().__init__()
        self.operator = operator
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_native(self, *args: Any) -> Any:
        return REFERENCE[self.operator](self, *args)

    def _match_cos_sin_cache_dtype(self, x: torch.Tensor) -> torch.Tensor:
        return self.table.to(x.dtype)


def layers() -> dict[str, Any]:
    """A layer for each operator."""
    return {
        "rms_norm": Layer("rms_norm", weight=torch.nn.Parameter(torch.randn(32)), variance_epsilon=1e-6, has_weight=True),
        "silu_and_mul": Layer("silu_and_mul"), "gelu_and_mul": Layer("gelu_and_mul", approximate="tanh"),
        "rotary_embedding": Layer("rotary_embedding", table=torch.randn(40, 16)),
    }  # fmt: skip
