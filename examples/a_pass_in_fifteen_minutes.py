"""A whole pass: -(-x) becomes x.  Run on a program in the text form, verified, and compared under the interpreter.

In the tree it would be one file in flagtree/passes/, one line in pipeline.py, and text tests in tests/passes/.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flagtree.ir.interp import run
from flagtree.ir.program import Compute, Kernel, Program
from flagtree.ir.text import parse_program, print_program
from flagtree.passes.base import Fuel, Report
from flagtree.passes.pipeline import run_pipeline
from flagtree.passes.rewrite import map_kernels, prune, rename, renumber
from flagtree.targets import find_target
from flagtree.targets.base import Target

PROGRAM = """
program twice_negated
  symbol s0 in 1..64 from dim x 0
  buffer x: f32[s0, 8] input
  buffer y: f32[s0, 8] temp
  kernel k0 {i0 < s0, i1 < 8} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1]
    v1: f32 = neg v0
    v2: f32 = neg v1
    v3: f32 = add v2, 1.0
    store y[i0, i1] = v3
  outputs y
"""


@dataclass(frozen=True)
class DoubleNegation:
    """Uses the value itself where it is negated twice; exact for every float, NaN and signed zero too."""

    name: ClassVar[str] = "double_negation"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report, budget = Report(self.name), fuel or Fuel()

        def change(kernel: Kernel) -> Kernel:
            negated = {op.name: op.args[0] for op in kernel.body if isinstance(op, Compute) and op.op == "neg"}
            same = {name: negated[arg] for name, arg in negated.items() if arg in negated and budget.take()}
            report.rewrites += len(same)
            if not same:
                return kernel
            return renumber(replace(kernel, body=prune(rename(op, same) for op in kernel.body if getattr(op, "name", None) not in same)))

        return map_kernels(program, change), report


def main() -> None:
    program = parse_program(PROGRAM)
    changed, (report,) = run_pipeline(program, (DoubleNegation(),), find_target("cpu"))
    print(f"{report.rewrites} rewrite\n{print_program(changed)}")
    assert report.rewrites == 1
    x = torch.randn(3, 8)
    assert torch.equal(run(program, {"x": x})["y"], run(changed, {"x": x})["y"])


if __name__ == "__main__":
    main()
