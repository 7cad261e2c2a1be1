"""The identity of our own code: a key factor, so that a changed compiler never reuses what an older one made.

A hash over the sources as installed; reading them costs a few milliseconds and imports nothing.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_OUTSIDE = ("cli", "serve")  # packages that print or serve: no byte of a result depends on them


@functools.cache
def code_digest() -> str:
    """16 hex digits over every source file of ours, by name and content, less those that only print or serve."""
    root = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.suffix in (".py", ".j2", ".h", ".c", ".cpp") and name.parts[0] not in _OUTSIDE:
            total.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
