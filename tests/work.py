"""Work counted in calls, which no other process on the machine can change; seconds belong to benchmarks/."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


def calls(function: Callable[[], object]) -> int:
    """Calls of Python and C functions while `function` runs."""
    total = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal total
        total += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return total
