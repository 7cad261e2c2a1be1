"""The other chips of the FlagOS family: facts as data, and the tier that stock Triton reaches for every one of them, `ttir`.

The invariant: no claim beyond it.  Each vendor's compiler is a fork of Triton that is not here; what it is called stands in `options`.
The facts are those of the public FlagTree drivers and compilers, read as source; none of these chips has run anything of ours.
"""

from __future__ import annotations

from functools import partial

from flagtree.targets import stock_triton
from flagtree.targets.base import Reach, Target

_READ = "FlagTree third_party/{0}, driver.py and compiler.py, read as source"
_DTYPES = frozenset({"b1", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32"})
_NOMINAL = 32  # threads of a warp that tiles are sized for where the chip has no warps of its own


def _missing(fork: str, release: str, binary: str, tool: str) -> str:
    """Why a kernel stops at `ttir`, the same words on every machine: they go into bundles."""
    return f"binary ({binary}) needs FlagTree's {fork} backend, a fork of Triton {release}, and {tool}; nothing here has run on this chip"


def _probe(missing: str, how: str) -> Reach:
    why = stock_triton.problem()
    if why:
        return Reach("source", missing=f"ttir: {why}", how=stock_triton.INSTALL)
    return Reach("ttir", missing=missing, how=how)


def _target(
    name: str, description: str, *aliases: str, gpu: str, warp: int, fork: str, release: str, binary: str, tool: str, device: str
) -> Target:
    """`gpu`: the form of GPUTarget that the fork's driver makes; `warp`: its warp, 0 where it has none; `tool`: what its last step
    asks for; `device`: torch's name of such a device."""
    missing = _missing(fork, release, binary, tool)
    how = f"on a machine with the vendor's software, its Triton compiles each kernel.py of the bundle for GPUTarget{gpu}"
    read = _READ.format(fork)
    return Target(
        name=name,
        family="flagos",
        description=description,
        language="triton",
        toolchain="triton_ir",
        tiers=("source", "ttir", "binary"),
        aliases=aliases,
        triton=("ttir", name, warp or _NOMINAL),
        warp=warp or _NOMINAL,
        max_threads=8 * (warp or _NOMINAL),
        row_limit=8192,
        dtypes=_DTYPES,
        options={"gpu_target": gpu, "fork": fork, "fork_triton": release, "binary": binary, "device": device, "missing": missing},
        facts_from={
            "triton": "ours: no stock code generator; options.gpu_target is the fork's",
            "warp": read if warp else f"the chip has no warps ({read}); {_NOMINAL} only sizes tiles",
            "max_threads": "ours: 8 warps, which every fork with warps accepts",
            "row_limit": "ours, as on metax; the vendor's limits on a tile are not public",
            "dtypes": "ours: what the forks' own tests of Triton's language use; 64-bit and 8-bit floats are left out",
            "gpu_target": read,
        },
        probe=partial(_probe, missing, how),
    )


TARGETS = (
    _target("iluvatar", "Iluvatar CoreX GPUs (ivcore10, 11, 20)", "corex", gpu='("cuda", 70 | 71 | 80, 64)', warp=64,
            fork="iluvatar", release="3.1", binary="cubin, not NVIDIA's", tool="CoreX (CUDA_HOME)", device="cuda"),
    _target("mthreads", "Moore Threads GPUs (MUSA 3 and later)", "musa", gpu='("musa", major * 10 + minor, 32)', warp=32,
            fork="mthreads", release="3.1", binary="mubin", tool="the MUSA toolkit (MUSA_HOME)", device="musa"),
    _target("kunlunxin", "Kunlunxin XPU 2 to 5", "klx", "xpu", gpu='("xpu", 2 .. 5, 1)', warp=0,
            fork="xpu", release="3.0", binary="xpubin", tool="XPU's clang (TRITON_XPU_CLANG_PATH)", device="cuda"),
    _target("hygon", "Hygon DCU (gfx928, gfx936)", "hcu", "dcu", gpu='("hip", "gfx928" | "gfx936", 64)', warp=64,
            fork="hcu", release="3.0", binary="hsaco", tool="DTK (ROCM_PATH)", device="cuda"),
    _target("cambricon", "Cambricon MLU", "mlu", gpu='("mlu", isa_version, 0)', warp=0,
            fork="cambricon", release="3.2", binary="cnbin", tool="Neuware (NEUWARE_HOME)", device="mlu"),
    _target("ascend", "Huawei Ascend 910 NPUs", "npu", gpu='("npu", "Ascend910...", 0)', warp=0,
            fork="ascend", release="3.2", binary="npubin", tool="CANN with bishengir-compile (ASCEND_HOME_PATH)", device="npu"),
    _target("zhouyi", "Arm China Zhouyi X2 NPU", "aipu", gpu='("aipu", "x2", 4)', warp=0,
            fork="aipu", release="3.3", binary="bin", tool="the Zhouyi SDK (ZHOUYI_LINUX_DRIVER_HOME)", device="aipu"),
    _target("tsingmicro", "Tsingmicro TX8", "tx8", "txda", gpu='("txda", 1, 16)', warp=16,
            fork="tsingmicro", release="3.3", binary="so", tool="the TX8 SDK (LLVM_SYSPATH, LIB_C_ROOT)", device="txda"),
    _target("enflame", "Enflame GCU 300, 400, 410", "gcu", gpu='("gcu", "gcu300" | "gcu400" | "gcu410", 1)', warp=0,
            fork="enflame", release="3.3", binary="fatbin", tool="the vendor's toolkit folder", device="gcu"),
    _target("sunrise", "Sunrise S2 (TANG)", "tang", gpu='("tang", "S2", 32)', warp=32,
            fork="sunrise", release="3.4", binary="stcu", tool="the TANG driver and toolkit", device="ptpu"),
)  # fmt: skip
