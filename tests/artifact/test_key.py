"""Key factors: equal anywhere, different when a factor differs, and a miss says which."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flagtree.artifact.key import KeyFactors, diff, explain_miss
from flagtree.errors import FlagtreeError

FACTORS = {"graph": "abc", "target": "cpu", "versions": {"torch": "2.13.0", "flagtree": "0.1.0"}, "flags": ["-O3"]}


def test_the_digest_is_the_same_in_another_process_home_and_hash_seed(repository: Path, tmp_path: Path) -> None:
    code = f"from flagtree.artifact.key import KeyFactors; print(KeyFactors({FACTORS!r}).digest())"
    seen = set()
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "HOME": str(tmp_path / seed), "PYTHONPATH": str(repository)}
        run = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        seen.add(run.stdout.strip())
    assert seen == {KeyFactors(FACTORS).digest()}


def test_every_factor_changes_the_digest() -> None:
    digest = KeyFactors(FACTORS).digest()
    for name in FACTORS:
        assert KeyFactors({**FACTORS, name: "other"}).digest() != digest
        assert KeyFactors({k: v for k, v in FACTORS.items() if k != name}).digest() != digest


@pytest.mark.parametrize("value", ["/home/me/x", ["-I", "/usr/include"], {"deep": {"er": "/x"}}])
def test_a_place_on_this_machine_is_no_factor(value: object) -> None:
    with pytest.raises(FlagtreeError, match="place on this machine"):
        KeyFactors({"flags": value})


def test_diff_names_each_factor() -> None:
    new = {**FACTORS, "versions": {"torch": "2.14.0", "flagtree": "0.1.0"}, "extra": 1}
    assert diff(FACTORS, new) == ["extra: absent -> 1", "versions.torch: 2.13.0 -> 2.14.0"]
    assert diff(FACTORS, FACTORS) == []
    assert diff({"a": 1}, {}) == ["a: 1 -> absent"]
    (line,) = diff({"text": "a\n" * 500}, {"text": "b\n" * 500})
    assert len(line) < 250
    assert "1000 characters" in line


def test_a_miss_is_explained_by_the_nearest_entry() -> None:
    near = {**FACTORS, "target": "rocm:gfx942"}
    far = {"graph": "zzz"}
    assert explain_miss(FACTORS, [far, near]) == ["target: rocm:gfx942 -> cpu"]
    assert explain_miss(FACTORS, []) == ["nothing of this kind is stored"]
