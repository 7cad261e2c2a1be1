"""vLLM's entry point `vllm.general_plugins`: replaces single operators out of tree where the server's settings ask for it.

vLLM calls `register` in each of its processes before any configuration exists, so a replaced class asks for its settings when a layer
is made, and is the class that it replaces where nothing is asked.  A class that another plug-in registered first stays theirs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from flagtree.serve.configuration import current_vllm_config, read_settings, resolved
from flagtree.serve.counts import COUNTS, logger
from flagtree.serve.operators import Operators, count_replaced
from flagtree.serve.server import Server, facts_of

FORWARDS = ("forward_cpu", "forward_cuda", "forward_oot")  # which one a layer calls depends on the platform
Answer = Callable[..., Any]


def register() -> None:
    """Idempotent.  Does nothing, and says so, where vLLM has no registry for classes out of tree, and on a platform out of tree: its
    owner replaces operators there, and a second class under one name stops vLLM."""
    try:
        registry = importlib.import_module("vllm.model_executor.custom_op")
        known, custom_op = registry.op_registry_oot, registry.CustomOp
    except (ImportError, AttributeError) as error:
        logger().warning("flagtree: this vLLM has no registry for operators out of tree, none is replaced: %s", error)
        return
    platform = importlib.import_module("vllm.platforms").current_platform
    if platform.is_out_of_tree():
        owner = type(platform).__module__
        COUNTS.aside |= dict.fromkeys(REPLACED, f"{owner} owns the platform")
        logger().info("flagtree: no operator is replaced, %s owns the platform", owner)
        return
    for name, (module, answer) in REPLACED.items():
        if name in known:
            if not getattr(known[name], "flagtree_replaces", None):
                COUNTS.aside[name] = f"registered by {known[name].__module__}"
                logger().info("flagtree: %s stays with %s, which registered first", name, known[name].__module__)
            continue
        try:
            replaced = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            COUNTS.aside[name] = f"this vLLM has none: {error}"
            continue
        ours = _subclass(replaced, answer)
        custom_op.register_oot(ours, name=name)
        ours.name = replaced.name  # by which `custom_ops` of vLLM's configuration turns it on and off


def _subclass(replaced: Any, answer: Answer) -> Any:
    """`replaced` with our kernels where the settings ask for them and `answer` knows the case."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.__init__(self, *args, **kwargs)
        self.flagtree_operators = _operators()
        if self.flagtree_operators is not None:
            count_replaced(replaced.__name__)

    def forwards(name: str) -> Callable[..., Any]:
        theirs = getattr(replaced, name)

        @functools.wraps(theirs)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            operators = self.flagtree_operators
            if operators is None or torch.compiler.is_compiling() or not args or args[0].device.type != "cpu":
                return theirs(self, *args, **kwargs)
            result = answer(self, operators, *args, **kwargs)
            return theirs(self, *args, **kwargs) if result is NotImplemented else result

        return forward

    body = {"__init__": __init__, "flagtree_replaces": replaced, "__module__": __name__, **{n: forwards(n) for n in FORWARDS}}
    return type(replaced.__name__, (replaced,), body)


def _operators() -> Operators | None:
    """The kernels of the server whose model is being built; None where its settings do not ask for them."""
    config = current_vllm_config()
    if config is None:
        return None
    settings = read_settings(config.additional_config)
    if not settings.custom_ops:
        return None
    if settings.bundle is not None and settings.digest is None:
        from flagtree.artifact.bundle import open_bundle

        settings = settings.model_copy(update={"digest": open_bundle(resolved(settings.bundle)).digest})
    bundle = "" if settings.bundle is None else str(resolved(settings.bundle))
    return _shared(Server(settings, facts_of(config), bundle=bundle, digest=settings.digest or ""))


@functools.cache
def _shared(server: Server) -> Operators:
    server.open()
    return Operators(server)


# -- one answer an operator: vLLM's arguments to a formula's, NotImplemented for a case that is left to vLLM ---------------
def _rms_norm(self: Any, run: Operators, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    if self.variance_size_override is not None:
        return NotImplemented
    has_weight = self.pass_weight if residual is None else self.pass_weight_add
    weight = self.weight.data if has_weight else None
    if residual is None:
        return run("rms_norm", [x], [weight], [float(self.variance_epsilon)])[0]
    return run("add_rms_norm", [x, residual], [weight], [float(self.variance_epsilon)])


def _silu_and_mul(self: Any, run: Operators, x: torch.Tensor) -> Any:
    return run("silu_and_mul", [x])[0]


def _gelu_and_mul(self: Any, run: Operators, x: torch.Tensor) -> Any:
    return run("gelu_and_mul", [x], numbers=[str(self.approximate)])[0]


def _rotary(self: Any, run: Operators, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
    if positions.dim() != 1 or query.dim() != 2:
        return NotImplemented
    table = self._match_cos_sin_cache_dtype(query)
    numbers = [int(self.head_size), int(self.rotary_dim), bool(self.is_neox_style)]
    turned = [x if x is None else run("rotary", [positions, x], [table], numbers)[0] for x in (query, key)]
    return turned[0], turned[1]


_LAYERS = "vllm.model_executor.layers"
REPLACED: dict[str, tuple[str, Answer]] = {
    "RMSNorm": (f"{_LAYERS}.layernorm", _rms_norm),
    "SiluAndMul": (f"{_LAYERS}.activation", _silu_and_mul),
    "GeluAndMul": (f"{_LAYERS}.activation", _gelu_and_mul),
    "RotaryEmbedding": (f"{_LAYERS}.rotary_embedding", _rotary),
}
