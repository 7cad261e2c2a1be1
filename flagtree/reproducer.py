"""The folder that an internal error leaves behind: command, traceback, versions, and what the failing part attached.

A part attaches files (program text, pass spec) to its exception as `reproducer: dict[str, str]`, name to text; the whole chain
of causes is searched.  Writing never hides the error.  The command line and the runtime call it, each at its outermost frame.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("flagtree-toolkit", "torch", "triton", "transformers", "sympy", "networkx", "jinja2", "numpy")


def write(error: BaseException, command: Sequence[str]) -> Path | None:
    """The folder written, or None where no folder could be."""
    for parent in _places():
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="bug-", dir=parent))
            for name, text in _files(error, command).items():
                (folder / Path(name).name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return folder
    return None


def describe(error: BaseException, folder: Path | None) -> str:
    """What the user reads: one line for the error and where the rest is."""
    line = f"internal error: {type(error).__name__}: {error}"
    if folder is None:
        return "".join(traceback.format_exception(error)) + line
    return f"{line}\n  why: this is a bug in flagtree\n  try: report it with the folder {folder}"


def _places() -> Iterator[Path]:
    try:
        from flagtree.settings import settings

        yield Path(settings.cache_dir) / "bugs"
    except Exception:  # settings themselves may be what is broken
        pass
    yield Path(tempfile.gettempdir())


def _files(error: BaseException, command: Sequence[str]) -> Mapping[str, str]:
    files = {
        "command.txt": shlex.join(command) + f"\n# in {os.getcwd()}\n",
        "traceback.txt": "".join(traceback.format_exception(error)),
        "versions.json": json.dumps(_versions(), indent=1, sort_keys=True) + "\n",
    }
    cause: BaseException | None = error
    while cause is not None:
        files = {**getattr(cause, "reproducer", {}), **files}
        cause = cause.__cause__ or cause.__context__
    return files


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
