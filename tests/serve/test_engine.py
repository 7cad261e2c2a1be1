"""The real engine of vLLM, from recording to a strict second start; the reference is its own eager mode in the same process layout.

Needs the extra `vllm`; run with `-m vllm` (docs/serving.md, "Tests").  Each test is one or two starts of the engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flagtree.artifact.bundle import open_bundle

pytestmark = pytest.mark.vllm
KINDS = ("qwen3", "qwen3_moe")
PLAIN = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}


@dataclass
class Bed:
    """A checkpoint and folders of its own; `run` starts the engine and returns what it wrote."""

    folder: Path
    repository: Path
    model: Path
    counted: Path
    runs: dict[str, Any] = field(default_factory=dict)

    def start(self, name: str, arguments: dict[str, Any], model: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        out = self.folder / f"{name}.json"
        environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1",
            "VLLM_CACHE_ROOT": str(self.folder / "vllm"), "VLLM_LOGGING_LEVEL": "WARNING", "CXX": str(self.counted), **env,
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.serve.engine", str(model or self.model), str(out), json.dumps(arguments)]
        return subprocess.run(command, cwd=self.repository, env=environment, capture_output=True, text=True, check=False, timeout=900)

    def run(self, name: str, arguments: dict[str, Any], **env: str) -> Any:
        if name not in self.runs:
            done = self.start(name, arguments, **env)
            assert done.returncode == 0, done.stderr[-6000:]
            self.runs[name] = json.loads((self.folder / f"{name}.json").read_text())
        return self.runs[name]

    @property
    def compilers_run(self) -> int:
        log = self.counted.with_suffix(".log")
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module", params=KINDS)
def bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Bed:
    from tests.serve import checkpoints

    folder = tmp_path_factory.mktemp(request.param)
    counted = folder / "cxx"
    # counts, and is out of reach while a file says so: vLLM's cache key must not see another CXX
    counted.write_text(f'#!/bin/sh\n[ -e {folder}/none ] && exit 127\necho run >> {folder}/cxx.log\nexec g++ "$@"\n')
    counted.chmod(0o755)
    return Bed(folder, repository, checkpoints.write(request.param, folder / "model"), counted)


def recording(bed: Bed) -> Any:
    settings = {"strict": "off", "record": str(bed.folder / "graphs.jsonl")}
    compilation = {"mode": 2, "backend": "flagtree.serve.bundles.store", "custom_ops": ["none"]}
    return bed.run("off", {"compilation_config": compilation, "additional_config": {"flagtree": settings}})


def bundle(bed: Bed) -> Path:
    recording(bed)
    place = bed.folder / "bundles" / "graphs-cpu"
    if not place.exists():
        command = [sys.executable, "-m", "flagtree", "compile", "--graphs", str(bed.folder / "graphs.jsonl"), "--target", "cpu"]
        command += ["-o", str(place.parent)]
        done = subprocess.run(command, cwd=bed.repository, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return place


def strict(bed: Bed, how: str) -> dict[str, Any]:
    path = bundle(bed)
    name = f"flagtree.serve.bundles.d_{open_bundle(path).digest}"
    settings = {"bundle": str(path), "strict": how}
    return {"compilation_config": {"mode": 2, "backend": name, "custom_ops": ["none"]}, "additional_config": {"flagtree": settings}}


def assert_same(have: Any, want: Any) -> None:
    assert len({token for ids in want["ids"] for token in ids}) > 50, "the checkpoint repeats itself: equal ids would prove nothing"
    assert have["ids"] == want["ids"]
    assert max(abs(a - b) for x, y in zip(have["logprobs"], want["logprobs"]) for a, b in zip(x, y)) < 1e-3


def test_a_lenient_start_records_builds_and_equals_eager(bed: Bed) -> None:
    have = recording(bed)
    assert_same(have, bed.run("eager", PLAIN))
    counts = have["reports"][0]["flagtree"]
    assert (counts["graphs_missing"], counts["graphs_compiled"]) == (1, 1)


def test_a_strict_start_compiles_nothing(bed: Bed) -> None:
    arguments = strict(bed, "serve")
    before = bed.compilers_run
    have = bed.run("first", arguments)
    assert_same(have, bed.run("eager", PLAIN))
    (report,) = have["reports"]
    assert bed.compilers_run == before
    assert report["dynamo"]["stats"]["unique_graphs"] == 1
    assert report["compiler_imported"] == []
    assert report["inductor_kernels"] == 0
    counts = report["flagtree"]
    assert (counts["graphs_found"], counts["graphs_missing"], counts["graphs_compiled"]) == (1, 0, 0)
    assert not [callee for callee in counts["externs"] if callee.startswith("aten.") and callee.split(".")[1] not in BY_LIBRARY]


BY_LIBRARY = ("linear", "embedding", "topk")


def test_the_second_start_traces_nothing_even_without_a_compiler(bed: Bed) -> None:
    first = bed.run("first", strict(bed, "serve"))
    (bed.folder / "none").touch()
    try:
        have = bed.run("second", strict(bed, "serve"), FLAGTREE_CXX=str(bed.folder / "nowhere"), VLLM_FORCE_AOT_LOAD="1")
    finally:
        (bed.folder / "none").unlink()
    assert have["ids"] == first["ids"]
    (report,) = have["reports"]
    assert report["dynamo"] == {}
    assert report["compiler_imported"] == []
    assert report["vllm"]["num_aot_artifacts_loaded"] == 1
    assert report["flagtree"]["loaded_warm"] == 1


def test_single_operators_answer_in_eager_mode(bed: Bed) -> None:
    have = bed.run("operators", {"enforce_eager": True, "additional_config": {"flagtree": {"custom_ops": True}}})
    assert_same(have, bed.run("eager", PLAIN))
    assert {"RMSNorm", "RotaryEmbedding"} <= have["reports"][0]["flagtree"]["operators"].keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "bfloat16"}, "another element type"),
        ({"compilation_config": {"mode": 2, "backend": "flagtree"}}, "flagtree.serve.bundles.d_"),
    ],
)
def test_bad_input_stops_before_weights_are_loaded(bed: Bed, change: dict[str, Any], says: str) -> None:
    if bed.model.parent.name.startswith("qwen3_moe"):
        return  # what is refused does not depend on the architecture
    arguments = strict(bed, "start")
    for name, value in change.items():
        arguments[name] = {**arguments[name], **value} if name == "compilation_config" else value
    done = bed.start("refused", arguments)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Loading safetensors" not in done.stderr
