"""A small checkpoint written through our map loads through vLLM's own loader and gives the same logits and features.

Needs the extra `vllm`; run with `-m vllm`.  vLLM's definition of these models is the second path that ours is checked against.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["step3", "minicpm"])
def test_text_and_tower_are_those_of_vllm(kind: str, tmp_path: Path, repository: Path) -> None:
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "HF_HUB_OFFLINE": "1",
                   "HF_MODULES_CACHE": str(tmp_path / "modules")}  # fmt: skip
    command = [sys.executable, "-m", "tests.capture.vllm_reference", kind, str(tmp_path)]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"text", "vision"} | ({"crop"} if kind == "step3" else set())
    for name, (difference, magnitude) in found.items():
        assert magnitude > 0.1, name
        assert difference < 2e-4 * max(1.0, magnitude), (name, difference, magnitude)
