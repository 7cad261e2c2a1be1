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
class Driver:
    """A vendor's driver library as data; runtime/driver.py says what each role is called with.

    `libraries`: names to open, best first.  `symbols`: role to exported function.  `shared_free`: bytes of dynamic shared memory that
    a launch may ask for as it is; `shared_attribute`: the function attribute that raises it, None where the launch alone decides.
    `error_returned`: the name of an error is the result of its function, else it is written through a pointer.
    `device`: torch's name for tensors of such a device.  `attributes`: device attributes that `Target.executes` looks at.
    """

    name: str
    libraries: tuple[str, ...]
    symbols: Mapping[str, str]
    shared_free: int
    shared_attribute: int | None = None
    error_returned: bool = False
    device: str = "cuda"
    attributes: tuple[int, ...] = ()


# every case of attention (passes/attention.py), where the language is Triton
TRITON_ATTENTION = dict.fromkeys(
    ("one token", "one token, many heads", "several tokens", "a window", "all keys", "some keys", "packed sequences"),
    frozenset({"bf16", "f16", "f32"}),
)


def _any_device(attributes: tuple[int, ...]) -> bool:
    return True


def _no_device(properties: object) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Target:
    """`language`: the code generator ("cpp" or "triton").  `toolchain`: a module of flagtree.toolchain,
    or the whole name of another one with the same functions (toolchain/base.py).
    `facts_from`: the source of each hardware fact, by field name.  Sizes in bytes, counts plain.  `executes`: do devices with these
    driver attributes run its code; `fit`: how well it fits a device that torch describes (its device properties), 0 for not at all."""

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
    bandwidth: float = 0.0                 # bytes a second of the device's memory, 0 where no figure is public; for pictures only
    peak: float = 0.0                      # f32 operations a second outside matrix units, likewise
    gemm_rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # level, type: rows up to which ours is no slower
    attention: Mapping[str, frozenset[str]] = field(default_factory=dict)  # case (passes/attention.py) to element types that are ours
    lookups: bool = False                  # a bad index found by a kernel can be refused without waiting for a device
    dtypes: frozenset[str] = frozenset()
    options: Mapping[str, object] = field(default_factory=dict)
    facts_from: Mapping[str, str] = field(default_factory=dict)
    probe: Callable[[], Reach] = lambda: Reach("source")
    driver: Driver | None = None
    executes: Callable[[tuple[int, ...]], bool] = _any_device
    fit: Callable[[object], int] = _no_device
