"""Join reductions with what surrounds them: norms, softmax and amax with pointwise work before and after, residual adds included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flagtree.ir.program import Program
from flagtree.passes.base import Fuel, Report
from flagtree.passes.fusion import fuse
from flagtree.targets.base import Target


@dataclass(frozen=True)
class FuseReduction:
    """`max_ops` bounds the body of a joined kernel."""

    name: ClassVar[str] = "fuse_reduction"
    version: ClassVar[int] = 1
    max_ops: int = 512

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        # where there are warps, heads that only turn stay apart from the norm of all of them
        return fuse(program, self.name, fuel, self.max_ops, lambda a, b: True, heads=target.warp <= 1, groups=True)
