"""What the pipeline does before code generation, for tests that start from one isolated kernel: give it its schedule."""

from __future__ import annotations

from collections.abc import Sequence

from flagtree.codegen import triton
from flagtree.ir.program import Program
from flagtree.passes.tiling import scheduled
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Target
from flagtree.toolchain import maca, triton_aot
from flagtree.toolchain.base import BuiltKernel

Kernels = Sequence[tuple[str, Program]]


def generate(program: Program, digest: str, target: Target) -> triton.TritonSource:
    return triton.generate(scheduled(program, target), digest, target)


def _all(kernels: Kernels, target: Target) -> list[tuple[str, Program]]:
    return [(digest, scheduled(program, target)) for digest, program in kernels]


def build_triton(kernels: Kernels, target: Target, jobs: int, progress: Progress = SILENT) -> list[BuiltKernel]:
    return triton_aot.build(_all(kernels, target), target, jobs, progress)


def build_maca(kernels: Kernels, target: Target, jobs: int = 1) -> list[BuiltKernel]:
    return maca.build(_all(kernels, target), target, jobs)


def build_for_emulation(kernels: Kernels, target: Target, jobs: int) -> list[BuiltKernel]:
    return maca.build_for_emulation(_all(kernels, target), target, jobs)
