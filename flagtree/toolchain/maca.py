"""MetaX's chips from a machine without MetaX's software: generated kernels to TTIR and checked MACA LLVM IR.

The invariant: a kernel stops at the tier `llir` and says why; nothing here is called compiled that only MetaX's compiler can compile.
Triton runs in the worker processes of `triton_aot`, with the backend of `maca_backend`; `emulator` executes the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from flagtree.codegen.triton import TritonSource, generate
from flagtree.errors import ToolchainError
from flagtree.ir.program import Program
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Target
from flagtree.targets.metax import MISSING, TARGETS
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.triton_aot import Compiled, Workers, check_limits, check_triton, launch_record, workers

STAGES = ("ttir", "llir")
MAX_WARPS = 8  # C550: 512 threads a block, 64 lanes a warp
(METAX,) = TARGETS
_PREPARE = "flagtree.toolchain.maca_backend:register"


def build(kernels: Sequence[tuple[str, Program]], target: Target, jobs: int = 1, progress: Progress = SILENT) -> list[BuiltKernel]:
    """Source, TTIR and MACA LLVM IR for each (digest, isolated program), in order, in `jobs` processes.

    Raises CodegenError for a kernel without a source; ToolchainError for one that the lowering refuses (it names the intrinsic), that
    needs more warps, threads or shared memory than the target has, or when Triton is missing or untested.
    """
    sources = [(digest, generate(program, digest, target)) for digest, program in kernels]
    if not sources:
        return []
    with workers(min(jobs, len(sources))) as pool:
        return build_sources(sources, target, pool, progress)


def build_for_emulation(
    kernels: Sequence[tuple[str, Program]], target: Target, jobs: int = 1, progress: Progress = SILENT
) -> list[BuiltKernel]:
    """Kernels of another target of Triton (cuda, rocm) as that target's own source, lowered for the emulator instead of the target.

    The TTIR is to the byte the one that the target's build has (warps and layouts come after it); what the target's own compiler makes
    of it is not executed.  At most 8 warps.  Raises what `build` raises.
    """
    sources = [(digest, generate(program, digest, target)) for digest, program in kernels]
    if not sources:
        return []
    sources = [(digest, replace(source, warps=min(source.warps, MAX_WARPS))) for digest, source in sources]
    with workers(min(jobs, len(sources))) as pool:
        return build_sources(sources, METAX, pool, progress, {"ttir_of": target.triton})


def build_sources(
    sources: Sequence[tuple[str, TritonSource]],
    target: Target,
    pool: Workers,
    progress: Progress = SILENT,
    options: Mapping[str, object] | None = None,
) -> list[BuiltKernel]:
    """`build` from sources, in worker processes that the caller holds; `options` are MacaOptions beyond the source's own."""
    if target.triton is None:
        raise ToolchainError(f"{target.name} is no target of Triton")
    for _, source in sources:
        if not 0 < source.warps <= MAX_WARPS:
            raise ToolchainError(
                f"{source.warps} warps do not fit {target.name}",
                where=source.function,
                why=f"a block has at most {MAX_WARPS} warps of {target.warp} threads",
            )
    futures = [pool.submit(source, target.triton, options or {}, STAGES, _PREPARE) for _, source in sources]
    out = []
    for (digest, source), future in zip(sources, futures, strict=True):
        out.append(_built(digest, source, future.result(), target))
        progress.advance()
    return out


def _built(digest: str, source: TritonSource, compiled: Compiled, target: Target) -> BuiltKernel:
    check_limits(source, compiled, target)
    for name, content in compiled.files.items():
        _no_path(content, f"{source.function}, {name}")
    launch = launch_record(source, compiled, "llir")
    facts = {name: {k: v[k] for k in ("shared", "threads")} for name, v in sorted(compiled.variants.items())}
    return BuiltKernel(digest, "llir", MISSING, {"kernel.py": source.text.encode(), **compiled.files}, launch, facts)


def _no_path(content: bytes, where: str) -> None:
    """What is shipped must be the same bytes on every machine: no folder of this one may be in it."""
    here = str(PurePosixPath(__file__).parent).encode()
    if here in content or b"source_filename" in content or b"DIFile" in content:
        raise ToolchainError("the MACA lowering left a path of this machine in its result", where=where)


def versions(target: Target) -> dict[str, str]:
    """Every tool whose change changes bytes, as key factors.  ToolchainError when Triton is missing or too old or too new."""
    return {"triton": check_triton()}
