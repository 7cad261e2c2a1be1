"""Chips whose compiler is their vendor's alone: generated kernels to the checked Triton IR that every fork of Triton starts from.

The invariant: a kernel stops at the tier `ttir` and says why; nothing here is called compiled that only the vendor's fork can compile.
Triton runs in the worker processes of `triton_aot`, with the backend of `ttir_backend`.
"""

from __future__ import annotations

from collections.abc import Sequence

from flagtree.codegen.triton import TritonSource, generate
from flagtree.errors import ToolchainError
from flagtree.ir.program import Program
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.triton_aot import Compiled, check_limits, check_triton, launch_record, workers

_PREPARE = "flagtree.toolchain.ttir_backend:register"


def build(kernels: Sequence[tuple[str, Program]], target: Target, jobs: int = 1, progress: Progress = SILENT) -> list[BuiltKernel]:
    """Source and TTIR for each (digest, isolated program), in order, in `jobs` processes.

    Raises CodegenError for a kernel without a source, ToolchainError for one that Triton refuses or when Triton is missing or untested.
    """
    if target.triton is None:
        raise ToolchainError(f"{target.name} is no target of Triton")
    sources = [(digest, generate(program, digest, target)) for digest, program in kernels]
    if not sources:
        return []
    out = []
    with workers(min(jobs, len(sources))) as pool:
        futures = [pool.submit(source, target.triton, {}, ("ttir",), _PREPARE) for _, source in sources]
        for (digest, source), future in zip(sources, futures, strict=True):
            out.append(_built(digest, source, future.result(), target))
            progress.advance()
    return out


def _built(digest: str, source: TritonSource, compiled: Compiled, target: Target) -> BuiltKernel:
    check_limits(source, compiled, target)
    files = {"kernel.py": source.text.encode(), **compiled.files}
    return BuiltKernel(digest, "ttir", str(target.options["missing"]), files, launch_record(source, compiled, "ttir"), {})


def versions(target: Target) -> dict[str, str]:
    """Every tool whose change changes bytes, as key factors.  ToolchainError when Triton is missing or too old or too new."""
    return {"triton": check_triton()}
