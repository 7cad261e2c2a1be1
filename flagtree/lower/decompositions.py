"""Operators that lowering takes apart by PyTorch's own decompositions, because their parts are generated and they are not.

Only decompositions that compute in ATen's opmath type and round once at the end are listed.
"""

from __future__ import annotations

import torch
from torch._decomp import get_decompositions
from torch._decomp.decompositions import log_sigmoid_forward

aten = torch.ops.aten


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """Eager hands the operand itself back where PyTorch's decomposition copies it; the calls are those of ATen/native/Dropout.cpp."""
    if not train or p == 0 or x.numel() == 0:
        return x
    if p == 1:
        return x * torch.zeros((), dtype=x.dtype, device=x.device)
    return x * torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)


def _log_sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager's results on the CPU are contiguous whatever the operand's strides (ATen/native/Activation.cpp)."""
    y, saved = log_sigmoid_forward(x)
    return y.contiguous(), saved.contiguous()


DECOMPOSITIONS = {aten.dropout.default: _dropout, aten.log_sigmoid_forward.default: _log_sigmoid} | get_decompositions(
    [
        aten.addr, aten.cosh, aten.dist, aten.glu, aten.huber_loss, aten.mse_loss, aten.smooth_l1_loss, aten.soft_margin_loss,
        aten.stack, aten.threshold, aten.hardshrink, aten.softshrink, aten.celu, aten.heaviside, aten.nan_to_num,
        aten.linalg_vector_norm, aten.norm, aten.special_entr, aten.xlogy,
        aten.logaddexp, aten.sinc, aten.prelu, aten.trace, aten.unfold_copy,
        # backward formulas
        aten.sigmoid_backward, aten.tanh_backward, aten.threshold_backward, aten.silu_backward, aten.gelu_backward,
        aten.hardtanh_backward, aten.leaky_relu_backward, aten.elu_backward, aten._softmax_backward_data,
        aten._log_softmax_backward_data, aten.native_layer_norm_backward, aten.mse_loss_backward, aten._fused_rms_norm_backward,
        aten.softplus_backward, aten.mish_backward, aten.hardswish_backward, aten.hardsigmoid_backward, aten.log_sigmoid_backward,
        aten.smooth_l1_loss_backward, aten.huber_loss_backward, aten.glu_backward, aten.logit_backward, aten.native_dropout_backward,
    ]
)  # fmt: skip
