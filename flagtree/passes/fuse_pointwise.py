"""Join pointwise kernels: chains, gated activations, rotary halves (reads at another point become index arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flagtree.ir.program import Program
from flagtree.passes.base import Fuel, Report
from flagtree.passes.fusion import fuse, has_reduction
from flagtree.targets.base import Target


@dataclass(frozen=True)
class FusePointwise:
    """`max_ops` bounds the body of a joined kernel."""

    name: ClassVar[str] = "fuse_pointwise"
    version: ClassVar[int] = 1
    max_ops: int = 256

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        return fuse(program, self.name, fuel, self.max_ops, lambda a, b: not has_reduction(a) and not has_reduction(b))
