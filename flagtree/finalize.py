"""`flagtree finalize`, whole: a bundle in, the same bundle with kernels at a higher tier out, by a toolchain that this machine has.

Each kernel is built by a tool in a process of its own and its result checked; what was finished is kept in the store.  The new bundle
takes the old one's place, or `out`, in one step; where no kernel was raised nothing is written.  docs/finalize.md explains it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagtree.artifact.bundle import Bundle, copy_bundle, open_bundle, write_again
from flagtree.artifact.code import code_digest
from flagtree.artifact.container import SUFFIX, check_place
from flagtree.artifact.files import canonical_json, sha256
from flagtree.artifact.key import KeyFactors
from flagtree.artifact.store import Store
from flagtree.artifact.trust import check_trust, is_built_here, record_built
from flagtree.check.carry import carried_coverage, carried_evidence
from flagtree.errors import BundleError, FlagtreeError, StoreError, ToolchainError, UntrustedBundle
from flagtree.progress import SILENT, Progress
from flagtree.settings import settings
from flagtree.targets import find_target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.finishers import find_tool
from flagtree.toolchain.last_step import SECONDS, Finished, Tool, Work

KIND = "finished"
LAST = "binary"


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel: its tier before and after, and why it was not raised ("" when it was, or when it had nothing to gain)."""

    digest: str
    function: str
    before: str
    after: str
    raised: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class FinalizeReport:
    """`path`: where the result is.  `source`, `digest`: the bundle's digest before and after, equal when nothing was done.  `tool`: what
    built, "" when nothing had to.  `trusted`: this machine's store vouches for the result.  `seconds`: wall time."""

    path: str
    target: str
    source: str
    digest: str
    tool: str
    kernels: tuple[Row, ...]
    trusted: bool
    seconds: float

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.kernels if row.why)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"format": 1, **asdict(self), "raised": sum(r.raised for r in self.kernels), "failed": len(self.failed)}


def finalize(
    path: Path,
    *,
    out: Path | None = None,
    python: str | None = None,
    ptxas: str | None = None,
    trust: str | None = None,
    jobs: int | None = None,
    seconds: float = SECONDS,
    progress: Progress = SILENT,
) -> FinalizeReport:
    """Raise the kernels of the bundle at `path` to binaries.  Where all are binaries and a tool is named, that tool builds all anew.

    `out`: a folder for the result, or a file `.ftb`; else it takes the bundle's place.  `python`, `ptxas`: the tool (else MetaX's own,
    where it is found).  `seconds`: for one command of a tool.  A kernel that fails stays as it was and the report says why; when all
    fail, ToolchainError.  Raises UntrustedBundle, BundleError, StoreError; then what was there is as it was.
    """
    started = time.perf_counter()
    bundle = open_bundle(path)
    bundle.verify()
    below = [d for d, k in bundle.manifest.kernels.items() if k.tier != LAST]
    chosen = below or (list(bundle.manifest.kernels) if python or ptxas else [])
    if not chosen:
        return _as_it_is(bundle, path.resolve() if out is None else _place(path, out), started)
    place = _place(path, out)
    _check_trust(bundle, trust)
    check_place(place)
    target = find_target(bundle.manifest.target)
    progress.phase("toolchain")
    tool = find_tool(target, python, ptxas, seconds)
    progress.phase(f"kernels, by {tool.route}", len(chosen))
    made, failures = _run(tool, [_work(bundle, d) for d in sorted(chosen)], target.name, jobs or settings.jobs, progress)
    if not made:
        raise _nothing_raised(failures)
    progress.phase("bundle")
    digest = _write(bundle, place, made, tool)
    rows = tuple(_row(bundle, d, made, failures) for d in sorted(bundle.manifest.kernels))
    return FinalizeReport(str(place), target.name, bundle.digest, digest, tool.version, rows, _vouch(digest), _since(started))


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _place(path: Path, out: Path | None) -> Path:
    """Where the result goes, links followed.  BundleError for a place inside the store."""
    place = path if out is None else out if out.suffix == SUFFIX else out / path.resolve().name
    if place.resolve().is_relative_to(settings.cache_dir.resolve()):
        why = "`flagtree compile` keeps it there under the key of what built it"
        raise BundleError("a bundle in the store is not changed in its place", where=str(place), why=why, hint="name a folder with --out")
    return place.resolve()


def _check_trust(bundle: Bundle, trust: str | None) -> None:
    try:
        check_trust(bundle.digest, trust, where=str(bundle.path))
    except UntrustedBundle as refusal:
        if trust is not None:
            raise
        what = "the bundle is not trusted: finalizing it runs its source, and this machine then vouches for the result"
        hint = f"if you trust where it comes from: --trust {bundle.digest}"
        raise UntrustedBundle(what, where=refusal.where, why=refusal.why, hint=hint) from None


def _as_it_is(bundle: Bundle, place: Path, started: float) -> FinalizeReport:
    if place != bundle.path.resolve():
        copy_bundle(bundle.path, place)
    rows = tuple(_row(bundle, d, {}, {}) for d in sorted(bundle.manifest.kernels))
    trusted = is_built_here(bundle.digest)
    return FinalizeReport(str(place), bundle.manifest.target, bundle.digest, bundle.digest, "", rows, trusted, _since(started))


def _row(bundle: Bundle, digest: str, made: Mapping[str, BuiltKernel], failures: Mapping[str, FlagtreeError]) -> Row:
    kernel = bundle.manifest.kernels[digest]
    error = failures.get(digest)
    why = "" if error is None else f"{error.what}{': ' if error.why else ''}{error.why}"
    after = made[digest].tier if digest in made else kernel.tier
    return Row(digest, str(kernel.launch.get("function", "")), kernel.tier, after, digest in made, why)


# -- building --------------------------------------------------------------------------------------------------------
def _work(bundle: Bundle, digest: str) -> Work:
    """The kernel's texts and numbers.  BundleError when the manifest lacks what a tool needs."""
    kernel = bundle.manifest.kernels[digest]
    launch: Any = kernel.launch
    try:
        numbers = [launch[name] for name in ("warps", "stages", "threads")]
        numbers += [variant[name] for variant in launch["variants"].values() for name in ("null_pointers", "shared")]
        known = set(launch["variants"]) <= {"aligned", "generic"} and launch["variants"] and isinstance(launch["fp_fusion"], bool)
        pairs = [[str(name), str(kind)] for name, kind in launch["signature"]]
        if not known or not all(isinstance(n, int) for n in numbers) or not str(launch["function"]).isidentifier():
            raise ValueError("a value that a build never writes")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BundleError("the bundle does not say how a kernel was built", where=digest[:16], why=why, hint="compile it again") from None
    files = {name: bundle.read(f"kernels/{digest[:16]}/{name}") for name in kernel.files}
    return Work(digest, files, {**launch, "signature": pairs}, kernel.facts)


def _run(
    tool: Tool, works: list[Work], target: str, jobs: int, progress: Progress
) -> tuple[dict[str, BuiltKernel], dict[str, FlagtreeError]]:
    """(raised kernels, errors of the others), by digest."""
    made: dict[str, BuiltKernel] = {}
    failures: dict[str, FlagtreeError] = {}
    store = Store()
    pool = ThreadPoolExecutor(max(1, min(jobs, len(works))), thread_name_prefix="finalize")
    try:
        futures: list[tuple[Work, Future[BuiltKernel]]] = [(w, pool.submit(_finish, tool, w, target, store)) for w in works]
        for work, future in futures:
            try:
                made[work.digest] = future.result()
            except (ToolchainError, BundleError) as error:
                failures[work.digest] = error
            progress.advance()
    finally:
        pool.shutdown(cancel_futures=True)
    return made, failures


def _finish(tool: Tool, work: Work, target: str, store: Store) -> BuiltKernel:
    """One kernel, from the store when this tool has built it before from the same texts."""
    key = KeyFactors({
        "kernel": work.digest, "files": {n: sha256(d) for n, d in sorted(work.files.items())},
        "launch": sha256(canonical_json(dict(work.launch))),
        "target": target, "route": tool.route, "version": tool.version, "tool": tool.fingerprint, "flagtree": code_digest(),
    }).digest()  # fmt: skip
    entry = store.get(KIND, key)
    if entry:
        done = Finished(entry.files, entry.meta["launch"], entry.meta["facts"])  # type: ignore[arg-type]
    else:
        done = tool.finish(work)
        try:
            store.put(KIND, key, done.files, {"launch": dict(done.launch), "facts": dict(done.facts)})
        except StoreError:
            pass  # the next run builds it again
    by = {"tool": tool.version, "fingerprint": tool.fingerprint, "from": tool.made_from}
    return BuiltKernel(work.digest, LAST, "", {**work.files, **done.files}, done.launch, {**done.facts, "finalized": by})


def _nothing_raised(failures: Mapping[str, FlagtreeError]) -> FlagtreeError:
    first = next(iter(failures.values()))
    if len(failures) == 1:
        return first
    what = f"no kernel was raised, {len(failures)} failed; the first: {first.what}"
    return ToolchainError(what, where=first.where, why=first.why, hint=first.hint)


# -- writing ---------------------------------------------------------------------------------------------------------
def _write(bundle: Bundle, place: Path, made: Mapping[str, BuiltKernel], tool: Tool) -> str:
    """Put the new bundle at `place`; its digest.  BundleError when the bundle that it should replace is another one by now."""
    if place == bundle.path.resolve() and (now := open_bundle(place).digest) != bundle.digest:
        why = f"its digest was {bundle.digest} and is {now}"
        raise BundleError("the bundle was changed while it was finalized", where=str(place), why=why,
                          hint="run the command again; what was finished is kept")  # fmt: skip
    certificate, evidence = bundle.certificate(), None
    if certificate is not None:
        evidence = carried_evidence(certificate.evidence, made, tool.version, tool.made_from, bundle.digest)
    return write_again(
        bundle, place, list(made.values()), coverage=carried_coverage(bundle.manifest.coverage, made),
        versions={**bundle.manifest.versions, f"finalize.{tool.route}": tool.version}, certificate=evidence,
    )  # fmt: skip


def _vouch(digest: str) -> bool:
    """Let the store remember the result; False when it cannot be written, then the digest must be named to run it."""
    try:
        record_built(digest)
    except StoreError:
        return False
    return True
