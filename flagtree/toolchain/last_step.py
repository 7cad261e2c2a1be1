"""The last step of a kernel, by a tool in a process of its own: what a tool is given, how it is run, and what is checked of its result.

Invariant: what a tool says is checked before it is believed (toolchain.device_binary), and a tool that fails, hangs or prints
nonsense is one ToolchainError of its kernel.  `finishers.py` finds the tool, `flagtree/finalize.py` asks it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flagtree.errors import BundleError, ToolchainError
from flagtree.targets.base import Target
from flagtree.toolchain import device_binary
from flagtree.toolchain.triton_aot import check_variant

SECONDS = 600.0  # for one kernel; a vendor's compiler at its slowest takes tens
_OF_THE_BINARY = ("registers", "scalar_registers", "spills")
KEPT_WORDS = 1500  # characters of a tool's own message that an error repeats


@dataclass(frozen=True, slots=True)
class Work:
    """One kernel as it stands in the bundle: `files` by name, `launch` and `facts` of the manifest."""

    digest: str
    files: Mapping[str, bytes]
    launch: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def function(self) -> str:
        return str(self.launch["function"])


@dataclass(frozen=True, slots=True)
class Finished:
    """What a tool made of one kernel: `files` to add or replace, and the kernel's whole new `launch` and `facts`."""

    files: Mapping[str, bytes]
    launch: Mapping[str, Any]
    facts: Mapping[str, Any]


class Tool(Protocol):
    """`route`: a short name.  `version`: in words, for people and manifests.  `fingerprint`: hash of what decides its bytes.
    `made_from`: which of the kernel's texts it compiles.  `finish` raises ToolchainError, or BundleError for a kernel that lacks a text."""

    @property
    def route(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def made_from(self) -> str: ...

    def finish(self, work: Work) -> Finished: ...


def run(command: Sequence[str], folder: Path, seconds: float, where: str, environment: Mapping[str, str] | None = None) -> str:
    """What the command printed.  ToolchainError when it cannot start, fails, or has not ended in time; what it started is killed."""
    name, log = Path(command[0]).name, folder / "log"
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                       env=environment, start_new_session=True)  # fmt: skip
        except OSError as error:
            why = error.strerror or str(error)
            raise ToolchainError(f"{name} cannot be started", where=command[0], why=why, hint="name another tool") from error
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            hint = "--timeout SECONDS waits longer"
            raise ToolchainError(f"{name} did not finish", where=where, why=f"it ran for {seconds:g} s", hint=hint) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = _tail(log)
    if process.returncode:
        why = f"exit status {process.returncode}: {said.strip()[-KEPT_WORDS:] or 'no message'}"
        raise ToolchainError(f"{name} failed", where=where, why=why, hint=f"the command was: {' '.join(map(_without_folder, command))}")
    return said


def _tail(log: Path, most: int = 1 << 16) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - most))
        return file.read().decode("utf-8", "replace")


def _without_folder(word: str) -> str:
    return Path(word).name if word.startswith(tempfile.gettempdir()) else word


@contextlib.contextmanager
def desk(work: Work, *needed: str) -> Iterator[Path]:
    """A temporary folder with the kernel's texts in it.  BundleError when the bundle has not all that is `needed`."""
    absent = [name for name in needed if name not in work.files]
    if absent:
        hint = "compile the model again on a machine with Triton, or use another tool"
        raise BundleError("the bundle lacks a text of this kernel", where=work.function, why=f"no {', '.join(absent)}", hint=hint)
    with tempfile.TemporaryDirectory(prefix="flagtree-finalize-") as name:
        folder = Path(name)
        for text in needed:
            (folder / text).write_bytes(work.files[text])
        yield folder


def result_of(path: Path, where: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if not data:
        raise ToolchainError("the toolchain left no result", where=where, why=f"no {path.name}, or an empty one")
    return data


def finished(work: Work, files: Mapping[str, bytes], binary: str, told: Mapping[str, Mapping[str, int]], target: Target) -> Finished:
    """The kernel with binaries `<variant>.<binary>`; `told` is what tool and file say of each variant, checked here.

    Launch numbers that nobody told stay as they were built; registers are of one binary only and do not.
    """
    variants, facts = {}, dict(work.facts)
    for name, new in told.items():
        where = f"{work.function}, variant {name}, for {target.name}"
        old = work.launch["variants"][name]
        new = {**device_binary.check(files[f"{name}.{binary}"], binary, work.function, where), **new}
        if new.get("warps", work.launch["warps"]) != work.launch["warps"]:
            why = f"{new['warps']} warps, not {work.launch['warps']}"
            raise ToolchainError("the result is launched with other threads", where=where, why=why)
        shared = new.get("shared", old["shared"])
        limits = {"scratch": 0, "threads": work.launch["threads"], **new, "shared": shared}
        check_variant(limits, len(work.launch["signature"]), target, where)
        nulls = new["arguments"] - len(work.launch["signature"]) if "arguments" in new else old["null_pointers"]
        variants[name] = {**old, "file": f"{name}.{binary}", "shared": shared, "null_pointers": nulls}
        if f"{name}.llir" in work.files and shared != old["shared"]:
            variants[name].setdefault("llir_shared", old["shared"])  # the emulator goes on executing the LLVM IR
        stay = {k: v for k, v in facts.get(name, {}).items() if k not in _OF_THE_BINARY}
        facts[name] = {**stay, **{k: v for k, v in new.items() if k in _OF_THE_BINARY}, "shared": shared}
    return Finished(files, {**work.launch, "variants": variants, "shared": max(v["shared"] for v in variants.values())}, facts)


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_program(name: str) -> Path:
    """A program by path or by its name in PATH.  ToolchainError when there is none."""
    found = shutil.which(name)
    if found is None:
        raise ToolchainError(f"there is no program '{name}'", why="it is neither in PATH nor an executable file", hint="give its path")
    return Path(found)
