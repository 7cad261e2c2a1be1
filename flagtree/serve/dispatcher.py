"""vllm-plugin-FL's entry point `vllm_fl.plugin`: our kernels as implementations in its dispatcher, on the chips whose platform it owns.

Its registry is used as it is published (github.com/flagos-ai/vllm-plugin-FL, vllm_fl/dispatch/README.md).  Its own implementations stay
registered beside ours, and its settings (VLLM_FL_PER_OP, VLLM_FL_PREFER) choose between them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from flagtree.errors import FlagtreeError
from flagtree.serve import answers
from flagtree.serve.agreement import check_led, settings_of
from flagtree.serve.configuration import current_vllm_config
from flagtree.serve.counts import COUNTS, logger
from flagtree.serve.operators import FORMULAS, Operators, count_replaced, operators_of

DOOR = "vllm-plugin-FL's dispatcher"
NAME = "default.flagtree"  # its name for one implementation: `impl:default.flagtree` in VLLM_FL_PER_OP
ABOVE = 50  # its priorities lie 50 apart


def register(registry: Any) -> None:
    """Add our implementations to its registry.  Idempotent; does nothing, and says so, where the published types are not there, and for
    an operator for which another plug-in registered something that stands above us."""
    try:
        types = importlib.import_module("vllm_fl.dispatch.types")
        make, kind, default = types.OpImpl, types.BackendImplKind.DEFAULT, int(types.BackendPriority.DEFAULT)
        known = registry.snapshot().impls_by_op
    except (ImportError, AttributeError) as error:
        logger().warning("flagtree: this vllm-plugin-FL has another registry than we know, nothing is registered: %s", error)
        return
    binding = Binding()
    binding()  # the first operator is asked for while the model is built: wrong settings are said now
    for name, (answer, plain) in ANSWERS.items():
        others = [i for i in known.get(name, ()) if i.kind == kind]
        if any(i.impl_id == NAME for i in others):
            continue
        above = [i for i in others if i.priority >= default + ABOVE]
        if above:
            COUNTS.stepped_aside(name, f"{above[0].impl_id} registered it first, with priority {above[0].priority}")
            continue
        run = _answering(name, answer, plain, binding)
        registry.register_impl(make(op_name=name, impl_id=NAME, kind=kind, fn=run, priority=default + ABOVE))


class Binding:
    """The kernels of this process's server, bound when a configuration is current, which is while the model is built."""

    def __init__(self) -> None:
        self.operators: Operators | None = None

    def __call__(self) -> Operators | None:
        """None where nothing asks for us."""
        config = current_vllm_config()
        if self.operators is None and hasattr(config, "additional_config"):
            try:
                if why := check_led(config, settings_of(config)):
                    COUNTS.stepped_aside("the whole graph", why)
                self.operators = operators_of(config, DOOR)
            except FlagtreeError as error:
                raise refused(error) from error
        return self.operators


def refused(error: FlagtreeError) -> SystemExit:
    """What stops this process: the dispatcher takes any other error for a reason to try the next implementation."""
    return SystemExit(f"flagtree: error: {error.render()}")


def _answering(name: str, answer: Callable[..., Any], plain: Callable[..., Any], binding: Binding) -> Callable[..., Any]:
    """One implementation: it takes the layer, then what the dispatcher publishes for `name`.  Within a trace it is `plain`, so that the
    graph holds what is computed."""
    layers: set[int] = set()

    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain(layer, *args, **kwargs)
        operators = binding()
        if operators is None:
            raise FlagtreeError("no settings ask for flagtree's operators", where=name, hint='"custom_ops": true')
        if id(layer) not in layers:
            layers.add(id(layer))
            count_replaced(name)
        try:
            return answer(layer, operators, *args, **kwargs)
        except FlagtreeError as error:
            if operators.server.settings.strict == "off":
                raise
            raise refused(error) from error

    def available() -> bool:
        asked = binding() is not None
        if not asked:
            COUNTS.stepped_aside(name, 'no settings ask for it ("custom_ops": true), or none were current when the dispatcher chose')
        return asked

    run._is_available = available  # type: ignore[attr-defined]  # asked by the dispatcher before it chooses
    return run


# -- one answer an operator: as the dispatcher publishes its arguments -------------------------------------------------------
def _plain(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's own form in torch; its arguments are vLLM's."""
    return layer.forward_native(*args, **kwargs)


def _own(answer: answers.Answer) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An answer with vLLM's arguments, with the plain form for what no formula covers."""

    def run(layer: Any, operators: Operators, *args: Any, **kwargs: Any) -> Any:
        result = answer(layer, operators, *args, **kwargs)
        return _plain(layer, *args, **kwargs) if result is NotImplemented else result

    return run, _plain


def _plain_rotary(
    layer: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    rotary_interleaved: bool = False, inplace: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `_rotary`, in torch."""
    size, table = query.shape[-1], torch.cat((cos, sin), dim=-1)
    flat = (x.reshape(x.shape[0], -1) for x in (query, key))
    turned = [FORMULAS["rotary"](positions, x, table, size, size, not rotary_interleaved) for x in flat]
    return turned[0].view(query.shape), turned[1].view(key.shape)


def _rotary(
    layer: Any, run: Operators, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    rotary_interleaved: bool = False, inplace: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """query and key [tokens, heads, rotary size]; cos and sin [positions, rotary size / 2], as a rule halves of the layer's own table,
    which the kernel reads whole.  `inplace` only allows to write to query and key; the results are new tensors.  Another form is left
    to the next implementation."""
    size, half = query.shape[-1], cos.shape[-1]
    if query.dim() != 3 or positions.dim() != 1 or 2 * half != size:
        why = f"query has {query.dim()} dimensions of {size}, positions {positions.dim()}, the table is {half} wide"
        COUNTS.stepped_aside("rotary_embedding", why)
        raise NotImplementedError(why)
    table = layer._match_cos_sin_cache_dtype(query)
    if table.shape[-1] != size or any(a.data_ptr() != b.data_ptr() for a, b in zip((cos, sin), table.chunk(2, dim=-1))):
        table = torch.cat((cos, sin), dim=-1)
    numbers = [size, size, not rotary_interleaved]
    flat = (x.reshape(x.shape[0], -1) for x in (query, key))
    turned = [run("rotary", [positions, x], [table], numbers)[0] for x in flat]
    return turned[0].view(query.shape), turned[1].view(key.shape)


ANSWERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm": _own(answers.rms_norm),
    "silu_and_mul": _own(answers.silu_and_mul),
    "gelu_and_mul": _own(answers.gelu_and_mul),
    "rotary_embedding": (_rotary, _plain_rotary),
}
