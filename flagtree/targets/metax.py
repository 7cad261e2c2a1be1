"""MetaX C500 and C550 (MACA): facts as data, and how far this machine gets.

The invariant: nothing here claims more than was seen; each fact names its source, and what has only run in the emulator says so.
`toolchain.maca` compiles for it, `flagtree targets` prints `probe`.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from flagtree.settings import settings
from flagtree.targets import stock_triton
from flagtree.targets.base import TRITON_ATTENTION, Driver, Reach, Target

SDK_COMPILER = Path("mxgpu_llvm") / "bin" / "mxcc"  # below MACA_PATH, where MetaX's own Triton looks for it
# Why a kernel stops at `llir`, the same words on every machine: they go into bundles.
MISSING = (
    "binary (mcfatbin) needs MetaX's SDK: mxcc below MACA_PATH, or MetaX's own Triton;"
    " the MACA LLVM IR has been executed in the emulator at most, never on a device"
)


def sdk_compiler() -> Path | None:
    """MetaX's compiler when its SDK is installed here (the setting `maca_path`, variable MACA_PATH)."""
    if settings.maca_path is None:
        return None
    compiler = settings.maca_path / SDK_COMPILER
    return compiler if compiler.is_file() else None


def sdk_state() -> str:
    """In words, whether MetaX's SDK is here."""
    if sdk_compiler() is not None:
        return "MetaX's SDK is here"
    if settings.maca_path is not None:
        return f"MACA_PATH is set, but {SDK_COMPILER} is not below it"
    return "MACA_PATH is not set"


def probe() -> Reach:
    """How far a kernel gets on this machine: `llir` with a tested Triton, else `source`.  Imports no Triton."""
    why = stock_triton.problem()
    if why:
        return Reach("source", missing=f"ttir and llir: {why}", how=stock_triton.INSTALL)
    executes = "emulator" if sys.platform == "linux" and platform.machine() == "x86_64" else ""
    how = "`flagtree finalize BUNDLE` where MetaX's SDK is (MACA_PATH), or with --python PATH of MetaX's Triton"
    return Reach("llir", missing=f"{MISSING}; {sdk_state()}", how=how, executes=executes)


_FLAGTREE_METAX = "FlagTree third_party/metax and MetaX-MACA/mcTriton, read as source"
# Names and arguments as FlagTree's own driver.c and public users of libmcruntime.so have them; never called by us on a device.
DRIVER = Driver(
    name="the MACA runtime",
    libraries=("libmcruntime.so",),
    symbols={
        "init": "mcInit", "count": "mcGetDeviceCount", "device": "mcDeviceGet", "retain": "mcDevicePrimaryCtxRetain",
        "current": "mcCtxGetCurrent", "set_current": "mcCtxSetCurrent", "load": "mcModuleLoadData", "function": "mcModuleGetFunction",
        "launch": "mcModuleLaunchKernel", "error_name": "mcGetErrorName",
    },
    shared_free=64 * 1024,  # the launch itself enforces the limit; mcFuncSetAttribute refuses functions of modules (public reports)
    error_returned=True,
)  # fmt: skip
TARGETS = (
    Target(
        name="metax",
        family="metax",
        description="MetaX C500 and C550 (MACA), through Triton and our own lowering to MACA LLVM IR",
        language="triton",
        toolchain="maca",
        tiers=("source", "ttir", "llir", "binary"),
        aliases=("maca", "c500", "c550"),
        triton=("maca", 80, 64),
        warp=64,
        max_threads=512,
        shared_bytes=64 * 1024,
        row_limit=8192,
        attention=TRITON_ATTENTION,
        dtypes=frozenset({"b1", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"}),
        options={"processor": "xcore1000", "num_warps": 4, "num_stages": 2, "enable_fp_fusion": False},
        facts_from={
            "row_limit": "ours: 16 elements a thread with 8 warps",
            "triton": f"GPUTarget('maca', 80, 64): {_FLAGTREE_METAX}; capability 80 is mcGetDeviceProperties().major 10",
            "warp": _FLAGTREE_METAX,
            "max_threads": "C550 allows 512 threads a block, so 8 warps: FlagGems clamps to 512 // warp size",
            "shared_bytes": f"64 KiB a block: {_FLAGTREE_METAX}",
            "dtypes": "what the MACA lowering carries and the emulator executes; 8-bit floats are left out",
            "processor": "mxcc --offload-arch xcore1000, its default; a C550 reports xcore1002 and runs xcore1000 code (public reports)",
        },
        probe=probe,
        driver=DRIVER,
    ),
)
