"""`flagtree verify`, whole: every kernel of a bundle executed and judged, its certificate written anew, on request built again.

A bundle that is damaged, edited, without a certificate or not trusted is refused before any of its code runs, and left as it was.  What it
needs stands in the bundle (check/stored.py); no model is captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flagtree.artifact.bundle import Bundle, open_bundle, write_certificate
from flagtree.artifact.store import Store
from flagtree.artifact.trust import check_trust
from flagtree.check.certify import LONG, Evidence, Subject, examine
from flagtree.check.evidence import code_for
from flagtree.check.rebuild import Rebuilt, rebuild
from flagtree.check.regimes import ORDINARY
from flagtree.check.stored import stored_subjects
from flagtree.check.summary import label
from flagtree.errors import BundleError, ToolchainError, UntrustedBundle
from flagtree.progress import SILENT, Progress
from flagtree.targets import find_target

FORMAT = 1


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One distinct kernel.  Errors in ULP of the output type against float64, ordinary inputs, None where no float is stored; shares of
    elements equal to the interpreter's and to eager's, all inputs, None where nothing was compared.  `runs`: executed, `left_out`: not,
    with the reasons.  `alone`: runs at the upper end without eager, with the reasons.  `gate`: what every element had to be.
    `verdict`: pass, fail or not executed."""

    digest: str
    name: str
    ops: tuple[str, ...]
    executed: tuple[str, ...]
    runs: int
    left_out: tuple[str, ...]
    alone: tuple[str, ...]
    max_ulp: float | None
    mean_ulp: float | None
    equal_to_interpreter: float | None
    equal_to_eager: float | None
    gate: str
    eager: str
    verdict: str
    why: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `flagtree verify` found."""

    bundle: str
    digest: str
    target: str
    kernels: tuple[KernelRow, ...]
    versions: Mapping[str, str]
    rebuilt: Rebuilt | None = None

    @property
    def failed(self) -> tuple[KernelRow, ...]:
        return tuple(row for row in self.kernels if row.verdict == "fail")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with a format number."""
        return {"format": FORMAT, **asdict(self), "failed": len(self.failed)}


def verify_bundle(
    path: Path, *, trust: str | None = None, again: bool = False, jobs: int = 1, progress: Progress = SILENT
) -> VerifyReport:
    """Execute every kernel of the bundle at `path` in the long form and write its certificate anew.

    `trust`: the digest that the user vouches for; `again`: build the kernels again and compare bytes; `jobs`: processes that build.
    Raises BundleError for a bundle that is not whole, lacks its certificate or was not built by this release; UntrustedBundle;
    ToolchainError for a tool that fails, and where nothing can be executed.  The bundle is then as it was.
    """
    progress.phase("checking")
    bundle = open_bundle(path)
    bundle.verify()
    if bundle.certificate() is None:
        raise BundleError("the bundle has no certificate", where=str(path), why="every bundle is built with one", hint="copy it again")
    _check_trust(bundle, trust, path)
    target = find_target(bundle.manifest.target)
    subjects = stored_subjects(bundle)
    progress.phase("kernels", len(subjects))
    built = {s.digest: s.built for s in subjects if s.built is not None}
    codes = code_for(subjects, built, target, jobs, Store())
    subjects = [replace(s, built=code, unbuilt=why) for s, (code, why) in zip(subjects, codes, strict=True)]
    libraries = {level: bundle.library(level) for level in bundle.manifest.libraries} or None
    evidence = examine(subjects, target, form=LONG, libraries=libraries, progress=progress)
    if evidence.kernels and not evidence.executed:
        reasons = dict.fromkeys(str(record.get("not_executed", "")) for record in evidence.kernels.values())
        raise ToolchainError("nothing of the bundle can be executed here", where=str(path), why="; ".join(reasons))
    rebuilt = None
    if again:
        progress.phase("building again", len(subjects))
        rebuilt = rebuild(bundle, target, jobs, progress)
    write_certificate(path, evidence.to_dict())
    return VerifyReport(str(path), bundle.digest, target.name, _rows(subjects, evidence), evidence.versions, rebuilt)


def _check_trust(bundle: Bundle, trust: str | None, path: Path) -> None:
    try:
        check_trust(bundle.digest, trust, where=str(path))
    except UntrustedBundle as error:
        hint = error.hint if trust else f"if you trust where it comes from: flagtree verify {path} --trust {bundle.digest}"
        raise UntrustedBundle(error.what, where=error.where, why=error.why, hint=hint) from None


# -- the report ------------------------------------------------------------------------------------------------------
def _rows(subjects: Sequence[Subject], evidence: Evidence) -> tuple[KernelRow, ...]:
    return tuple(_row(s, evidence.kernels[s.digest]) for s in subjects)


def _row(subject: Subject, record: Mapping[str, Any]) -> KernelRow:
    runs: Sequence[Mapping[str, Any]] = record.get("runs", ())
    done = [run for run in runs if "outputs" in run]
    outputs = [(run["inputs"]["kind"] in ORDINARY, out) for run in done for out in run["outputs"].values()]
    plain = [out for ordinary, out in outputs if ordinary and "max_ulp" in out]
    every = [out for _, out in outputs]
    gates = list(dict.fromkeys(str(out["gate"]) for out in every if "gate" in out))
    left_out = dict.fromkeys(f"{run['inputs']['upper_end']} at the upper end: {run['not_run']}" for run in runs if "not_run" in run)
    without = [(run["inputs"], out["eager"]) for run in done for out in run["outputs"].values() if "eager" in out]
    alone = dict.fromkeys(
        f"{inputs['upper_end']} at the upper end: {why}" if "upper_end" in inputs else f"small sizes: {why}" for inputs, why in without
    )
    faults: Sequence[str] = record.get("faults", ())
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return KernelRow(
        digest=subject.digest,
        name=label(subject.kernel),
        ops=tuple(record["ops"]),
        executed=tuple(record["executed"]),
        runs=len(done),
        left_out=tuple(left_out),
        alone=tuple(alone),
        max_ulp=max((out["max_ulp"] for out in plain), default=None),
        mean_ulp=_mean(plain, "mean_ulp"),
        equal_to_interpreter=_mean(every, "equal_to_interpreter"),
        equal_to_eager=_mean(every, "equal_to_eager"),
        gate=" and ".join(gates),
        eager=str(record.get("eager", "")),
        verdict=str(record.get("verdict", "not executed")),
        why=f"{subject.where}: {faults[0]}{more}" if faults else str(record.get("not_executed", "")),
    )


def _mean(outputs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean over elements of what each output states."""
    counted = "elements_with_eager" if name == "equal_to_eager" else "elements"
    stated = [(out[name], out.get(counted, out["elements"])) for out in outputs if name in out]
    total = sum(count for _, count in stated)
    return sum(value * count for value, count in stated) / total if total else None
