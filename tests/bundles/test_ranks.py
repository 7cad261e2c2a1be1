"""Small models divided over ranks: every rank, a process of its own over gloo with its part of the published checkpoint, gives the logits
of the undivided reference; towers their features.  "Equal to eager" as in test_models.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import flagtree
from flagtree.artifact.bundle import open_bundle
from flagtree.capture.references import step3
from flagtree.capture.references.checkpoint import to_checkpoint
from flagtree.compile import compile_model
from flagtree.errors import BindError, CaptureError
from flagtree.runtime.shares import Safetensors, rank_weights
from tests.bundles.test_models import assert_equal_to_eager, question, reference_logits, rms, with_tables
from tests.models.small import description, full_depth, random_weights, small_spec

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120


def published(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as the public checkpoint of the family names and cuts them."""
    if name == "step3":
        return to_checkpoint(weights, step3.CHECKPOINT)
    if name != "minimax":
        return {n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): w for n, w in weights.items()}
    out: dict[str, torch.Tensor] = {}
    for n, w in weights.items():
        block = n.partition(".mlp.")[0] + ".block_sparse_moe"
        for e in range(w.shape[0]) if ".experts." in n else ():
            gate, up = w[e].chunk(2) if n.endswith("gate_up_proj") else (w[e], None)
            out[f"{block}.experts.{e}.{'w2' if up is None else 'w1'}.weight"] = gate.contiguous()
            if up is not None:
                out[f"{block}.experts.{e}.w3.weight"] = up.contiguous()
        if ".experts." not in n:
            out[n.replace(".mlp.", ".block_sparse_moe.")] = w
    return out


def built(name: str, ranks: int, folder: Path) -> tuple[str, str]:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(description(name)), encoding="utf-8")
    (bundle,) = compile_model(str(path), ["cpu"], ranks=ranks, out=folder / "bundles").bundles
    return bundle.path, bundle.digest


def run(
    bundle: tuple[str, str], ranks: int, weights: dict[str, torch.Tensor], given: dict[str, torch.Tensor], folder: Path
) -> list[torch.Tensor]:
    """What each rank finds."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    save_file({n: w.contiguous() for n, w in weights.items()}, checkpoint / "model.safetensors")
    save_file(given, folder / "question.safetensors")
    asked: dict[str, Any] = {
        "bundle": bundle[0], "digest": bundle[1], "checkpoint": str(checkpoint), "question": str(folder / "question.safetensors"),
        "ranks": ranks, "meet": str(folder / "meet"),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.bundles.rank"]
    each = [{**asked, "rank": rank, "out": str(folder / f"rank{rank}.safetensors")} for rank in range(ranks)]
    running = [subprocess.Popen([*command, json.dumps(one)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for one in each]
    for process in running:
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said[-3000:]
    return [load_file(one["out"])["found"] for one in each]


@pytest.mark.parametrize(
    ("name", "ranks"), [("qwen3", 4), ("minimax", 2), ("step3", 2), pytest.param("minicpm", 2, marks=pytest.mark.full)]
)
def test_ranks_give_the_logits_of_the_whole_model(name: str, ranks: int, tmp_path: Path) -> None:
    """qwen3 over four: its two key heads stand on two ranks each.  The vocabulary of 97 is padded."""
    spec = small_spec(name)
    bundle = built(name, ranks, tmp_path)
    model = with_tables(random_weights(full_depth(spec, "prefill")))
    weights = {n: w.detach() for n, w in (*model.named_parameters(), *model.named_buffers()) if not n.endswith("inv_freq")}
    ids, lengths, following = question(spec.text["vocab_size"])
    given = {"ids": ids, "lengths": lengths, "following": following}
    if spec.parts.vision:
        given |= {"features": torch.randn(1, spec.text["hidden_size"]), "feature_rows": torch.full_like(ids, -1)}
    found = run(bundle, ranks, published(name, weights), given, tmp_path)
    assert all(torch.equal(each, found[0]) for each in found)
    eager = reference_logits(spec, model)
    assert_equal_to_eager(found[0], eager, reference_logits(spec, model.double()))


@pytest.mark.parametrize("name", ["step3", *(pytest.param(name, marks=pytest.mark.full) for name in ("minicpm", "robobrain"))])
def test_a_tower_over_two_ranks(name: str, tmp_path: Path) -> None:
    random, spec, ranks = torch.Generator().manual_seed(2), small_spec(name), 2
    model: Any = random_weights(full_depth(spec, "vision"))
    given = {
        "step3": {"pixels": torch.randn(2, 2, 4, 2, 4, 48, generator=random), "positions": torch.randn(2, 4, 2, 4, 32, generator=random)},
        "minicpm": {
            "pixels": torch.randn(2, 30, 48, generator=random), "positions": torch.randint(100, (2, 30), generator=random),
            "lengths": torch.tensor([30, 17]), "grid": torch.randn(2, 30, 128, generator=random),
        },
        "robobrain": {
            "pixels": torch.randn(6, 4, 96, generator=random), "positions": torch.randint(6, (6, 4, 2), generator=random),
            "window_index": torch.randperm(6, generator=random),
            **{f"bounds.{i}": torch.tensor([0, 8, 24] if i % 2 else [0, 24, 24], dtype=torch.int32) for i in range(5)},
        },
    }[name]  # fmt: skip
    weights = {n: w.detach() for n, w in model.named_parameters()}
    found = run(built(name, ranks, tmp_path), ranks, published(name, weights), given, tmp_path)
    path, digest = built(name, 1, tmp_path)
    undivided = flagtree.load(path, trust=digest).parts["vision"]
    names = published("qwen3", weights)
    (whole,) = undivided.bind({n: names[n] for n in undivided.weights})(given).values()
    assert whole.abs().mean() > 0.05
    for each in found:
        assert rms(each - whole) <= 1e-5 * rms(whole)


def test_what_cannot_be_divided_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="'num_attention_heads' = 4 is no multiple of 8") as found:
        small_spec("minicpm").with_ranks(8)
    assert found.value.hint == "--tp with one of 1, 2"
    with pytest.raises(CaptureError, match="2 key heads neither divide by 3"):
        small_spec("qwen3").with_ranks(3)


def test_the_map_covers_every_weight_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path, _ = built("minimax", 2, tmp_path)
    bundle = open_bundle(path)
    assert bundle.manifest.ranks["count"] == 2
    entry = bundle.manifest.ranks["weights"]["model.layers.{layer}.mlp.experts.gate_up_proj"]  # type: ignore[index]
    stem = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
    assert entry == {"dim": 0, "own": 96, "experts": 6, "ranks": [
        [[f"{stem}.w1.weight", first, last], [f"{stem}.w3.weight", first, last]] for first, last in ((0, 48), (48, 96))]}  # fmt: skip
    save_file({"lm_head.weight": torch.ones(97, 64)}, tmp_path / "a.safetensors")
    checkpoint = Safetensors(tmp_path)
    last = rank_weights(bundle, ["lm_head.weight"], checkpoint, 1)["lm_head.weight"]
    assert last.shape == (64, 64) and last.sum() == 33 * 64  # the vocabulary ends in rank 1, zeros behind it
    with pytest.raises(BindError, match="no 'model.norm.weight'"):
        rank_weights(bundle, ["model.norm.weight"], checkpoint, 0)
    with pytest.raises(BindError, match="no part for rank 2"):
        rank_weights(bundle, ["lm_head.weight"], checkpoint, 2)
