"""Running `flagtree` as a user does: a process of its own, in folders that nothing else uses, with its CPU seconds counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TARGETS = ("cpu", "metax", "cuda:sm90", "rocm:gfx942")


@dataclass(frozen=True)
class Place:
    """Where a command runs: its working folder, its home and its store; all of a user's own."""

    folder: Path
    repository: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def environment(self, **changes: str) -> dict[str, str]:
        """What the command sees; nothing of the test's own flagtree or Triton settings."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGTREE_", "TRITON_", "XDG_", "PYTHON"))}
        own = {
            "HOME": str(self.folder / "home"), "FLAGTREE_CACHE_DIR": str(self.store), "PYTHONPATH": str(self.repository), "COLUMNS": "100",
        }  # fmt: skip
        return {**inherited, **own, **changes}

    def start(self, *arguments: str, python: tuple[str, ...] = (), **changes: str) -> subprocess.Popen[bytes]:
        """The command, started in a session of its own, with `stdout` and `stderr` as files in the folder."""
        for needed in (self.work, self.folder / "home"):
            needed.mkdir(parents=True, exist_ok=True)
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("wb") as err:
            command = [sys.executable, *python, "-m", "flagtree", *arguments]
            return subprocess.Popen(command, cwd=self.work, env=self.environment(**changes), stdout=out, stderr=err, start_new_session=True)

    def run(self, *arguments: str, python: tuple[str, ...] = (), **changes: str) -> Ended:
        """The command, waited for."""
        running = self.start(*arguments, python=python, **changes)
        _, status, used = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
        out, err = ((self.folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
        return Ended(running.returncode, out, err, used.ru_utime + used.ru_stime)

    def compile(self, *arguments: str, **changes: str) -> list[dict[str, Any]]:
        """`flagtree compile … --json`, which must succeed: its bundles."""
        ended = self.run("compile", *arguments, "--json", **changes)
        assert ended.code == 0, ended.err[-4000:]
        return json.loads(ended.out)["bundles"]


@dataclass(frozen=True)
class Ended:
    """How a command ended; `cpu`: its CPU seconds and those of every process that it waited for."""

    code: int
    out: str
    err: str
    cpu: float

    def error(self) -> str:
        """The one clear error of a command that failed by the user's fault: exit code 2, nothing on stdout, no traceback."""
        assert self.code == 2, (self.code, self.err[-2000:])
        assert self.out == ""
        assert "Traceback" not in self.err
        assert self.err.count("error: ") == 1
        return self.err[self.err.index("error: ") :]


@pytest.fixture(scope="session")
def new_place(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Callable[[str], Place]:
    """`new_place("name")`: an empty place."""
    return lambda name: Place(tmp_path_factory.mktemp(name, numbered=True), repository)


@pytest.fixture
def place(new_place: Callable[[str], Place]) -> Place:
    return new_place("place")


def content(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle by name."""
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}


SMALL = {
    "architectures": ["Qwen3ForCausalLM"], "dtype": "float32", "model_type": "qwen3", "vocab_size": 97, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config.json of a small Qwen3, in a folder with a blank and letters outside ASCII."""
    path = tmp_path_factory.mktemp("größe") / "模型 klein" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    return str(path)
