"""The per-kernel certificate: each distinct generated kernel executed on a few rows and compared with float64, eager and the interpreter.

A wrong kernel raises WrongKernel, so no bundle is written with it; what was not executed or not compared says so and why.  The
evidence is plain JSON without times or paths: equal kernels on equal machines give equal evidence.  docs/certificate.md explains it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from flagtree import __version__
from flagtree.check.eager import NoEager
from flagtree.check.execute import Differs, Executor, Unexecuted
from flagtree.check.inputs import Operand, make_operands, sample_symbols
from flagtree.check.verdict import Judged, judge
from flagtree.errors import FlagtreeError, IRError, ToolchainError
from flagtree.ir.canonical import Isolated
from flagtree.ir.program import Kernel
from flagtree.ir.walk import run_kernel
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel

Tensor = torch.Tensor
Eager = Callable[[Mapping[str, Tensor], Mapping[str, int]], dict[str, Tensor]]
# The second setting shrinks the floats, so that an epsilon counts as much as the data: a wrong one does not show at magnitude 1
SETTINGS = (("ordinary", 1.0), ("ordinary, small", 2.0**-10))


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
    """`kernels`: kernel digest to what was measured.  `versions`: of everything that computed a number."""

    kernels: Mapping[str, Mapping[str, object]]
    versions: Mapping[str, str]
    target: str

    def to_dict(self) -> dict[str, object]:
        """JSON data for the certificate."""
        kernels = {d: dict(self.kernels[d]) for d in sorted(self.kernels)}
        return {"kernels": kernels, "target": self.target, "versions": dict(sorted(self.versions.items()))}

    @property
    def executed(self) -> dict[str, int]:
        """How a kernel was run to the number of distinct kernels run that way (check.report.BundleReport.executed)."""
        ways = [way for record in self.kernels.values() for way in record["executed"]]  # type: ignore[attr-defined]
        return {way: ways.count(way) for way in sorted(set(ways))}


@dataclass(slots=True)
class _Runs:
    """What the runs of one kernel found."""

    records: list[dict[str, object]] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    uncompared: str = ""


def certify(subjects: Sequence[Subject], target: Target, *, jobs: int = 1, progress: Progress = SILENT) -> Evidence:
    """Execute each subject on small inputs and judge what it stored.

    Raises WrongKernel for the first that is wrong, with kernel, operators, model layer and numbers.  `jobs`: threads that PyTorch may
    use; kernels run one after the other.
    """
    distinct = {s.digest: s for s in subjects}
    executor = Executor([s.built for s in distinct.values() if s.built is not None], target)
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, jobs))
    records: dict[str, Mapping[str, object]] = {}
    try:
        for digest, subject in distinct.items():
            records[digest] = _certified(subject, executor)
            progress.advance()
    finally:
        torch.set_num_threads(before)
    return Evidence(records, _versions(executor), target.name)


def _versions(executor: Executor) -> dict[str, str]:
    found = {"flagtree": __version__, "torch": torch.__version__, "machine": platform.machine()}
    return found | executor.versions()


def _certified(subject: Subject, executor: Executor) -> dict[str, object]:
    record: dict[str, object] = {"name": subject.kernel.name, "ops": list(dict.fromkeys(subject.kernel.ops))}
    try:
        ways = executor.ways(subject.built)
        runs = _Runs(uncompared=subject.uncompared if subject.eager is None else "")
        for number, (symbols, (kind, scale)) in enumerate(zip(sample_symbols(subject.isolated.program), SETTINGS, strict=True)):
            seed = int(subject.digest[:12], 16) + number
            outputs = _run(subject, executor, symbols, seed, scale, runs)
            runs.records.append({"inputs": {"kind": kind, "scale": scale, "seed": seed, "symbols": symbols}, "outputs": outputs})
    except Unexecuted as error:
        return record | {"executed": [], "not_executed": subject.unbuilt or error.why}
    if len(runs.disagreements) == len(SETTINGS):
        raise _wrong(subject, runs.disagreements[0])
    compared = "compared" if not runs.uncompared else f"not compared: {runs.uncompared}"
    return record | {"executed": ways, "eager": compared, "runs": runs.records, "verdict": "pass"}


def _run(subject: Subject, executor: Executor, symbols: dict[str, int], seed: int, scale: float, runs: _Runs) -> dict[str, object]:
    """One run, every stored buffer judged; the record by buffer."""
    program, kernel = subject.isolated.program, subject.isolated.kernel
    operands = make_operands(program, symbols, seed, scale)
    own = {name: operand.clone() for name, operand in operands.items()}
    truth = {b.name: _widened(operands[b.name].tensor) for b in program.buffers}
    try:
        run_kernel(program, kernel, {n: o.tensor for n, o in own.items()}, symbols)
        run_kernel(program, kernel, truth, symbols, precise=True)
    except IRError as error:
        raise Unexecuted("the kernel is not executed", why=f"no inputs were found that it accepts: {error.what}") from error
    eager = _eager(subject, operands, symbols, runs)
    assert subject.built is not None
    try:
        ours = executor.run(subject.built, operands, symbols)
    except (Differs, ToolchainError) as error:
        raise _wrong(subject, f"{error.what}{': ' if error.why else ''}{error.why}", error.where) from error
    _untouched(subject, operands, ours, kernel)
    out: dict[str, object] = {}
    disagrees = ""
    for name in kernel.writes:
        judged: Judged = judge(program.buffer(name).dtype, ours[name].tensor, own[name].tensor, truth[name], eager.get(name))
        title = f"stored buffer {subject.isolated.buffers[int(name[1:])]} at {_sizes(subject, symbols)}"
        if judged.faults:
            raise _wrong(subject, f"{title}: {'; '.join(judged.faults)}")
        disagrees = disagrees or (f"{title}: {judged.disagrees}" if judged.disagrees else "")
        out[name] = judged.record
    if disagrees:
        runs.disagreements.append(disagrees)
    return out


def _widened(tensor: Tensor) -> Tensor:
    """The same values in float64 (integers as they are), in the same strides."""
    dtype = torch.float64 if tensor.dtype.is_floating_point else tensor.dtype
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    flat = torch.as_strided(tensor, (span,), (1,), tensor.storage_offset()).to(dtype, copy=True)
    return torch.as_strided(flat, tensor.shape, tensor.stride(), 0)


def _eager(subject: Subject, operands: Mapping[str, Operand], symbols: Mapping[str, int], runs: _Runs) -> dict[str, Tensor]:
    if subject.eager is None or runs.uncompared:
        return {}
    try:
        found = subject.eager({n: o.clone().tensor for n, o in operands.items()}, symbols)
    except NoEager as error:
        runs.uncompared = error.why
        return {}
    missing = [n for n in subject.isolated.kernel.writes if n not in found]
    if missing:
        runs.uncompared = f"{', '.join(missing)} is internal to one operator"
    return found


def _untouched(subject: Subject, before: Mapping[str, Operand], after: Mapping[str, Operand], kernel: Kernel) -> None:
    """A kernel writes what it stores and nothing else."""
    for name, operand in before.items():
        wrote_outside = not _equal_bits(operand.outside(), after[name].outside())
        if wrote_outside or (name not in kernel.writes and not _equal_bits(operand.memory, after[name].memory)):
            actual = subject.isolated.buffers[int(name[1:])]
            raise _wrong(subject, f"it wrote outside of buffer {actual}" if wrote_outside else f"it wrote into '{actual}', an input")


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _sizes(subject: Subject, symbols: Mapping[str, int]) -> str:
    named = zip(subject.isolated.symbols, symbols.values(), strict=True)
    return ", ".join(f"{name}={value}" for name, value in named) or "its fixed sizes"


def _wrong(subject: Subject, why: str, place: str = "") -> WrongKernel:
    hint = "FLAGTREE_DEBUG=4 keeps the kernel's text; FLAGTREE_FUEL=N stops after N rewrites: halve N until the wrong one is found"
    return WrongKernel("a generated kernel is wrong", where=f"{subject.where}{'; ' + place if place else ''}", why=why, hint=hint)


__all__ = ["Evidence", "Subject", "WrongKernel", "certify"]
