"""A bundle alone gives transformers' logits: compiled here, served by a process that has neither transformers nor a compiler.

The measure is the project's "Equal to eager": error against float64 at most four times transformers' own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from flagtree.compile import compile_model
from tests.bundles import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = ((1,), (33,), (19, 1, 7))


@dataclass(frozen=True)
class Served:
    """What the serving process answered and told, with what transformers says, per request: [1 + STEPS, B, V]."""

    logits: dict[str, torch.Tensor]
    eager: dict[str, torch.Tensor]
    truth: dict[str, torch.Tensor]
    names: list[str]
    told: dict[str, Any]


def serve(bundle: str, digest: str, folder: Path, repository: Path) -> dict[str, Any]:
    """Run the consumer where nothing is in PATH, the compiler's name leads nowhere, and neither home nor store is ours."""
    environment = {
        "PATH": "", "FLAGTREE_CXX": "/nonexistent", "HOME": str(folder / "no home"), "FLAGTREE_CACHE_DIR": str(folder / "no store"),
        "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("consumer.py")), bundle, digest, str(folder)]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "told.json").read_text())


def build_and_serve(config: dict[str, Any], dtype: str, folder: Path, repository: Path, *, keep: bool = True) -> Served:
    description = reference.describe(folder / "model.yaml", config, dtype)
    (built,) = compile_model(str(description), ["cpu"], out=folder / "bundles").bundles
    asked = reference.requests(config["vocab_size"], LENGTHS)
    model = reference.random_model(config, DTYPES[dtype])
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    tensors = {f"{n}/{f}": getattr(r, f).contiguous() for n, r in asked.items() for f in ("ids", "lengths", "following")}
    safetensors.torch.save_file(tensors, folder / "requests.safetensors")
    eager = {name: reference.eager(model, request) for name, request in asked.items()}
    names = sorted(weights)
    del weights
    exact = reference.in_float64(model, keep=keep)
    truth = {name: reference.truth(exact, request) for name, request in asked.items()}
    del model, exact
    told = serve(built.path, built.digest, folder, repository)
    logits = safetensors.torch.load_file(folder / "logits.safetensors")
    (folder / "weights.safetensors").unlink()
    return Served(logits, eager, truth, names, told)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: a second thread would only wait, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Served:
    """All 36 layers at width 256."""
    return build_and_serve(reference.SMALL, request.param, tmp_path_factory.mktemp("small"), repository)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_equal_to_eager(served: Served) -> None:
    assert set(served.logits) == set(served.eager)
    for name, ours in served.logits.items():
        eager, truth = served.eager[name], served.truth[name]
        assert (ours.dtype, ours.shape) == (eager.dtype, eager.shape)
        assert ours.isfinite().all(), name
        for step in range(len(ours)):
            error, own = rms(ours[step] - truth[step]), rms(eager[step] - truth[step])
            assert error <= 4 * own + 1e-6 * float(truth[step].abs().mean()), (name, step, error, own)


def test_a_prefill_and_sixteen_decode_steps_give_the_logits_of_transformers(small: Served) -> None:
    assert_equal_to_eager(small)


def test_the_question_is_a_hard_one(small: Served) -> None:
    """Logits that are far from zero and differ between steps and sequences: equal ones would prove nothing."""
    for truth in small.truth.values():
        assert rms(truth) > 0.1
        assert rms(truth[1:] - truth[:-1]) > 0.5 * rms(truth)


def test_in_float32_the_most_likely_token_is_the_same(small: Served) -> None:
    for name, eager in small.eager.items():
        if eager.dtype == torch.float32:
            assert torch.equal(small.logits[name].argmax(-1), eager.argmax(-1))


def test_the_server_had_no_compiler_and_no_transformers(small: Served) -> None:
    assert small.told["attempts"] == []
    assert not [m for m in small.told["modules"] if m.split(".")[0] in ("transformers", "triton", "networkx", "jinja2")]


def test_the_weights_are_those_of_the_checkpoint(small: Served) -> None:
    for names in small.told["weights"].values():
        assert set(small.names) <= set(names)
        assert {n for n in names if n not in small.names} <= {"model.rotary_emb.inv_freq"}


def test_the_calls_that_are_left_are_listed(small: Served) -> None:
    """Matrix products of many rows (7 a layer in prefill), attention of prompts, rows of the embedding and of the last tokens only.
    The head and the products of decode have as many rows as the batch, at most 4 here; attention of one token is ours too."""
    left = {part: {callee: count for callee, count, _ in rows} for part, rows in small.told["externs"].items()}
    both = {"aten.embedding.default": 1}
    prefill = {"flagtree.attend.default": 36, "aten.linear.default": 7 * 36, "aten.index.Tensor": 1}
    assert left == {"prefill": {**both, **prefill}, "decode": both}
    assert all(reason for rows in small.told["externs"].values() for _, _, reason in rows)


@pytest.mark.full
def test_four_layers_at_true_width(tmp_path: Path, repository: Path) -> None:
    """4096 wide, 12288 in the middle, 32 heads of 128 over 8, bf16.  Needs 12 GB of memory."""
    served = build_and_serve(reference.WIDE, "bfloat16", tmp_path, repository, keep=False)
    assert_equal_to_eager(served)
    assert served.told["attempts"] == []
    left = {part: {callee: count for callee, count, _ in rows} for part, rows in served.told["externs"].items()}
    rest = {"aten.embedding.default": 1}
    prefill = {**rest, "flagtree.attend.default": 4, "aten.linear.default": 7 * 4, "aten.index.Tensor": 1}
    assert left == {"prefill": prefill, "decode": rest}
