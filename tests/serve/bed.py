"""A checkpoint with folders of its own, in which the real engine starts; compilers are counted there, and can be put out of reach.

What a process of the engine wrote is kept by name.  With ENGINE_BEDS=FOLDER it is kept for the next run of the tests as well, as long as
neither flagtree nor this folder changed: a long campaign goes on where it stopped.  ENGINE_VISION=FOLDER holds torchvision for models
that see; nothing else may find it, since the public wheel does not import where nobody defines its operators.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flagtree.artifact.bundle import open_bundle
from flagtree.artifact.recording import RecordedGraph, read_recorded
from tests.serve.architectures import ARCHITECTURES

COMPILERS = re.compile(r"([\w.]+-)*(g\+\+|gcc|cc|c\+\+|clang|clang\+\+|c89|c99|cpp)(-[\d.]+)?\Z")
QUIET = {"QUIET": "1"}  # environment of runs that count no compiler: tests/serve/supplied.py
PLAIN = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}
MODE = {"mode": 2, "custom_ops": ["none"]}
VISION = os.environ.get("ENGINE_VISION", "")


@dataclass
class Bed:
    """`kind`: of `ARCHITECTURES`; `changes`: arguments of every run of the engine."""

    kind: str
    folder: Path
    repository: Path
    model: Path
    changes: Mapping[str, Any] = field(default_factory=dict)

    # -- the engine ------------------------------------------------------------------------------------------------------
    def process(self, name: str, runs: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any] | None = None, **env: str) -> Any:
        """Records by name of `runs`, one engine after another in one process, and "compilers": how often one was run."""
        out = self.folder / f"{name}.json"
        if not out.exists():
            before = self.compilers_run
            done = self.start(name, runs, known, **env)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
            record = json.loads(self._written(name).read_text())
            out.write_text(json.dumps({**record, "compilers": self.compilers_run - before}))
        return json.loads(out.read_text())

    def start(
        self, name: str, runs: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any] | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """The same, whatever comes of it."""
        architecture = ARCHITECTURES[self.kind]
        asked = {n: {**r, "arguments": {**architecture.arguments, **self.changes, **r["arguments"]}} for n, r in runs.items()}
        job = self.folder / f"{name}.job.json"
        job.write_text(json.dumps({"model": str(self.model), "image": architecture.image, "runs": asked, "known": known or {}}))
        environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CACHE_ROOT": str(self.folder / "vllm"),
            "PATH": str(self.programs), "CXX": str(self.programs / "g++"), **env,
        }  # fmt: skip
        if architecture.image and VISION:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), VISION)))
        command = [sys.executable, "-m", "tests.serve.engine", str(job), str(self._written(name))]
        return subprocess.run(command, cwd=self.repository, env=environment, capture_output=True, text=True, check=False, timeout=3000)

    def _written(self, name: str) -> Path:
        return self.folder / f"{name}.out.json"

    # -- compilers -------------------------------------------------------------------------------------------------------
    @cached_property
    def programs(self) -> Path:
        """The one folder of PATH: everything that is there, each compiler behind a script that counts, and that fails while
        `no_compiler` says so.  One path in both cases: vLLM's cache key must not see another CXX."""
        folder = self.folder / "programs"
        folder.mkdir(exist_ok=True)
        for place in filter(None, map(Path, os.environ["PATH"].split(":"))):
            for program in place.iterdir() if place.is_dir() else ():
                link = folder / program.name
                if link.exists() or link.is_symlink() or program.is_dir():
                    continue
                if COMPILERS.match(program.name):
                    said = f"echo {program.name} >> {self.folder}/compilers.log"
                    link.write_text(f'#!/bin/sh\n{said}\n[ -e {self.folder}/none ] && exit 127\nexec {program} "$@"\n')
                    link.chmod(0o755)
                else:
                    link.symlink_to(program)
        return folder

    @property
    def compilers_run(self) -> int:
        """Also those that were asked for in vain."""
        log = self.folder / "compilers.log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    # -- from recording to bundle ----------------------------------------------------------------------------------------
    @property
    def recording(self) -> Path:
        return self.folder / "graphs.jsonl"

    def lenient(self) -> dict[str, Any]:
        """Arguments of a start that records what it misses."""
        settings = {"strict": "off", "record": str(self.recording)}
        return {"compilation_config": {**MODE, "backend": "flagtree.serve.bundles.store"}, "additional_config": {"flagtree": settings}}

    def graphs(self) -> list[RecordedGraph]:
        """What a lenient start has recorded."""
        return read_recorded(self.recording)

    def bundle(self) -> Path:
        """What `flagtree compile --graphs` makes of the recording."""
        place = self.folder / "bundles" / "graphs-cpu"
        if not place.exists():
            command = [sys.executable, "-m", "flagtree", "compile", "--graphs", str(self.recording), "--target", "cpu"]
            command += ["-o", str(place.parent)]
            done = subprocess.run(command, cwd=self.repository, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        return place

    def strict(self, how: str) -> dict[str, Any]:
        """Arguments of a start from the bundle."""
        path = self.bundle()
        name = f"flagtree.serve.bundles.d_{open_bundle(path).digest}"
        settings = {"bundle": str(path), "strict": how}
        return {"compilation_config": {**MODE, "backend": name}, "additional_config": {"flagtree": settings}}


def make_bed(kind: str, folder: Path, repository: Path, **changes: Any) -> Bed:
    """A bed in `folder`, or the one that is there."""
    from tests.serve.checkpoints import write

    model = folder / "model"
    if not (model / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write(kind, model)
    return Bed(kind, folder, repository, model, changes)


def unlike(have: Any, want: Any) -> str:
    """What differs in ids or log-probabilities (1e-3) of two runs in fp32; nothing when they are the same."""
    if len({token for ids in want["ids"] for token in ids}) <= 50:
        return "the checkpoint repeats itself: equal ids would prove nothing"
    for number, (ids, wanted) in enumerate(zip(have["ids"], want["ids"], strict=True)):
        if ids != wanted:
            place = next(k for k, (a, b) in enumerate(zip(ids, wanted)) if a != b)
            return f"prompt {number}, token {place}: {ids[place]} instead of {wanted[place]}, margin {want['margins'][number][place]:.2g}"
    far = furthest(have["logprobs"], want["logprobs"])
    return "" if far < 1e-3 else f"a log-probability is {far:.3g} off"


def furthest(have: list[list[float]], want: list[list[float]]) -> float:
    """The greatest difference."""
    return max(abs(a - b) for x, y in zip(have, want, strict=True) for a, b in zip(x, y, strict=True))
