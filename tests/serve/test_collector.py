"""The garbage collector waits while a server's processes import, and works as before once our plug-in is asked."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flagtree.serve import collector, plugin


@pytest.fixture
def left_as_found() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)
    gc.unfreeze()


def test_released_it_is_as_before_and_looks_at_nothing_imported(left_as_found: tuple[int, int, int]) -> None:
    collector.hold()
    collector.hold()
    assert gc.get_threshold() == collector.HELD
    frozen = gc.get_freeze_count()
    plugin.register()
    assert gc.get_threshold() == left_as_found
    assert gc.get_freeze_count() > frozen + 10_000
    frozen = gc.get_freeze_count()
    new: list[list[int]] = [[] for _ in range(10_000)]
    collector.release()
    assert gc.get_threshold() == left_as_found
    assert gc.get_freeze_count() < frozen + len(new), "nothing was held, so nothing more is frozen; what was may have died meanwhile"


def test_the_launcher_holds_in_its_own_process_and_in_those_it_spawns(repository: Path, tmp_path: Path) -> None:
    place = tmp_path / "vllm" / "entrypoints" / "cli"
    place.mkdir(parents=True)
    (tmp_path / "told.py").write_text("import gc\ndef tell():\n    print(gc.get_threshold(), flush=True)\n")
    (place / "main.py").write_text(
        "import multiprocessing, told\n"
        "def main():\n    told.tell()\n"
        "    child = multiprocessing.get_context('spawn').Process(target=told.tell)\n    child.start()\n    child.join()\n"
    )
    command = [sys.executable, "-m", "flagtree.serve.launch", "serve", "model"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{repository}"}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{collector.HELD}\n" * 2


def test_importing_the_launcher_holds_nothing(repository: Path) -> None:
    program = "import gc; before = gc.get_threshold(); import flagtree.serve.launch; assert gc.get_threshold() == before"
    subprocess.run([sys.executable, "-c", program], cwd=repository, check=True)
