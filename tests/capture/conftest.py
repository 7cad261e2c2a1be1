"""Small decoders as descriptions: real classes of transformers at widths that run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flagtree.capture.model_spec import ModelSpec

CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
EXTRA: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"head_dim": 16, "attention_bias": False, "use_sliding_window": False},
    "Qwen2ForCausalLM": {"use_sliding_window": False},
    "LlamaForCausalLM": {"tie_word_embeddings": True, "mlp_bias": False},
}
PARTS: dict[str, Any] = {
    "prefill": {"batch": [1, 4], "sequence": [1, 32], "context": [1, 48]},
    "decode": {"batch": [1, 4], "context": [1, 48]},
}


@pytest.fixture(scope="session")
def small_spec() -> Callable[..., ModelSpec]:
    """`small_spec("Qwen3ForCausalLM", dtype="float32", num_hidden_layers=2)`: a description; further names go into `config`."""

    def make(architecture: str = "Qwen3ForCausalLM", dtype: str = "float32", **config: Any) -> ModelSpec:
        fields = {**CONFIG, **EXTRA.get(architecture, {}), **config}
        return ModelSpec.model_validate(
            {"name": "small", "architecture": architecture, "dtype": dtype, "config": fields, "parts": PARTS, "capture": {"layers": 64}}
        )

    return make
