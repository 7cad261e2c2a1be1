"""NVIDIA GPUs: facts about each compute capability that we compile for, and a look for the chip on this machine.

Invariant: `ptx_version` is what the oldest driver named in `facts_from` reads, so that it can still translate our PTX where it
refuses the cubin.  Registered by flagtree.targets; the toolchain is stock Triton ahead of time.
"""

from __future__ import annotations

import ctypes
from functools import partial

from flagtree.targets.base import TRITON_ATTENTION, Driver, Reach, Target
from flagtree.targets.stock_triton import reach

_CAPABILITY = "CUDA C++ Programming Guide 13.0, appendix Compute Capabilities, table Technical Specifications"
_PTX = "PTX ISA, Release Notes: version and the CUDA driver that brought it"
_DTYPES = frozenset({"b1", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64", "f8e5m2"})
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR in cuda.h
# The product names of the devices that NVIDIA's own driver brings up; other vendors' builds of torch say "cuda" as well.
_PRODUCTS = ("NVIDIA", "GRID", "Tesla")
DRIVER = Driver(
    name="the CUDA driver",
    libraries=("libcuda.so.1",),
    symbols={
        "init": "cuInit", "count": "cuDeviceGetCount", "device": "cuDeviceGet", "attribute": "cuDeviceGetAttribute",
        "retain": "cuDevicePrimaryCtxRetain", "current": "cuCtxGetCurrent", "set_current": "cuCtxSetCurrent",
        "load": "cuModuleLoadData", "function": "cuModuleGetFunction", "set_attribute": "cuFuncSetAttribute",
        "launch": "cuLaunchKernel", "error_name": "cuGetErrorName",
    },
    shared_free=48 * 1024,  # CUDA C++ Programming Guide 13.0, compute capability 7.x and later: more needs an explicit opt-in
    shared_attribute=8,     # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES in cuda.h
    attributes=(_MAJOR, _MINOR),
)  # fmt: skip


def _executes(capability: int, found: tuple[int, ...]) -> bool:
    """Code for sm_80 runs on 8.6 and 8.9; code for 9.0 and above carries the architecture's own features and runs only there."""
    device = found[0] * 10 + found[1]
    return device == capability or (capability < 90 and found[0] == capability // 10 and device >= capability)


def _fit(capability: int, properties: object) -> int:
    """The capability, so that the highest that the device executes is taken."""
    device = (int(getattr(properties, "major", 0)), int(getattr(properties, "minor", 0)))
    named = str(getattr(properties, "name", "")).startswith(_PRODUCTS)
    return capability if named and _executes(capability, device) else 0


def has_device(capability: int) -> bool:
    """Whether a device that runs this code is here: asks the driver, loads no other library and makes no context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return False
        for k in range(count.value):
            device = ctypes.c_int()
            if driver.cuDeviceGet(ctypes.byref(device), k):
                continue
            failed = driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device) or driver.cuDeviceGetAttribute(
                ctypes.byref(minor), _MINOR, device
            )
            if not failed and _executes(capability, (major.value, minor.value)):
                return True
    except (OSError, AttributeError):
        return False
    return False


def _probe(capability: int) -> Reach:
    return reach(partial(has_device, capability))


def _target(
    capability: int, description: str, shared_kib: int, ptx: int, driver: str, *aliases: str, of: str, gigabytes: float, teraflops: float
) -> Target:
    """One compute capability; `shared_kib` is the most that a block may opt in to, `ptx` times ten the PTX version; `gigabytes` a second
    and f32 `teraflops` are those of the product `of`."""
    return Target(
        name=f"cuda:sm{capability}",
        family="cuda",
        description=description,
        language="triton",
        toolchain="triton_aot",
        tiers=("source", "ttir", "llir", "binary"),
        aliases=aliases,
        triton=("cuda", capability, 32),
        warp=32,
        max_threads=1024,
        shared_bytes=shared_kib * 1024,
        row_limit=16384,
        bandwidth=gigabytes * 1e9,
        peak=teraflops * 1e12,
        attention=TRITON_ATTENTION,
        dtypes=_DTYPES | {"f8e4m3fn"} if capability >= 89 else _DTYPES,
        options={"ptx_version": ptx, "driver": driver},
        facts_from={
            "warp": _CAPABILITY,
            "max_threads": f"{_CAPABILITY}: maximum number of threads per block",
            "shared_bytes": f"{_CAPABILITY}: maximum amount of shared memory per thread block",
            "dtypes": "triton/backends/nvidia/compiler.py: fp8e4nv needs compute capability 8.9",
            "row_limit": "ours: 32 elements a thread with 16 warps, four live f32 tensors in 128 of 255 registers",
            "bandwidth": f"NVIDIA's data sheet of the {of}",
            "peak": f"NVIDIA's data sheet of the {of}: FP32",
            "ptx_version": f"{_PTX}: {ptx // 10}.{ptx % 10} is read by driver {driver} and newer",
        },
        probe=partial(_probe, capability),
        driver=DRIVER,
        executes=partial(_executes, capability),
        fit=partial(_fit, capability),
    )


TARGETS = (
    _target(90, "NVIDIA H100, H200, GH200 (Hopper)", 227, 82, "535", "nvidia", "cuda", of="H100 SXM", gigabytes=3350, teraflops=67),
    _target(80, "NVIDIA A100 (Ampere)", 163, 82, "535", of="A100 80GB SXM", gigabytes=2039, teraflops=19.5),
    _target(86, "NVIDIA A10, A40, RTX 30 (Ampere)", 99, 82, "535", of="A10", gigabytes=600, teraflops=31.2),
    # PTX ISA, release notes of 8.4: mma of e4m3 and e5m2 on sm_89
    _target(89, "NVIDIA L4, L40, RTX 40 (Ada)", 99, 84, "550", of="L4", gigabytes=300, teraflops=30.3),
    _target(100, "NVIDIA B200, GB200 (Blackwell)", 227, 87, "570", of="B200", gigabytes=8000, teraflops=80),
    _target(120, "NVIDIA RTX 50, RTX PRO 6000 (Blackwell)", 99, 87, "570", of="RTX 5090", gigabytes=1792, teraflops=104.8),
)
