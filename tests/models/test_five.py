"""The five descriptions: what follows from them at full size is what is published, and what is inferred says so."""

from __future__ import annotations

import pytest

from flagtree.capture.captured import CapturedModel
from flagtree.capture.model import capture
from flagtree.capture.model_spec import list_specs, load_spec

# name as the published card types it: parameters of text and tower, in billions, as research counted them from the public sources
PUBLISHED = {
    "qwen3": (8.1907, None),
    "robobrain2-7b": (7.6156, 0.6768),
    "minicpmv4": (3.6059, 0.4540),
    "minimax": (228.69, None),
    "step3": (316.295, 4.675),
}
# the published totals of the further members
MEMBERS = {
    "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-14b": 14.8, "qwen3-32b": 32.8, "qwen3-30b-a3b": 30.5,
    "qwen2.5-vl-3b": 3.75, "qwen2.5-vl-7b": 8.29, "qwen2.5-vl-32b": 33.5, "qwen2.5-vl-72b": 73.4,
}  # fmt: skip


def parameters(captured: CapturedModel) -> float:
    """Billions of elements in all weights at full depth."""
    first = {run.first: run.count for run in captured.runs}
    total = 0
    for p in captured.placeholders:
        if p.role == "weight":
            layer = captured.layer_of(p.qualified)
            total += p.value.numel() * (1 if layer is None else first.get(layer, 0))
    return total / 1e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    """Captured at true width; the capture also holds the number of weights against the description's."""
    spec, (text, vision) = load_spec(name), PUBLISHED[name]
    assert parameters(capture(spec, "decode")) == pytest.approx(text, rel=1e-4)
    assert ("vision" in spec.part_names) == (vision is not None)
    if vision is not None:
        assert parameters(capture(spec, "vision")) == pytest.approx(vision, rel=1e-3)


@pytest.mark.parametrize("name", [n if n in ("qwen3-0.6b", "qwen3-30b-a3b") else pytest.param(n, marks=pytest.mark.full) for n in MEMBERS])
def test_members_of_the_families(name: str) -> None:
    spec = load_spec(name)
    assert spec.card.benchmarks == ()  # no figures are published for these
    assert sum(parameters(capture(spec, part)) for part in spec.part_names if part != "prefill") == pytest.approx(MEMBERS[name], rel=5e-3)


def test_every_description_tells_its_sources_and_every_inferred_field_is_one() -> None:
    for spec in list_specs():
        assert {"config", "architecture", "parts"} <= spec.sources.keys(), spec.name
        assert spec.title and spec.serving["served_model_name"] == spec.name
    assert load_spec("step3").inferred.keys() == {"vision_config.intermediate_size", "understand_projector_stride", "projector_bias"}


def test_figures_of_the_published_cards() -> None:
    """Shares; one row of each card, and how many there are."""
    rows = {
        "qwen3": (5, "AIME_0fewshot_@avg1", 0.700, {"metax": 0.733}),
        "robobrain2-7b": (10, "robo_spatial_home_all", 0.54227, {"metax": 0.52944}),
        "minicpmv4": (9, "MM-Vet v2", 0.4775, {"metax": 0.48508}),
        "minimax": (5, "GPQA_0fewshot_@avg1", 0.6426, {"nvidia": 0.6518}),
        "step3": (9, "MMLU_Pro_vision", 0.4873, {"nvidia": 0.4877}),
    }
    for name, (count, row, reference, published) in rows.items():
        card = load_spec(name).card
        assert len(card.benchmarks) == count
        found = next(b for b in card.benchmarks if b.name == row)
        assert (found.reference, found.published) == (reference, published)
        assert card.licence == "apache-2.0" and card.environment.keys() == published.keys()


def test_layers_of_step3_are_runs_of_two_kinds() -> None:
    captured = capture(load_spec("step3"), "decode")
    assert [(run.first, run.count, run.captured) for run in captured.runs] == [(0, 4, 3), (4, 56, 3), (60, 1, 1)]
    weights = captured.qualified_names("weight")
    assert "model.layers.59.moe.gate_up_proj" in weights and "model.layers.60.mlp.up_proj.weight" in weights
    assert "model.layers.3.moe.gate.weight" not in weights
    assert captured.qualified_names("state")[-2:] == ("k_cache.60", "v_cache.60")


def test_what_a_checkpoint_has_in_another_type_is_captured_so() -> None:
    captured = capture(load_spec("minimax"), "decode")
    types = {p.qualified: str(p.value.dtype) for p in captured.placeholders}
    assert types["model.layers.0.mlp.gate.weight"] == types["model.layers.0.mlp.e_score_correction_bias"] == "torch.float32"
    assert types["model.layers.0.mlp.experts.gate_up_proj"] == "torch.bfloat16"
