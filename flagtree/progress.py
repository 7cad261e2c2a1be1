"""How long work tells what it is doing: phases with a total, advanced by whoever does the work.

The protocol is two methods, so that a pass or a toolchain can report without knowing a terminal; `SILENT` is the default.
The command line has the drawn one (cli/progress.py), which writes to stderr only.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One phase at a time: `phase` ends the one before it.  Called from one thread; worker processes report through their parent."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Start a phase of `total` units of work (kernels, mostly); None where the number is not known."""

    def advance(self, count: int = 1) -> None:
        """`count` more units of the current phase are done."""


class Silent:
    """Reports to nobody."""

    def phase(self, name: str, total: int | None = None) -> None:
        return

    def advance(self, count: int = 1) -> None:
        return


SILENT = Silent()
