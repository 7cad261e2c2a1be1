"""Five models at full size for every kind of target: within 120 CPU seconds and 4 GB cold, 5 seconds warm, two builds of the same bytes.

The whole matrix is the campaign's; the plain run has the largest model's decode for the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.main_job.conftest import TARGETS, Place, content

MODELS = ("qwen3", "robobrain2-7b", "minicpmv4", "minimax", "step3")
CPU_SECONDS, BYTES, WARM_SECONDS = 120, 4e9, 5


def resident(session: int) -> int:
    """Bytes that the processes of a session hold, pages that they share counted for each."""
    total = 0
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if int(fields[3]) == session else 0
    return total


def cold(place: Place, *arguments: str, **changes: str) -> tuple[list[dict[str, Any]], float, int]:
    """Bundles, CPU seconds and the most bytes held of one run with an empty store."""
    running, peak = place.start("compile", *arguments, "--json", **changes), 0
    before = os.times()
    while True:
        peak = max(peak, resident(running.pid))
        try:
            running.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            continue
    after = os.times()
    assert running.returncode == 0, (place.folder / "stderr").read_text()[-4000:]
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    return json.loads((place.folder / "stdout").read_text())["bundles"], seconds, peak


def check(new_place: Callable[[str], Place], model: str, target: str, *options: str) -> None:
    first, second = new_place("first"), new_place("second")
    (bundle,), seconds, peak = cold(first, model, "--target", target, *options, "-j", "1", PYTHONHASHSEED="1")
    print(f"{model} {target}: {seconds:.0f} CPU s, {peak / 1e9:.2f} GB, {bundle['kernels']} kernels, {bundle['tiers']}")
    assert seconds <= CPU_SECONDS
    assert peak <= BYTES
    warm = first.run("compile", model, "--target", target, *options, "--json", python=("-X", "importtime"))
    assert warm.cpu <= WARM_SECONDS
    imported = {line.rpartition("|")[2].strip() for line in warm.err.splitlines() if line.startswith("import time:")}
    assert not {name for name in imported if name.split(".")[0] in ("torch", "transformers", "triton")}
    assert json.loads(warm.out)["bundles"][0]["cached"]
    (again,), _, _ = cold(second, model, "--target", target, *options, "-j", "2", PYTHONHASHSEED="2")
    assert again["digest"] == bundle["digest"]
    one, two = content(Path(bundle["path"])), content(Path(again["path"]))
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] == []


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_at_full_size(new_place: Callable[[str], Place], model: str, target: str) -> None:
    check(new_place, model, target)


def test_the_largest_model_for_the_cpu(new_place: Callable[[str], Place]) -> None:
    check(new_place, "step3", "cpu", "--part", "decode")


def test_kernels_that_two_models_share_are_built_once(new_place: Callable[[str], Place]) -> None:
    """Qwen2.5-VL-7B and RoboBrain2.0-7B are one architecture: the second builds nothing; its bundle is the same kernels."""
    place = new_place("shared")
    (first,) = place.compile("robobrain2-7b", "--target", "cpu", "--part", "decode")
    (second,) = place.compile("qwen2.5-vl-7b", "--target", "cpu", "--part", "decode")
    assert first["stored"] == 0
    assert second["stored"] == second["kernels"] == first["kernels"] > 0
