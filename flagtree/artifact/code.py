"""The identity of our own code: a key factor, so that a changed compiler never reuses what an older one made.

A hash over the sources as installed; reading them costs a few milliseconds and imports nothing.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_COMPILER = ("capture", "codegen", "ir", "lower", "passes", "targets", "toolchain", "runtime")


@functools.cache
def code_digest() -> str:
    """16 hex digits over every source file of the compiler and the runtime, by name and content."""
    root = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for package in _COMPILER:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".j2", ".h", ".c", ".cpp"):
                total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
