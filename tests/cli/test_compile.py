"""`flagtree compile` for real: a small decoder to a CPU bundle, again from the store, and interrupted in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "dtype": "float32", "model_type": "qwen3", "vocab_size": 97, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "attention_bias": False, "use_sliding_window": False,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A description of a small decoder, in a folder with a blank and letters outside ASCII."""
    path = tmp_path / "größe 1" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(path)


def start(repository: Path, *arguments: str, store: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository), "FLAGTREE_CACHE_DIR": str(store)}
    return subprocess.Popen([sys.executable, *arguments], env=environment, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def test_a_model_becomes_a_bundle_and_the_second_run_takes_it_from_the_store(model: str, repository: Path, tmp_path: Path) -> None:
    command = ("-m", "flagtree", "compile", model, "--target", "cpu", "--json", "-j", "2", "--out", str(tmp_path / "bündel"))
    out, errors = start(repository, *command, store=tmp_path / "store").communicate(timeout=300)
    (bundle,) = json.loads(out)["bundles"]
    assert bundle["cached"] is False, errors
    assert {part["name"] for part in bundle["parts"]} == {"prefill", "decode"}
    for part in bundle["parts"]:
        assert part["kernels"]
        assert 0 < part["totals"]["bytes_after"] < part["totals"]["bytes_before"]
        assert part["launches_total"] == sum(row["launches"] for row in part["kernels"])
    shown, _ = start(repository, "-m", "flagtree", "inspect", bundle["path"], "--json", store=tmp_path / "store").communicate(timeout=60)
    assert json.loads(shown)["digest"] == bundle["digest"]
    assert json.loads(shown)["trusted"] is True

    again = start(repository, "-X", "importtime", *command, store=tmp_path / "store")
    out, imported = again.communicate(timeout=60)
    assert again.returncode == 0, imported[-2000:]
    (second,) = json.loads(out)["bundles"]
    assert (second["cached"], second["digest"]) == (True, bundle["digest"])
    assert not [line for line in imported.splitlines() if line.rpartition("|")[2].strip().split(".")[0] == "transformers"]


@pytest.mark.parametrize("phases", [1, 2, 3])
def test_interrupted_after_any_phase_nothing_is_lost(model: str, phases: int, repository: Path, tmp_path: Path) -> None:
    command = ("-m", "flagtree", "compile", model, "--target", "cpu", "--part", "decode", "-j", "2")
    running = start(repository, *command, store=tmp_path / "store")
    assert running.stderr is not None
    for _ in range(phases):  # one line a finished phase, since stderr is no terminal
        running.stderr.readline()
    time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    if running.returncode != 0:  # 0: it had just ended
        assert running.returncode == 130, errors
        assert errors.splitlines()[-1] == "interrupted: what was finished is kept, run the same command to go on"
        assert "Traceback" not in errors
    done = start(repository, *command, store=tmp_path / "store")
    out, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    assert "decode" in out
