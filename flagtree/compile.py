"""`flagtree compile`, whole: a model in, one checked bundle a target out.

Parts are captured once for all targets; per target the pipeline runs, kernels are built and executed once, and the bundle is
published.  When nothing changed, the bundle of last time is found by its key and nothing of this is imported.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flagtree.artifact.bundle import copy_bundle, open_bundle, write_bundle
from flagtree.artifact.code import code_digest
from flagtree.artifact.container import SUFFIX, check_one_file, check_place
from flagtree.artifact.files import writing
from flagtree.artifact.key import KeyFactors
from flagtree.artifact.store import Store
from flagtree.artifact.trust import record_built
from flagtree.capture.model_spec import ModelSpec, load_spec, spec_key
from flagtree.check.report import BundleReport, CompileReport
from flagtree.errors import BundleError, StoreError
from flagtree.progress import SILENT, Progress
from flagtree.settings import settings
from flagtree.targets import find_target
from flagtree.targets.base import Target

if TYPE_CHECKING:
    from flagtree.capture.parts import CapturedPart

KIND = "bundle"


def compile_model(
    model: str,
    targets: Sequence[str],
    *,
    parts: Sequence[str] | None = None,
    layers: int | None = None,
    dtype: str | None = None,
    ranks: int = 1,
    out: Path | None = None,
    jobs: int | None = None,
    progress: Progress = SILENT,
) -> CompileReport:
    """Compile `model` (a name, a YAML or a config.json) for each target.

    `parts`: all by default; `layers`: another depth; `dtype`: another element type; `ranks`: over which the weights
    are divided, one bundle for all of them; `out`: a folder for the bundles, or a file
    `.ftb` for one; else they stay in the store.  Raises the error of the part that fails; what was there before is then as it was.
    """
    spec = load_spec(model)
    spec = spec if layers is None else spec.with_depth(layers)
    spec = spec if ranks == 1 else spec.with_ranks(ranks)
    chosen = tuple(dict.fromkeys(parts or spec.part_names))
    for part in chosen:
        spec.bounds(part)
    check_one_file(out, targets)
    job = _Job(spec, chosen, dtype, jobs or settings.jobs, progress)
    job.title = _title(spec, layers, dtype)
    return CompileReport(spec.name, tuple(job.bundle(find_target(name), out) for name in targets))


def _title(spec: ModelSpec, layers: int | None, dtype: str | None) -> str:
    """The model's name, and what was chosen instead of its own depth and type: two such bundles do not take each other's place."""
    depth = "" if layers is None else f"-{layers}-layers"
    ranks = "" if spec.capture.ranks == 1 else f"-tp{spec.capture.ranks}"
    return spec.name + depth + ranks + ("" if dtype is None else f"-{spec.element(dtype)}")


class _Job:
    """One call of `compile_model`: the captured parts are made on first need and shared by all targets."""

    def __init__(self, spec: ModelSpec, parts: tuple[str, ...], dtype: str | None, jobs: int, progress: Progress) -> None:
        self.spec, self.parts, self.dtype, self.jobs, self.progress = spec, parts, dtype, jobs, progress
        self.store = Store()
        self.title = spec.name
        self._captured: dict[str, CapturedPart] = {}

    def bundle(self, target: Target, out: Path | None) -> BundleReport:
        """The bundle for one target: last time's when its key is the same and it is whole, else built now."""
        key = self._key(target)
        name = folder_name(f"{self.title}-{target.name}")
        place = None if out is None else out if out.suffix == SUFFIX else out / name
        if place is not None:
            check_place(place)  # said now, not after minutes of work
        home = settings.cache_dir / "bundles" / key.digest()[:16] / name
        report = self._known(key, home)
        if report is None:
            _prepare(home)
            report = self._build(target, home, key)
        if place is not None:
            copy_bundle(home, place)
            report = replace(report, path=str(place))
        return report

    def _key(self, target: Target) -> KeyFactors:
        from importlib.metadata import PackageNotFoundError, version

        from flagtree.toolchain.build import toolchain_of

        try:
            own = version("flagtree-toolkit")
        except PackageNotFoundError:
            own = "checkout"
        return KeyFactors(
            {
                "model": self.spec.name,
                "parts": {part: spec_key(self.spec, part, dtype=self.dtype) for part in self.parts},
                "depth": self.spec.depth,
                "target": target.name,
                "tools": toolchain_of(target).versions(target),
                "code": code_digest(),
                "settings": settings.key_factors(),
                "flagtree": own,
            }
        )

    def _known(self, key: KeyFactors, home: Path) -> BundleReport | None:
        entry = self.store.get(KIND, key.digest())
        if not entry:
            return None
        try:
            bundle = open_bundle(home)
            bundle.verify()
            stored = CompileReport.from_json(entry.files["report.json"].decode()).bundles[0]
        except (BundleError, StoreError, ValueError, KeyError, IndexError):  # damaged, or a report of another release: build anew
            return None
        if bundle.digest != stored.digest:
            return None
        return replace(stored, path=str(home), cached=True, seconds={})

    # -- building ------------------------------------------------------------------------------------------------------
    def _build(self, target: Target, home: Path, key: KeyFactors) -> BundleReport:
        from flagtree.assemble import assemble
        from flagtree.capture.shares import rank_map

        clock = Clock(self.progress)
        for part in self.parts:
            if part not in self._captured:
                clock.phase(f"capture {part}")
                from flagtree.capture.parts import capture_part

                self._captured[part] = capture_part(self.spec, part, self.dtype)
        made = assemble({p: self._captured[p] for p in self.parts}, target, self.jobs, clock, self.store)
        clock.phase("bundle")
        ranks = rank_map(self.spec, [self._captured[part].captured for part in self.parts])
        digest = write_bundle(home, name=self.spec.name, target=target.name, ranks=ranks, **made.content)
        record_built(digest, self.store)
        report = BundleReport(target.name, str(home), digest, made.parts, made.tiers, clock.seconds(), False, made.executed, made.stored)
        text = CompileReport(self.spec.name, (report,)).to_json()
        self.store.put(KIND, key.digest(), {"report.json": text.encode()}, {"factors": dict(key.factors)})
        return report


class Clock:
    """Passes progress on and keeps wall seconds by phase."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.spent, self.current, self.since = progress, dict[str, float](), "", 0.0

    def phase(self, name: str, total: int | None = None) -> None:
        self._stop()
        self.current, self.since = name, time.perf_counter()
        self.progress.phase(name, total)

    def advance(self, count: int = 1) -> None:
        self.progress.advance(count)

    def _stop(self) -> None:
        if self.current:
            self.spent[self.current] = self.spent.get(self.current, 0.0) + time.perf_counter() - self.since

    def seconds(self) -> Mapping[str, float]:
        self._stop()
        self.current = ""
        return {name: round(value, 3) for name, value in self.spent.items()}


def folder_name(name: str) -> str:
    """`name` as one part of a path: letters and digits of any language, and `. _ + -` inside; never empty, never hidden."""
    return re.sub(r"[^\w.+-]+", "-", name).strip(".-")[:100] or "model"


def _prepare(home: Path) -> None:
    """Make the folder for a bundle in the store, and room in it: what stands at `home` and is no bundle was damaged.

    StoreError before any work is done when the store cannot be written.
    """
    with writing(home.parent, "FLAGTREE_CACHE_DIR moves the store"):
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home.parent) as probe:
            probe.write(b"room?")
        try:
            open_bundle(home)
        except (BundleError, StoreError):
            if home.is_dir() and not home.is_symlink():
                shutil.rmtree(home)
            else:
                home.unlink(missing_ok=True)

