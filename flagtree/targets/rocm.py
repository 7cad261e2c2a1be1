"""AMD GPUs: facts about each architecture that we compile for, and a look for the chip on this machine.

Invariant: 64-lane wavefronts; the facts name their source.  Registered by flagtree.targets; the toolchain is stock Triton ahead of time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from flagtree.targets.base import TRITON_ATTENTION, Driver, Reach, Target
from flagtree.targets.stock_triton import reach

_CDNA = "AMD Instinct MI200 and MI300 Instruction Set Architecture, reference guides: work-group limits and LDS"
_DTYPES = frozenset({"b1", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"})
_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")  # the kernel driver's own list; gfx_target_version 90402 is gfx942
DRIVER = Driver(
    name="the HIP runtime",
    libraries=("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"),
    symbols={
        "init": "hipInit", "count": "hipGetDeviceCount", "device": "hipDeviceGet", "current": "hipGetDevice", "set_current": "hipSetDevice",
        "load": "hipModuleLoadData", "function": "hipModuleGetFunction", "launch": "hipModuleLaunchKernel", "error_name": "hipGetErrorName",
    },
    shared_free=64 * 1024,  # the whole LDS of a work-group; Triton's own HIP launcher sets no attribute either
    error_returned=True,
)  # fmt: skip


def _fit(architecture: str, properties: object) -> int:
    return int(str(getattr(properties, "gcnArchName", "")).split(":")[0] == architecture)


def has_device(architecture: str) -> bool:
    """Whether the kernel driver lists a device of this architecture."""
    digits = architecture.removeprefix("gfx")
    wanted = f"gfx_target_version {int(digits[:-2]) * 10000 + int(digits[-2], 16) * 100 + int(digits[-1], 16)}\n"
    try:
        return any(wanted in (node / "properties").read_text() for node in _TOPOLOGY.iterdir())
    except OSError:
        return False


def _probe(architecture: str) -> Reach:
    return reach(partial(has_device, architecture))


def _target(architecture: str, description: str, *aliases: str, of: str, terabytes: float, teraflops: float) -> Target:
    """One architecture; `terabytes` a second and f32 `teraflops` of the vector units are those of the product `of`."""
    return Target(
        name=f"rocm:{architecture}",
        family="rocm",
        description=description,
        language="triton",
        toolchain="triton_aot",
        tiers=("source", "ttir", "llir", "binary"),
        aliases=aliases,
        triton=("hip", architecture, 64),
        warp=64,
        max_threads=1024,
        shared_bytes=64 * 1024,
        row_limit=16384,
        bandwidth=terabytes * 1e12,
        peak=teraflops * 1e12,
        attention=TRITON_ATTENTION,
        dtypes=_DTYPES,
        facts_from={
            "warp": f"{_CDNA}: wave64",
            "max_threads": f"{_CDNA}: 16 wavefronts in a work-group",
            "shared_bytes": f"{_CDNA}: 64 KiB of LDS in a work-group",
            "dtypes": "8-bit floats are left out: gfx942 has the FNUZ forms, which are not the IR's",
            "bandwidth": f"AMD's data sheet of the {of}",
            "peak": f"AMD's data sheet of the {of}: peak single precision, vector",
            "row_limit": "ours: 16 elements a thread with 16 wavefronts",
        },
        probe=partial(_probe, architecture),
        driver=DRIVER,
        fit=partial(_fit, architecture),
    )


TARGETS = (
    _target("gfx942", "AMD Instinct MI300A, MI300X, MI325X (CDNA 3)", "amd", "rocm", of="MI300X", terabytes=5.3, teraflops=163.4),
    _target("gfx90a", "AMD Instinct MI210, MI250 (CDNA 2)", of="MI250X", terabytes=3.2, teraflops=47.9),
)
