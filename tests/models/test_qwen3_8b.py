"""`models/qwen3-8b.yaml`: the description against transformers' own class and the published facts; the true size is captured."""

from __future__ import annotations

import pytest
import torch
import transformers

from flagtree.capture.model import capture
from flagtree.capture.model_spec import ModelSpec, load_spec


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_spec("qwen3")


def test_every_field_is_one_of_the_class_and_none_is_left_to_its_default(spec: ModelSpec) -> None:
    known = set(transformers.Qwen3Config().to_dict())
    assert set(spec.config) - known <= {"rope_theta", "rope_scaling"}  # kept by transformers as rope_parameters
    config = transformers.Qwen3Config(**{k: v for k, v in spec.config.items() if k != "model_type"})
    assert config.rope_parameters == {"rope_theta": 1000000, "rope_type": "default"}
    decides = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    decides |= {"head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias"}
    decides |= {"use_sliding_window", "sliding_window", "rope_theta"}
    assert decides <= set(spec.config)


def test_parameters_are_the_published_number(spec: ModelSpec) -> None:
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**spec.config))
    weights = dict(model.named_parameters())
    assert len(weights) == spec.capture.weights == 399
    assert sum(w.numel() for w in weights.values()) == 8_190_735_360
    captured = capture(spec, "decode")
    assert sorted(captured.qualified_names("weight")) == sorted(weights)


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_the_true_size_is_captured(spec: ModelSpec, part: str) -> None:
    captured = capture(spec, part)  # measured: 1.6 CPU s for prefill, 0.8 for decode
    sizes = {"batch": (1, 64), "sequence": (1, 40960), "context": (1, 40960)}
    assert {name: captured.ranges[symbol] for name, symbol in captured.dims.items()} == {
        name: limits for name, limits in sizes.items() if part == "prefill" or name != "sequence"
    }
    values = {p.qualified: p.value for p in captured.placeholders}
    assert tuple(values["model.layers.1.self_attn.q_proj.weight"].shape) == (4096, 4096)
    assert tuple(values["lm_head.weight"].shape) == (151936, 4096)
    assert tuple(values["k_cache.2"].shape[d] for d in (1, 3)) == (8, 128)
    assert {p.value.dtype for p in captured.placeholders if p.role in ("weight", "state")} == {torch.bfloat16}
    logits = next(iter(captured.graph_module.graph.find_nodes(op="output"))).args[0][0].meta["val"]
    assert logits.dtype == torch.bfloat16
    assert logits.shape[1:] == (151936,)
    assert len(captured.qualified_names("weight")) == 399
    assert len(captured.qualified_names("state")) == 72


def test_the_card_and_serving_inputs(spec: ModelSpec) -> None:
    rows = {row.name: (row.reference, row.published["metax"]) for row in spec.card.benchmarks}
    assert rows["MMLU_5fewshot_@avg1"] == (0.699, 0.699)
    assert len(rows) == 5
    assert spec.card.environment["metax"].driver.endswith("2.3.0")
    assert spec.serving["served_model_name"] == "qwen3-8b"
    assert spec.card.licence == "apache-2.0"
