"""What a target is: facts about a chip family and the tiers that its code can reach.  One file a family; data first.

Passes and code generation read only these fields, never a target's name.  `probe` looks at this machine;
the toolchain named by `toolchain` turns source into binaries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

TIERS = ("source", "ttir", "llir", "binary")


@dataclass(frozen=True, slots=True)
class Reach:
    """How far source gets on this machine: the tier, what is missing for the next one and how to get it."""

    tier: str
    missing: str = ""
    how: str = ""
    executes: str = ""  # what can execute the result here: "native", "emulator", "device" or ""


@dataclass(frozen=True, slots=True)
class Target:
    """`language`: the code generator ("cpp" or "triton").  `toolchain`: a module of flagtree.toolchain.
    `facts_from`: the source of each hardware fact, by field name.  Sizes in bytes, counts plain."""

    name: str
    family: str
    description: str
    language: str
    toolchain: str
    tiers: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()           # instruction-set levels, one object each (cpu)
    triton: tuple[str, object, int] | None = None  # GPUTarget(backend, arch, warp size)
    warp: int = 1
    max_threads: int = 1                   # per program instance
    shared_bytes: int = 0                  # per program instance
    row_limit: int = 65536                 # longest reduced row kept in one tile, in elements
    dtypes: frozenset[str] = frozenset()
    options: Mapping[str, object] = field(default_factory=dict)
    facts_from: Mapping[str, str] = field(default_factory=dict)
    probe: Callable[[], Reach] = lambda: Reach("source")
