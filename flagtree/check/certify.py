"""The per-kernel certificate: each distinct generated kernel executed and compared with float64, eager and the interpreter.

`flagtree compile` runs the short form and stops at a wrong kernel, `flagtree verify` the long one; what was not executed or not compared
says so and why.  The evidence is plain JSON without times or paths: equal kernels on equal machines give equal evidence.
docs/certificate.md explains it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flagtree import __version__
from flagtree.check.examine import Examination, Run
from flagtree.check.execute import Executor, Unexecuted
from flagtree.check.inputs import lower_ends, sample_symbols, upper_ends
from flagtree.check.regimes import KINDS
from flagtree.check.upper_eager import Eager
from flagtree.errors import FlagtreeError
from flagtree.ir.attention import form_of
from flagtree.ir.canonical import Isolated
from flagtree.ir.program import Kernel, Program
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel

SHORT, LONG = "short", "long"
LONGEST = 2**20  # terms of one element's sums at the upper end of the short form


class WrongKernel(FlagtreeError):
    """A generated kernel computes something else than it should."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One distinct kernel.  `kernel`: as it stands in the program, for its name, operators and origins.  `built`: what to execute, None
    with `unbuilt` the reason.  `eager`: PyTorch on the isolated names (check.eager.eager_of), None with `uncompared` the reason."""

    digest: str
    isolated: Isolated
    kernel: Kernel
    built: BuiltKernel | None
    eager: Eager | None = None
    unbuilt: str = ""
    uncompared: str = "there is no captured graph"

    @property
    def where(self) -> str:
        """Kernel, operators, model layers and source lines, for an error."""
        origins = self.kernel.origins
        lists = (self.kernel.ops, [o.module for o in origins], [o.source for o in origins])
        parts = [", ".join(dict.fromkeys(x for x in names if x)) for names in lists]
        return "; ".join(p for p in (f"kernel {self.kernel.name} ({self.digest[:16]})", *parts) if p)


@dataclass(frozen=True, slots=True)
class Evidence:
    """`kernels`: kernel digest to what was measured.  `versions`: of everything that computed a number.  `form`: short or long."""

    kernels: Mapping[str, Mapping[str, object]]
    versions: Mapping[str, str]
    target: str
    form: str = SHORT

    def to_dict(self) -> dict[str, object]:
        """JSON data for the certificate."""
        kernels = {d: dict(self.kernels[d]) for d in sorted(self.kernels)}
        return {"form": self.form, "kernels": kernels, "target": self.target, "versions": dict(sorted(self.versions.items()))}

    @property
    def failed(self) -> list[str]:
        """Digests of the kernels that are wrong."""
        return [d for d, record in sorted(self.kernels.items()) if record.get("verdict") == "fail"]

    @property
    def executed(self) -> dict[str, int]:
        """How a kernel was run to the number of distinct kernels run that way (check.report.BundleReport.executed)."""
        ways = [way for record in self.kernels.values() for way in record["executed"]]  # type: ignore[attr-defined]
        return {way: ways.count(way) for way in sorted(set(ways))}


def runs_of(program: Program, form: str) -> list[Run]:
    """The runs of an isolated kernel.  Short: small tensors of two sizes, and an upper end where blocks can be chosen: the joint one, or
    that of a single size where one element would be a sum over millions there (a count over all rows of all sequences).  Long:
    every kind of input, aligned and misaligned, at the low ends and between, and each symbol at its upper end, alone and together."""
    low, odd = sample_symbols(program)
    upper = upper_ends(program)
    if form == SHORT and form_of(program) is not None:  # scores near zero alone would weigh all keys alike
        return [Run(low), Run(odd), Run(odd, "ordinary, small")]
    if form == SHORT:
        summed = [a.extent for step in program.steps if isinstance(step, Kernel) for a in step.axes if a.kind == "reduce"]
        longest = [math.prod(extent.evaluate(symbols) for extent in summed) for _, symbols in upper]
        within = [k for k, count in enumerate(longest) if count <= LONGEST]
        chosen = 0 if 0 in within else max(within, key=lambda k: longest[k], default=0)
        return [Run(low), Run(odd, "ordinary, small"), Run(upper[chosen][1], upper=upper[chosen][0], blocks=3)]
    whole = [Run(sizes, kind, shift) for sizes in (lower_ends(program), odd) for kind in KINDS for shift in (0, 1)]
    return [*whole, *(Run(symbols, upper=name, blocks=8) for name, symbols in upper)]


def examine(
    subjects: Sequence[Subject], target: Target, *, form: str = SHORT, libraries: Mapping[str, bytes] | None = None,
    progress: Progress = SILENT,
) -> Evidence:  # fmt: skip
    """Execute each subject in all runs of a form and judge what it stored; a wrong kernel is recorded with `verdict` "fail" and `faults`.

    `libraries`: a bundle's shared objects by CPU level, to run those.  Kernels run one after the other, and PyTorch
    has one thread: how eager adds up depends on their number, and the evidence must not.
    """
    distinct = {s.digest: s for s in subjects}
    executor = Executor([s.built for s in distinct.values() if s.built is not None], target, libraries)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    records: dict[str, Mapping[str, object]] = {}
    try:
        for digest, subject in distinct.items():
            records[digest] = _examined(subject, executor, form)
            progress.advance()
    finally:
        torch.set_num_threads(before)
    return Evidence(records, _versions(executor), target.name, form)


def certify(subjects: Sequence[Subject], target: Target, *, progress: Progress = SILENT) -> Evidence:
    """`examine` in the short form.  Raises WrongKernel for the first kernel that is wrong, with operators, model layers and numbers."""
    evidence = examine(subjects, target, progress=progress)
    for subject in subjects:
        if faults := evidence.kernels[subject.digest].get("faults"):
            raise wrong(subject, faults[0])  # type: ignore[index]
    return evidence


def _versions(executor: Executor) -> dict[str, str]:
    found = {"flagtree": __version__, "torch": torch.__version__, "machine": platform.machine()}
    return found | executor.versions()


def _examined(subject: Subject, executor: Executor, form: str) -> dict[str, object]:
    record: dict[str, object] = {"name": subject.kernel.name, "ops": list(dict.fromkeys(subject.kernel.ops))}
    try:
        ways = executor.ways(subject.built)
        assert subject.built is not None
        examination = Examination(subject.isolated, subject.built, executor, subject.eager, subject.uncompared)
        for number, run in enumerate(runs_of(subject.isolated.program, form)):
            if not (form == SHORT and run.upper and executor.levels(subject.built)):  # all rows on a CPU: not while compiling
                examination.run(run, int(subject.digest[:12], 16) + number)
    except Unexecuted as error:
        return record | {"executed": [], "not_executed": subject.unbuilt or error.why}
    found = examination.found
    compared = "compared" if not found.uncompared else f"not compared: {found.uncompared}"
    verdict: dict[str, object] = {"verdict": "fail", "faults": found.faults} if found.faults else {"verdict": "pass"}
    return record | {"executed": ways, "eager": compared, "runs": found.records} | verdict


def wrong(subject: Subject, why: str) -> WrongKernel:
    """The error for a wrong kernel."""
    hint = "FLAGTREE_DEBUG=4 keeps the kernel's text; FLAGTREE_FUEL=N stops after N rewrites: halve N until the wrong one is found"
    return WrongKernel("a generated kernel is wrong", where=subject.where, why=why, hint=hint)


__all__ = ["LONG", "SHORT", "Eager", "Evidence", "Subject", "WrongKernel", "certify", "examine", "runs_of", "wrong"]
