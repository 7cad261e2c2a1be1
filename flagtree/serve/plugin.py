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

from flagtree.serve import answers
from flagtree.serve.agreement import NOTHING, check_led, mode_of, settings_of
from flagtree.serve.answers import Answer
from flagtree.serve.collector import release
from flagtree.serve.configuration import current_vllm_config
from flagtree.serve.counts import COUNTS, logger
from flagtree.serve.operators import Operators, count_replaced, operators_of

FORWARDS = ("forward_cpu", "forward_cuda", "forward_oot")  # which one a layer calls depends on the platform
DOOR = "single operators"


def register() -> None:
    """Idempotent.  Does nothing, and says so, where vLLM has no registry for classes out of tree, and on a platform out of tree: its
    owner replaces operators there, and a second class under one name stops vLLM."""
    release()  # vLLM has imported itself
    try:
        registry = importlib.import_module("vllm.model_executor.custom_op")
        known, custom_op = registry.op_registry_oot, registry.CustomOp
    except (ImportError, AttributeError) as error:
        logger().warning("flagtree: this vLLM has no registry for operators out of tree, none is replaced: %s", error)
        return
    platform = importlib.import_module("vllm.platforms").current_platform
    if platform.is_out_of_tree():
        owner = type(platform).__module__
        for name in REPLACED:
            COUNTS.stepped_aside(name, f"{owner} owns the platform")
        return
    for name, (module, answer) in REPLACED.items():
        if name in known:
            if not getattr(known[name], "flagtree_replaces", None):
                COUNTS.stepped_aside(name, f"{known[name].__module__} registered it first")
            continue
        try:
            replaced = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            COUNTS.stepped_aside(name, f"this vLLM has none: {error}")
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
            if operators is None or torch.compiler.is_compiling() or not args or args[0].device.type != operators.device:
                return theirs(self, *args, **kwargs)
            result = answer(self, operators, *args, **kwargs)
            return theirs(self, *args, **kwargs) if result is NotImplemented else result

        return forward

    body = {"__init__": __init__, "flagtree_replaces": replaced, "__module__": __name__, **{n: forwards(n) for n in FORWARDS}}
    return type(replaced.__name__, (replaced,), body)


def _operators() -> Operators | None:
    """The kernels of the server whose model is being built; None where its settings do not ask for them.  A bundle to which no door
    leads, as when LoRA or `enforce_eager` switched compilation off, stops a strict server here, before weights are loaded."""
    config = current_vllm_config()
    if config is None:
        return None
    if not hasattr(config, "additional_config"):  # nobody asked anything of us, and nobody can
        COUNTS.stepped_aside(DOOR, "this vLLM has no additional_config")
        return None
    settings = settings_of(config)
    if why := check_led(config, settings):
        COUNTS.stepped_aside("the whole graph", why)
    operators = operators_of(config, DOOR)
    if operators is not None and settings.quiets_helpers and mode_of(config) == NOTHING:
        operators.server.quiet()  # no graph of ours comes that would do it
    return operators


_LAYERS = "vllm.model_executor.layers"
REPLACED: dict[str, tuple[str, Answer]] = {
    "RMSNorm": (f"{_LAYERS}.layernorm", answers.rms_norm),
    "SiluAndMul": (f"{_LAYERS}.activation", answers.silu_and_mul),
    "GeluAndMul": (f"{_LAYERS}.activation", answers.gelu_and_mul),
    "RotaryEmbedding": (f"{_LAYERS}.rotary_embedding", answers.rotary),
}
