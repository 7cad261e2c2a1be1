"""`flagtree verify` on what `flagtree compile` wrote, each in a process of its own, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.main_job.conftest import Place, content

WAYS = {"cpu": "native", "metax": "maca-ir (emulated)", "cuda:sm90": "same TTIR through MACA lowering; ptx/hsaco not executed"}


def verified(place: Place, target: str, *arguments: str) -> tuple[dict[str, Any], float]:
    """Compile, verify; the report of the second, and its CPU seconds."""
    (bundle,) = place.compile(*arguments, "--target", target)
    before = content(Path(bundle["path"]))
    ended = place.run("verify", bundle["path"], "--rebuild", "--json")
    assert ended.code == 0, (ended.out[-2000:], ended.err[-4000:])
    after = content(Path(bundle["path"]))
    assert {name for name in after if after[name] != before.get(name)} == {"certificate.json"}
    found = json.loads(ended.out)
    assert found["digest"] == bundle["digest"] and found["failed"] == 0 and len(found["kernels"]) == bundle["kernels"]
    assert found["rebuilt"]["differs"] == [] and found["rebuilt"]["changed"] == {}
    parts = [name for name in after if name.startswith("launch/") and name.endswith(".ir")]
    assert parts and found["rebuilt"]["compared"]["launch lists"] == len(parts) and set(parts) <= set(found["rebuilt"]["inputs"])
    for row in found["kernels"]:
        assert (row["verdict"], row["eager"]) == ("pass", "compared"), row
        least = 32 if row["left_out"] else 33  # what a CPU would compute too long for
        assert row["runs"] >= least and row["gate"] and all(way.startswith(WAYS[target]) for way in row["executed"])
        # attention rounds at other places than eager does
        attention = row["ops"] == ["flagtree.attend.default"]
        assert row["equal_to_interpreter"] > (0.85 if attention else 0.95) and row["equal_to_eager"] > (0.7 if attention else 0.95), row
    return found, ended.cpu


@pytest.mark.parametrize("target", ["cpu", "cuda:sm90"])
def test_a_small_model(place: Place, small_config: str, target: str) -> None:
    verified(place, target, small_config, "--part", "decode", "--layers", "2", "--dtype", "bf16")


@pytest.mark.full
@pytest.mark.parametrize("target", ["cpu", "metax"])
def test_qwen3_8b_in_three_minutes(place: Place, target: str) -> None:
    found, seconds = verified(place, target, "qwen3")
    # the attention of both parts on a GPU; on the CPU that of decode, and the product of a few rows
    assert len(found["kernels"]) == 19
    assert seconds <= 180, seconds
    left_out = [reason for row in found["kernels"] for reason in row["left_out"]]
    assert all("at the upper end: " in reason for reason in left_out)
    assert bool(left_out) == (target == "cpu")  # which computes every row; of a grid blocks are chosen
