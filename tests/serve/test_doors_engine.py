"""Doors other than the whole graph on the real engine: the pieces of mode 3 through a vendor's platform, and single operators.

Needs the extra `vllm`; run with `-m vllm` (docs/serving.md, "Tests").  One process, four engines one after another; the reference is the
engine's own eager mode in the same process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
LAYERS = 2
BUNDLE = {"additional_config": {"flagtree": {"bundle": "a bundle", "digest": "0" * 64}}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA on": ({"enable_lora": True, **BUNDLE}, "LoRA is on"),
    "eager mode": ({"enforce_eager": True, **BUNDLE}, "no door leads to it"),
    "custom_ops at its default": ({"compilation_config": {"mode": 2, "backend": "flagtree.serve.bundles.store"}}, "own operators are on"),
    "no such bundle": ({"compilation_config": {"mode": 3, "custom_ops": ["none"]}, **BUNDLE}, "a bundle"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, Any]:
    """What the process wrote: eager, mode 3 that records and builds, mode 3 again, eager with single operators, and what is refused."""
    from tests.serve import checkpoints

    folder = tmp_path_factory.mktemp("doors")
    model = checkpoints.write("qwen3", folder / "model")
    plugin = folder / "site" / "doors_platform-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: doors-platform\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[vllm.platform_plugins]\ndoors = tests.serve.doors_platform:register\n")
    pieces = {"compilation_config": {"mode": 3, "custom_ops": ["none"]}}
    pieces["additional_config"] = {"flagtree": {"record": str(folder / "graphs.jsonl")}}
    operators = {"enforce_eager": True, "additional_config": {"flagtree": {"custom_ops": True}}}
    runs = [{"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}, pieces, pieces, operators]
    runs += [{**arguments, "refused": True} for arguments, _ in REFUSED.values()]
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(folder / "vllm"), "VLLM_USE_MEGA_AOT_ARTIFACT": "0", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(repository), str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.serve.doors_engine", str(model), str(folder / "out.json"), json.dumps(runs)]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {**json.loads((folder / "out.json").read_text()), "log": done.stdout + done.stderr}


def counts(ran: dict[str, Any], run: int) -> dict[str, Any]:
    return ran["runs"][run]["report"]["flagtree"]


def test_every_door_gives_the_tokens_of_eager(ran: dict[str, Any]) -> None:
    eager, *others = (run["ids"] for run in ran["runs"][:4])
    assert len({token for ids in eager for token in ids}) > 20, "the checkpoint repeats itself: equal ids would prove nothing"
    assert [ids == eager for ids in others] == [True, True, True]


def test_pieces_are_built_at_the_first_start_and_found_at_the_next(ran: dict[str, Any]) -> None:
    first, second = counts(ran, 1), counts(ran, 2)
    assert first["graphs_compiled"] == first["graphs_missing"] == 3  # first, middle, last
    assert first["graphs_found"] == LAYERS + 1
    assert (second["graphs_compiled"], second["graphs_missing"]) == (3, 3)
    assert second["loaded_warm"] == LAYERS + 1
    assert "the pieces between attention: from the store" in ran["log"]


def test_our_class_is_one_of_vllms(ran: dict[str, Any]) -> None:
    assert ran["compiler"] == []


def test_single_operators_answer(ran: dict[str, Any]) -> None:
    assert {"RMSNorm", "SiluAndMul", "RotaryEmbedding"} <= counts(ran, 3)["operators"].keys()
    assert "single operators: norms" in ran["log"]


def test_the_counts_stand_in_vllms_metrics(ran: dict[str, Any]) -> None:
    last = counts(ran, 3)
    assert f'flagtree_graphs_found{{rank="0"}} {float(last["graphs_found"])}' in ran["metrics"]
    assert f'flagtree_compilations_since_start{{rank="0"}} {float(last["compilations"])}' in ran["metrics"]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=list(REFUSED))
def test_what_cannot_work_is_refused_before_weights_are_loaded(ran: dict[str, Any], number: int) -> None:
    run, (_, says) = ran["runs"][4 + number], list(REFUSED.values())[number]
    assert says in run["error"]
    assert run["loaded"] == []
