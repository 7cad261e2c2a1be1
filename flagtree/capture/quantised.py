"""A model whose linear layers and experts compute as its checkpoint stores them: e4m3fn in blocks, activations quantised as they come.

Invariant: a weight that the description's annotation excludes is left as it is; one that its blocks do not fit is an error, never a float.
Called by `capture/build.py` where the capture recipe says `quantised`; the operators stand in runtime/quantised_products.py.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

import torch

from flagtree.capture.spec_fields import Quantisation
from flagtree.errors import CaptureError
from flagtree.runtime import operators as operators  # registers torch.ops.flagtree.*

BLOCK = 128
EXPERTS = ("gate_up_proj", "down_proj")  # stacked weights of transformers' experts
EXPERT_SCALE = "_scale_inv"  # beside them, as transformers' FP8Experts calls it


def take_quantisation(model: torch.nn.Module, stored: Quantisation | None, where: str) -> None:
    """Give each linear layer and each module of experts the weights that the checkpoint stores, with scales beside them.

    CaptureError for a description without an annotation, and for one of another scheme than MiniMax-M2's.
    """
    scheme = (stored.weights, stored.block, stored.activations, stored.activation_group) if stored is not None else ()
    if stored is None or scheme != ("float8_e4m3fn", (BLOCK, BLOCK), "float8_e4m3fn", BLOCK):
        why = f"its annotation is {scheme}" if stored is not None else "it has no `quantisation`"
        hint = "weights and activations float8_e4m3fn, block [128, 128], activation_group 128"
        raise CaptureError("this quantisation cannot be captured", where=where, why=why, hint=hint)
    for name, module in model.named_modules():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in stored.excluded):
            continue
        if isinstance(module, torch.nn.Linear):
            _store(module, "weight", stored.scale_name, f"{where}: {name}")
            module.forward = _linear(module, stored.scale_name)  # type: ignore[method-assign, assignment]
        elif all(isinstance(module._parameters.get(part), torch.nn.Parameter) for part in EXPERTS):
            for part in EXPERTS:
                _store(module, part, part + EXPERT_SCALE, f"{where}: {name}")


def _store(module: torch.nn.Module, name: str, scale_name: str, where: str) -> None:
    """The weight as e4m3fn and a scale for each of its blocks."""
    weight = module.get_parameter(name)
    *outer, rows, columns = weight.shape
    if columns % BLOCK:
        raise CaptureError("a weight cannot be stored in blocks", where=where, why=f"{columns} columns are no multiple of {BLOCK}")
    scales = torch.empty(*outer, -(-rows // BLOCK), columns // BLOCK, dtype=torch.float32, device=weight.device)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    module.register_parameter(name, torch.nn.Parameter(stored, requires_grad=False))
    module.register_parameter(scale_name, torch.nn.Parameter(scales, requires_grad=False))


def _linear(module: torch.nn.Linear, scale_name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer on activations that are quantised in groups of a row; a product has two dimensions."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        q, scales = torch.ops.flagtree.quantise(x, BLOCK, module.weight.dtype)
        flat = q.view(-1, x.shape[-1]), scales.view(-1, scales.shape[-1])
        y = torch.ops.flagtree.scaled_linear(*flat, module.weight, module.get_parameter(scale_name), x.dtype)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if module.bias is None else y + module.bias

    return forward
