"""Python's garbage collector waits while a process of a server imports: `hold` before, `release` after, in each process.

Imports make a million objects and next to no garbage, and the collector walks over them again and again: 1.2 of the 6 CPU s for which each
of vLLM's three processes imports.  `python -m flagtree.serve.launch` holds it; our entry point for plug-ins, asked next, releases it.
"""

from __future__ import annotations

import gc

# New objects that start a collection.  Not never: where nobody releases (VLLM_PLUGINS leaves us out) garbage still has an end
HELD = (200_000, 50, 50)

_before: list[tuple[int, int, int]] = []


def hold() -> None:
    """Idempotent until released."""
    if not _before:
        _before.append(gc.get_threshold())
        gc.set_threshold(*HELD)


def release() -> None:
    """As before `hold`, and what was imported is not looked at again; garbage among it stays (16 MB).  Nothing where nothing was held."""
    if _before:
        gc.freeze()
        gc.set_threshold(*_before.pop())
