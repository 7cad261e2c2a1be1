"""Stock Triton on this machine: is a release installed that our toolchain is tested with, and what to install if not.

Reads package metadata only; importing Triton happens in the toolchain's worker processes alone.
Used by the target families that stock Triton compiles for (cuda, rocm) and by toolchain.triton_aot.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from flagtree.targets.base import Reach

FIRST, AFTER = (3, 6), (3, 10)  # releases that tests/toolchain/test_triton_aot.py has passed on: 3.6 to 3.9
INSTALL = 'pip install "flagtree-toolkit[triton]"'


def installed() -> str | None:
    """The release of the installed `triton` distribution, None when there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def problem() -> str:
    """Why Triton cannot be used here; empty when it can."""
    version = installed()
    if version is None:
        return "Triton is not installed"
    try:
        release = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return f"Triton has an unknown version {version}"
    if not FIRST <= release < AFTER:
        return f"Triton {version} is installed; supported are {'.'.join(map(str, FIRST))} up to, not including, {'.'.join(map(str, AFTER))}"
    return ""


def reach(has_device: Callable[[], bool]) -> Reach:
    """The binary with a supported Triton, else source; `device` executes it where `has_device` finds the chip."""
    why = problem()
    if why:
        return Reach("source", missing=f"ttir and the binary: {why}", how=INSTALL)
    return Reach("binary", executes="device" if has_device() else "")
