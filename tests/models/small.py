"""The five models small: true to their architecture, a few layers of each kind, random weights; and their own eager truth.

A description is a plain mapping; `weights_of` gives every weight that the captured parts of a description name.
"""

from __future__ import annotations

from typing import Any

import torch

from flagtree.capture.build import build, layer_runs
from flagtree.capture.model_spec import ModelSpec
from flagtree.passes.repeat import Run

TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
FACTORS = [1.0 + 0.1 * i for i in range(32)]
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "robobrain": (
        "Qwen2_5_VLForConditionalGeneration",
        {**TEXT, "model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "use_sliding_window": False,
         "sliding_window": 64, "max_window_layers": 5,
         "vision_config": {"depth": 5, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_chans": 3, "out_hidden_size": 64,
                           "hidden_act": "silu", "patch_size": 4, "temporal_patch_size": 2, "spatial_patch_size": 4,
                           "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1, 4], "tokens_per_second": 2}},
        {"tokens": [1, 64], "edges": [2, 65]},
    ),
    "minicpm": (
        "MiniCPMV",
        {**TEXT, "model_type": "minicpmv", "version": 4.0, "hidden_size": 128, "head_dim": 64, "attention_bias": False, "query_num": 6,
         "rope_scaling": {"rope_type": "longrope", "factor": 1.0, "original_max_position_embeddings": 64, "short_factor": [*FACTORS],
                          "long_factor": [*FACTORS]},
         "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 40,
                           "patch_size": 4, "num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}},
        {"images": [1, 4], "patches": [1, 100]},
    ),
    "minimax": (
        "MiniMaxM2ForCausalLM",
        {**TEXT, "model_type": "minimax_m2", "head_dim": 32, "rotary_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3},
        {},
    ),
    "step3": (
        "Step3VLForConditionalGeneration",
        {"model_type": "step3_vl", "understand_projector_stride": 2, "projector_bias": False, "tie_word_embeddings": False,
         "text_config": {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 9, "num_attention_heads": 4,
                         "num_attention_groups": 1, "head_dim": 32, "share_q_dim": 48, "max_position_embedding": 64, "rms_norm_eps": 1e-5,
                         "rope_theta": 500000.0, "moe_num_experts": 5, "moe_top_k": 3, "moe_intermediate_size": 40, "share_expert_dim": 40,
                         "norm_expert_weight": False, "moe_layers_enum": "4,5,6,7"},
         "vision_config": {"hidden_size": 32, "intermediate_size": 48, "output_hidden_size": 24, "num_hidden_layers": 5,
                           "num_attention_heads": 2, "num_channels": 3, "image_size": 32, "patch_size": 4, "layer_norm_eps": 1e-5,
                           "hidden_act": "quick_gelu"}},
        {"images": [1, 4], "side": [1, 3]},
    ),
}  # fmt: skip
# MiniMax-M2's quantization_config; its blocks of 128 x 128 want wider rows
FP8: dict[str, Any] = {
    "weights": "float8_e4m3fn", "block": [128, 128], "activations": "float8_e4m3fn", "activation_group": 128,
    "excluded": ["*.gate", "*.e_score_correction_bias", "lm_head"],
}  # fmt: skip
CONFIGS["minimax-fp8"] = (
    "MiniMaxM2ForCausalLM",
    {**CONFIGS["minimax"][1], "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "rotary_dim": 32,
     "num_hidden_layers": 4},
    {},
)
STORED = 100.0  # what a weight of e4m3fn is as a rule
QWEN3 = {**TEXT, "model_type": "qwen3", "head_dim": 32, "attention_bias": False, "use_sliding_window": False}
CONFIGS["qwen3"] = ("Qwen3ForCausalLM", QWEN3, {})


def description(name: str, dtype: str = "float32") -> dict[str, Any]:
    """The description of a small model, as a file would have it."""
    architecture, config, vision = CONFIGS[name]
    parts: dict[str, Any] = {
        "prefill": {"batch": [1, 4], "sequence": [1, 32], "context": [1, 64]},
        "decode": {"batch": [1, 4], "context": [1, 64]},
    }
    if vision:
        parts["vision"] = vision
        parts["prefill"]["features"] = [1, 64]
    made = {"name": f"small-{name}", "architecture": architecture, "dtype": dtype, "config": config, "parts": parts}
    if name == "minimax-fp8":
        made |= {"quantisation": FP8, "capture": {"quantised": True}}
        made["dtypes"] = {"*.mlp.gate.weight": "float32", "*.mlp.e_score_correction_bias": "float32"}
    return made


def small_spec(name: str, dtype: str = "float32") -> ModelSpec:
    return ModelSpec.model_validate(description(name, dtype))


def random_weights(module: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """The module on the CPU with weights so wide that every logit differs; norms near one, weights of e4m3fn all over its range."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if b.is_floating_point())]:
            fan = weight.shape[-1] if weight.ndim > 1 else 25
            noise = torch.randn(weight.shape, generator=generator) * fan**-0.5
            if name.endswith("scale_inv"):  # of e4m3fn: one block is not like the next, and a column's weights add up as a float's do
                weight.copy_((noise.sigmoid() + 0.5) / STORED * (fan * 128) ** -0.5)
            elif weight.dtype == torch.float8_e4m3fn:
                weight.copy_(noise * fan**0.5 * STORED)
            else:
                weight.copy_(noise + (1.0 if weight.ndim == 1 and weight.shape[0] > 8 else 0.0))
    return module


def full_depth(spec: ModelSpec, part: str) -> torch.nn.Module:
    """The model of a part with all its layers, our operators in it, on the meta device."""
    runs = tuple(Run(run.first, run.count, run.count) for run in layer_runs(spec, part))
    return build(spec, part, runs, getattr(torch, spec.dtype))
