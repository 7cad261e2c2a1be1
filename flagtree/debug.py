"""The debug ladder: what FLAGTREE_DEBUG=1…5 shows of a compilation, on stderr and as diffable files.

1 summary, 2 passes with what they joined and declined, 3 the program after each pass that changed it, 4 generated source,
5 every file of the toolchain.  Files lie under the cache folder's `debug/`, numbered in the order of the pipeline.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from flagtree.ir.program import Extern, Kernel, Program, Repeat, Step, Template
from flagtree.ir.text import print_program
from flagtree.passes.base import Pass, Report, spec
from flagtree.settings import settings
from flagtree.toolchain.base import BuiltKernel

SUMMARY, PASSES, PROGRAMS, SOURCE, STAGES = 1, 2, 3, 4, 5
SHOWN = 20  # refusals of one pass on the terminal


class Ladder:
    """One compilation's observer; `after` is the pipeline's hook.  Silent and free of I/O at level 0."""

    def __init__(self, name: str) -> None:
        self.name, self.level, self.count = name, settings.debug, 0

    @property
    def folder(self) -> Path:
        return settings.cache_dir / "debug" / self.name.replace("/", "_")

    def _say(self, text: str) -> None:
        sys.stderr.write(f"flagtree {self.name}: {text}\n")

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def start(self, program: Program) -> None:
        """The program as lowered."""
        if self.level >= PROGRAMS:
            self._write("00-lowered.ir", print_program(program).encode())
            self._say(f"programs in {self.folder}")

    def after(self, p: Pass, program: Program, report: Report) -> None:
        """After one pass."""
        self.count += 1
        if self.level >= PASSES:
            self._say(f"{spec(p)}: {report.rewrites} rewrites, {len(report.refused)} declined, {report.seconds * 1000:.0f} ms")
            for line in report.matched:
                self._say(f"  joined {line}")
            for refused in report.refused[:SHOWN]:
                self._say(f"  declined {refused}")
            if len(report.refused) > SHOWN:
                self._say(f"  and {len(report.refused) - SHOWN} more (flagtree explain fusion)")
        if self.level >= PROGRAMS and report.rewrites:
            self._write(f"{self.count:02}-{p.name}.ir", print_program(program).encode())

    def finish(self, program: Program, cached: bool = False) -> None:
        """The program as generated: kernels, and externs by reason."""
        if self.level < SUMMARY:
            return
        steps = list(_flat(program.steps))
        kernels = sum(isinstance(s, Kernel) for s in steps)
        templates = sum(isinstance(s, Template) for s in steps)
        joined = f"{kernels} kernels, " + (f"{templates} templates, " if templates else "")
        self._say(f"{joined}{len(steps) - kernels - templates} externs" + (", from the store" if cached else ""))
        reasons: dict[str, int] = {}
        for step in steps:
            if isinstance(step, Extern):
                line = f"{step.callee}: {step.reason}"
                reasons[line] = reasons.get(line, 0) + 1
        for line, count in sorted(reasons.items()):
            self._say(f"  {count} x {line}")

    def built(self, kernels: Iterable[BuiltKernel]) -> None:
        """Sources, and with level 5 all stages, one folder a kernel."""
        if self.level < SOURCE:
            return
        for kernel in kernels:
            for name, data in kernel.files.items():
                if self.level >= STAGES or name.startswith("kernel."):
                    self._write(f"kernels/{kernel.digest[:16]}/{name}", data)


def _flat(steps: Iterable[Step]) -> Iterable[Step]:
    for step in steps:
        yield from _flat(step.body) if isinstance(step, Repeat) else (step,)
