"""The certificate of one bundle: a subject for each distinct kernel of its parts, executed and judged by check/certify.py.

A kernel whose own code cannot run here is built once more, from the same isolated text, for a target that the emulator executes; the
evidence says so.  Called by flagtree/assemble.py before the bundle is written: a wrong kernel stops it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from flagtree.artifact.store import Store
from flagtree.check.certify import Subject, certify
from flagtree.check.eager import eager_of
from flagtree.check.experts_eager import in_pieces
from flagtree.check.recipe import NoEager
from flagtree.check.stored import Description, kernel_files, subject_of
from flagtree.errors import FlagtreeError
from flagtree.ir.canonical import Isolated, digest, isolate_all
from flagtree.ir.program import Kernel, Program
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.progress import SILENT, Progress
from flagtree.targets import all_targets
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.build import build_kernels

if TYPE_CHECKING:
    from flagtree.assemble import GeneratedPart


@dataclass(frozen=True, slots=True)
class Gathered:
    """`content`: the certificate's evidence.  `executed`: how a kernel was run to the number of distinct kernels run that way.
    `files`: by digest, what the bundle must hold so that `verify` can repeat it."""

    content: Mapping[str, object]
    executed: Mapping[str, int]
    files: Mapping[str, Mapping[str, bytes]]


def gather(
    generated: Mapping[str, GeneratedPart], built: Mapping[str, BuiltKernel], target: Target, jobs: int, progress: Progress, store: Store
) -> Gathered:
    """Evidence for every kernel of `built` (by digest).  Raises WrongKernel."""
    described: dict[str, Description] = {}
    for part in generated.values():
        graph = in_pieces(part.part.graph)
        # the folded program has lost which layer a buffer stood for; the captured depth has a node for each
        program, _ = run_pipeline(part.part.lowered.program, pipeline(target), target, check=False)
        for kernel, alone in isolate_all(program):
            if (key := digest(alone.program)) not in described:
                described[key] = _described(graph, part, program, kernel, alone)
        for kernel, alone, key in part.originals():
            described.setdefault(key, Description(kernel, alone, None, "the kernel is not one of the captured depth"))
    return gather_described(described, built, target, jobs, progress, store)


def gather_described(
    described: Mapping[str, Description], built: Mapping[str, BuiltKernel], target: Target, jobs: int, progress: Progress, store: Store
) -> Gathered:
    """As `gather`, for kernels that are described already, by digest."""
    wanted = [subject_of(key, described[key]) for key in sorted(built)]
    evidence = certify([_with_code(s, c, why) for s, (c, why) in zip(wanted, code_for(wanted, built, target, jobs, store), strict=True)],
                       target, progress=progress)  # fmt: skip
    return Gathered(evidence.to_dict(), evidence.executed, {key: kernel_files(described[key]) for key in built})


def _described(graph: fx.Graph, part: GeneratedPart, program: Program, kernel: Kernel, alone: Isolated) -> Description:
    try:
        return Description(kernel, alone, eager_of(graph, program, kernel, alone, part.part.lowered.symbols))
    except NoEager as error:
        return Description(kernel, alone, None, error.why)


def _with_code(subject: Subject, code: BuiltKernel | None, why: str) -> Subject:
    return replace(subject, built=code, unbuilt=why)


def code_for(
    subjects: list[Subject], built: Mapping[str, BuiltKernel], target: Target, jobs: int, store: Store
) -> list[tuple[BuiltKernel | None, str]]:
    """What to execute for each subject, or why nothing can be."""
    if target.levels or target.probe().executes == "emulator":
        return [(built[s.digest], "") for s in subjects]
    other = next((t for t in all_targets() if t.probe().executes == "emulator"), None)
    if other is None:
        why = "the code of this target cannot be run here, and the emulator cannot either"
        return [(None, why) for _ in subjects]
    try:
        found = {b.digest: b for b in build_kernels([(s.digest, s.isolated.program) for s in subjects], other, jobs, SILENT, store)}
        return [(found[s.digest], "") for s in subjects]
    except FlagtreeError:
        return [_alone(s, other, store) for s in subjects]  # one of them does not fit that target


def _alone(subject: Subject, other: Target, store: Store) -> tuple[BuiltKernel | None, str]:
    try:
        (found,) = build_kernels([(subject.digest, subject.isolated.program)], other, 1, SILENT, store)
    except FlagtreeError as error:
        return None, f"it does not build for the emulator: {error.what}{': ' if error.why else ''}{error.why}"
    return found, ""
