"""Compile cost does not grow with depth: the same kernels and the same steps for 4, 36 and 144 layers.

CPU seconds by depth are measured by benchmarks/compile_cost.py; here the structure that explains them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flagtree.check.report import BundleReport
from flagtree.compile import compile_model

DEPTHS = (4, 36, 144)


@pytest.fixture(scope="module")
def by_depth(small_config: str) -> dict[int, BundleReport]:
    return {layers: compile_model(small_config, ["cpu"], layers=layers).bundles[0] for layers in DEPTHS}


def launch_lists(bundle: BundleReport) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((Path(bundle.path) / "launch").glob("*.json"))}


def without_counts(steps: list[dict[str, Any]]) -> list[object]:
    """What stands in a launch list, less how often and bound to what its repeat runs; names of the last layer's buffers differ."""
    return [without_counts(s["steps"]) if "repeat" in s else s.get("kernel") or s["extern"] for s in steps]


def test_every_depth_has_the_same_kernels(by_depth: dict[int, BundleReport]) -> None:
    digests = {layers: {row.digest for part in bundle.parts for row in part.kernels} for layers, bundle in by_depth.items()}
    assert digests[4] == digests[36] == digests[144]
    libraries = [{p.name: p.read_bytes() for p in (Path(bundle.path) / "lib").iterdir()} for bundle in by_depth.values()]
    assert libraries[0] == libraries[1] == libraries[2]


def test_every_depth_has_the_same_steps_and_binds_all_its_layers(by_depth: dict[int, BundleReport]) -> None:
    for name in ("prefill", "decode"):
        lists = {layers: launch_lists(bundle)[name] for layers, bundle in by_depth.items()}
        steps = [without_counts(launch["steps"]) for launch in lists.values()]
        assert steps[0] == steps[1] == steps[2]
        for layers, launch in lists.items():
            (repeat,) = (step for step in launch["steps"] if "repeat" in step)
            assert repeat["repeat"] == layers - 1  # one period straddles two layers, so the first layer's start stands before it
            bound = {actual for names in repeat["bindings"].values() for actual in names}
            weights = {b["name"] for b in launch["buffers"] if b["role"] == "weight"}
            assert len(weights) == 11 * layers + 3
            assert {w for w in weights if f"layers.{layers - 2}." in w} <= bound


def test_what_a_run_launches_grows_by_the_layer(by_depth: dict[int, BundleReport]) -> None:
    for k in range(2):
        four, many, most = (bundle.parts[k] for bundle in by_depth.values())
        assert four.launches_per_layer == many.launches_per_layer == most.launches_per_layer
        per_layer = (many.launches_total + many.calls_extern - four.launches_total - four.calls_extern) / 32
        assert per_layer == four.launches_per_layer
