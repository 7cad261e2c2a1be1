"""The CPU: facts as data.  One object file for each instruction-set level; which one runs is looked up when a bundle is loaded.

The invariant: the levels are those of the x86-64 psABI and the Armv8-A baseline, never this machine's own set.
`toolchain.cxx` compiles for it; `runtime.cpu` reads what the processor has.
"""

from __future__ import annotations

from flagtree.errors import ToolchainError
from flagtree.targets.base import Reach, Target

LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64")
DTYPES = frozenset(("b1", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"))


def probe() -> Reach:
    """How far a kernel gets here: `binary` with a C++ compiler for this machine, else `source`."""
    from flagtree.toolchain.cxx import find_compiler, machine_of, package

    try:
        compiler = find_compiler()
    except ToolchainError as error:
        return Reach("source", missing=error.why, how=error.hint)
    absent = []
    for machine in dict.fromkeys(machine_of(level) for level in LEVELS):
        try:
            find_compiler(machine)
        except ToolchainError:
            absent.append(machine)
    missing = "" if not absent else f"no compiler for the level of {', '.join(absent)}"
    how = "" if not absent else f"apt-get install {' '.join(package(m) for m in absent)}"
    return Reach("binary", missing=missing, how=how, executes="native" if compiler.machine not in absent else "")


TARGETS = (
    Target(
        name="cpu",
        family="cpu",
        description="x86-64 and Arm processors, through C++ with vector extensions and OpenMP",
        language="cpp",
        toolchain="cxx",
        tiers=("source", "binary"),
        aliases=("native-cpu",),
        levels=LEVELS,
        row_limit=1 << 30,  # rows are walked in sweeps, never held in one tile
        attention={
            **dict.fromkeys(("one token", "one token, many heads", "a window"), frozenset({"bf16", "f32"})),
            **dict.fromkeys(("some keys", "packed sequences", "SDPA", "SDPA under a mask"), frozenset({"bf16", "f32"})),
        },
        lookups=True,
        gemm_rows={
            "x86-64-v4": {"bf16": 4, "f16": 4, "f32": 40},
            "x86-64-v3": {"bf16": 4, "f16": 4, "f32": 16},
            "aarch64": {"bf16": 4, "f16": 4, "f32": 16},
        },
        dtypes=DTYPES,
        facts_from={
            "levels": "x86-64 psABI 1.0, section 3.1.1; Armv8-A baseline (NEON)",
            "attention": "measured beside SDPA of torch 2.13 on a processor with AMX (docs/attention.md)",
            "gemm_rows": "measured beside oneDNN and MKL of torch 2.13 on a processor with AMX (docs/cpu.md, Templates); f32 of "
            "x86-64-v3 with MKL held to AVX2; aarch64 not measured; x86-64-v2 has no fused multiply-add",
        },
        probe=probe,
    ),
)
