"""A chip family outside the tree, in one file: facts and its own toolchain, which here is C++ for the oldest processors."""

from collections.abc import Sequence

from flagtree.ir.program import Program
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Reach, Target
from flagtree.toolchain import cxx
from flagtree.toolchain.base import BuiltKernel

TARGETS = (
    Target(name="toy:one", family="toy", description="a chip that exists only in the tests", language="cpp", toolchain=__name__,
           tiers=("source", "binary"), aliases=("plaything",), levels=("x86-64-v2",), row_limit=1 << 30,
           dtypes=frozenset({"b1", "i32", "i64", "bf16", "f32"}), facts_from={"levels": "x86-64 psABI 1.0, section 3.1.1"},
           probe=lambda: Reach("binary", missing="the toy's own assembler", how="nobody sells it", executes="native")),
)  # fmt: skip

link = cxx.link  # a target with levels is shipped as one shared object a level


def build(kernels: Sequence[tuple[str, Program]], target: Target, jobs: int = 1, progress: Progress = SILENT) -> list[BuiltKernel]:
    return cxx.build(kernels, target, jobs, progress)


def versions(target: Target) -> dict[str, str]:
    return {**cxx.versions(target), "toy": "1"}
