"""What every toolchain module returns for a kernel: files of all tiers that it reached, and what a launch needs.

Each module has `build(kernels: Sequence[tuple[str, Program]], target, jobs, progress) -> list[BuiltKernel]`, in the kernels' order;
bytes depend on the sources, the target and the toolchain's version only, never on `jobs`, folders or time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """One kernel, built.

    `digest`: the kernel digest.  `tier`: the highest of targets.base.TIERS reached; `missing`: why not the next one, or not for
    every level, and what to install; "" when nothing is missing.  `files`: name to bytes ("kernel.cpp", "x86-64-v3.o",
    "aligned.cubin", …).  `launch`: JSON for the runtime ({"symbol": …} on the CPU).  `facts`: JSON that the toolchain tells
    (registers, spills, sizes in bytes).
    """

    digest: str
    tier: str
    missing: str
    files: Mapping[str, bytes]
    launch: Mapping[str, object]
    facts: Mapping[str, object] = field(default_factory=dict)
