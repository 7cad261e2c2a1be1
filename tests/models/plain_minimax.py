"""MiniMax-M2 in fp8 by its plain definition: transformers' own class, each product of it as the checkpoint's quantization_config says.

Nothing of flagtree computes here: groups, blocks and the rounding to e4m3 are written out, in f32 or f64 whatever the model's type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from flagtree.capture.model_spec import ModelSpec

BLOCK = 128


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest value of the format, ties to even: 3 bits of fraction, exponents from -6 on, at most 448."""
    exponent = torch.frexp(x).exponent - 1  # of the leading bit
    step = torch.ldexp(torch.ones_like(x), exponent.clamp_min(-6) - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, activations: bool = True) -> torch.Tensor:
    """x [T, K] times weight [N, K]: groups of 128 of a row of x and blocks of 128 x 128 of the weight have a scale each."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(x), len(weight), dtype=wide)
    for group, k in enumerate(range(0, x.shape[1], BLOCK)):
        part = x[:, k : k + BLOCK].to(wide)
        scale = part.abs().amax(1, keepdim=True).clamp_min(1e-10) / 448
        taken = e4m3(part / scale) * scale if activations else part
        for row in range(0, len(weight), BLOCK):
            block = weight[row : row + BLOCK, k : k + BLOCK].to(wide) * scales[row // BLOCK, group]
            total[:, row : row + BLOCK] += taken @ block.T
    return total.to(x.dtype)


class PlainMiniMax:
    """`logits(ids)`; `dtype` is what is between two products, f64 for the truth; `activations`: whether they are quantised."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, activations: bool = True) -> None:
        fields = {name: value for name, value in spec.config.items() if name != "model_type"}
        config = transformers.MiniMaxM2Config(**fields, attn_implementation="eager")
        self.weights, self.activations = weights, activations
        self.model: Any = transformers.MiniMaxM2ForCausalLM(config).eval()
        table = self.model.model.rotary_emb.inv_freq.clone()  # f32 whatever the model's type
        self.model.to(dtype).model.rotary_emb.inv_freq = table
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.forward = self._linear(name)
            elif name.endswith(".experts"):
                module.forward = self._experts(name)
            elif name.endswith(".mlp"):
                module.gate.to(torch.promote_types(dtype, torch.float32))
                module.e_score_correction_bias = module.e_score_correction_bias.to(module.gate.weight.dtype)
        kept = {n: w for n, w in weights.items() if w.dtype != torch.float8_e4m3fn and not n.endswith("scale_inv")}
        missing, unexpected = self.model.load_state_dict(kept, strict=False)
        assert not unexpected and all(weights[n].dtype == torch.float8_e4m3fn for n in missing)

    def _linear(self, name: str) -> Any:
        weight, scales = self.weights[f"{name}.weight"], self.weights[f"{name}.weight_scale_inv"]

        def forward(x: torch.Tensor) -> torch.Tensor:
            return product(x.flatten(0, -2), weight, scales, self.activations).unflatten(0, x.shape[:-1])

        return forward

    def _experts(self, name: str) -> Any:
        up, up_scales, down, down_scales = (
            self.weights[f"{name}.{part}{end}"] for part in ("gate_up_proj", "down_proj") for end in ("", "_scale_inv")
        )

        def forward(x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
            rows = []
            for token, chosen, share in zip(x, ids.tolist(), shares, strict=True):
                total = torch.zeros_like(token, dtype=shares.dtype)
                for expert, part in zip(chosen, share, strict=True):
                    gate, value = product(token[None], up[expert], up_scales[expert], self.activations)[0].chunk(2)
                    inner = torch.nn.functional.silu(gate) * value
                    total += part * product(inner[None], down[expert], down_scales[expert], self.activations)[0]
                rows.append(total.to(x.dtype))
            return torch.stack(rows)

        return forward

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [S]; logits [S, vocabulary], no cache."""
        with torch.no_grad():
            return self.model(ids[None], use_cache=False).logits[0]
