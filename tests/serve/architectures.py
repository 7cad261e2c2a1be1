"""The architectures that the real engine serves in tests: a small configuration of each, its special tokens, and how it asks for an image.

Widths are small, everything else is as the published models have it.  `checkpoints.write` makes a folder of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VOCABULARY = 1024
WEIGHTS = {"load_format": "flagtree_tests"}  # random ones, made where the engine loads them: tests/serve/supplied.py
BASE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """`configuration`: config.json from the special tokens' ids.  `image`: the text that stands for one in a prompt, empty for none.
    `files`: further files by name; `code`: a folder of files that the checkpoint carries as code.  `arguments`: what vLLM needs to
    load it.  `saved`: a class of transformers that writes a whole checkpoint, weights and all.  `norms`: what of q and k is normed
    before they are turned: each head, the whole row, or nothing."""

    configuration: Callable[[Mapping[str, int]], dict[str, Any]]
    tokens: tuple[str, ...] = ()
    image: str = ""
    files: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""
    arguments: Mapping[str, Any] = field(default_factory=lambda: dict(WEIGHTS))
    saved: str = ""
    norms: Literal["heads", "row", ""] = ""


def _qwen3(ids: Mapping[str, int]) -> dict[str, Any]:
    return {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64, "rope_theta": 1e6}


def _qwen3_moe(ids: Mapping[str, int]) -> dict[str, Any]:
    experts = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {**_qwen3(ids), **experts, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True}


def _minimax_m2(ids: Mapping[str, int]) -> dict[str, Any]:
    experts = {"num_experts_per_tok": 2, "num_local_experts": 8, "use_routing_bias": True, "scoring_func": "sigmoid", "num_mtp_modules": 0}
    heads = {"head_dim": 64, "rotary_dim": 32, "rope_theta": 5e6, "use_qk_norm": True, "qk_norm_type": "per_layer"}
    return {**BASE, **experts, **heads, "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "intermediate_size": 128}


def _step3_text(ids: Mapping[str, int]) -> dict[str, Any]:
    base = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
    experts = {"moe_intermediate_size": 128, "moe_num_experts": 8, "moe_top_k": 2, "share_expert_dim": 128, "norm_expert_weight": False,
               "moe_layers_enum": "1"}  # fmt: skip
    heads = {"num_attention_groups": 1, "share_q_dim": 128, "head_dim": 64, "rope_theta": 5e5, "max_seq_len": 2048}
    names = {"architectures": ["Step3TextForCausalLM"], "model_type": "step3_text", "max_position_embedding": 2048}
    return {**base, **experts, **heads, **names}


def _step3_vl(ids: Mapping[str, int]) -> dict[str, Any]:
    vision = {"hidden_size": 128, "intermediate_size": 256, "output_hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 728, "patch_size": 14, "hidden_act": "quick_gelu"}  # fmt: skip
    return {
        "architectures": ["Step3VLForConditionalGeneration"], "model_type": "step3_vl", "dtype": "float32",
        "image_token_id": ids["<im_patch>"], "understand_projector_stride": 2, "projector_bias": False, "vision_config": vision,
        "text_config": _step3_text(ids), **{k: BASE[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }  # fmt: skip


def _qwen2_5_vl(ids: Mapping[str, int]) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "in_chans": 3,
              "out_hidden_size": 256, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
              "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2}  # fmt: skip
    places = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>", "vision_token_id": "<|vision_pad|>",
              "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}  # fmt: skip
    return {
        **BASE, **{name: ids[token] for name, token in places.items()}, "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl", "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2, "vision_config": vision,
    }  # fmt: skip


def _minicpm_v(ids: Mapping[str, int]) -> dict[str, Any]:
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112,
              "patch_size": 14, "model_type": "siglip_vision_model"}  # fmt: skip
    return {
        **BASE, "architectures": ["MiniCPMV"], "model_type": "minicpmv", "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"},
        "version": 4.0, "head_dim": 32, "query_num": 16, "image_size": 112, "rope_theta": 1e4, "max_slice_num": 1, "vision_config": vision,
    }  # fmt: skip


_PROCESSOR = {"AutoProcessor": "processing_minicpmv.MiniCPMVProcessor"}
_MINICPM_FILES = {
    "preprocessor_config.json": {
        "image_processor_type": "MiniCPMVImageProcessor", "processor_class": "MiniCPMVProcessor", "max_slice_nums": 1, "patch_size": 14,
        "scale_resolution": 112, "image_feature_size": 16, "use_image_id": True,
        "auto_map": {"AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor", **_PROCESSOR},
    },
    "processor_config.json": {"processor_class": "MiniCPMVProcessor", "auto_map": _PROCESSOR},
}  # fmt: skip
_QWEN_VL_FILES = {
    "preprocessor_config.json": {
        "min_pixels": 3136, "max_pixels": 50176, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    },
}  # fmt: skip
_QWEN_VL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_MINICPM_TOKENS = ("<image>", "</image>", "<unk>", "<slice>", "</slice>", "<image_id>", "</image_id>", "<im_start>", "<im_end>")
_STEP3_TOKENS = ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
_ONE_IMAGE: dict[str, Any] = {**WEIGHTS, "limit_mm_per_prompt": {"image": 1}}
_NO_VIDEO: dict[str, Any] = {**WEIGHTS, "limit_mm_per_prompt": {"image": 1, "video": 0}}

ARCHITECTURES: dict[str, Architecture] = {
    "qwen3": Architecture(_qwen3, arguments={}, saved="Qwen3ForCausalLM", norms="heads"),
    "qwen3_moe": Architecture(_qwen3_moe, arguments={}, saved="Qwen3MoeForCausalLM", norms="heads"),
    "minimax_m2": Architecture(_minimax_m2, norms="row"),
    "qwen2_5_vl": Architecture(
        _qwen2_5_vl, _QWEN_VL_TOKENS, "<|vision_start|><|image_pad|><|vision_end|>", _QWEN_VL_FILES,
        arguments=_NO_VIDEO,
    ),
    "minicpm_v4": Architecture(
        _minicpm_v, _MINICPM_TOKENS, "(<image>./</image>)", _MINICPM_FILES, "minicpmv", {**_NO_VIDEO, "trust_remote_code": True}
    ),
    "step3_text": Architecture(_step3_text),
    "step3_vl": Architecture(_step3_vl, _STEP3_TOKENS, "<im_patch>", arguments=_ONE_IMAGE),
}  # fmt: skip
