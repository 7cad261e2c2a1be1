"""Recorded graphs to a bundle: `flagtree compile --graphs FILE`, and what a lenient server builds at its start.

Each recorded graph is one part, named by its capture key; kernels that graphs share are built once.  Beside `compile.py`, which starts
from a model; what both need stands in `assemble.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flagtree.artifact.bundle import copy_bundle, write_bundle
from flagtree.artifact.container import SUFFIX, check_place
from flagtree.artifact.files import canonical_json, sha256
from flagtree.artifact.recording import RecordedGraph
from flagtree.artifact.store import Store
from flagtree.artifact.trust import record_built
from flagtree.assemble import libraries_of, tiers, versions
from flagtree.check.evidence import gather_described
from flagtree.check.report import BundleReport, CompileReport, PartReport
from flagtree.check.stored import Description
from flagtree.check.summary import Built, part_report
from flagtree.codegen.launch import launch_list
from flagtree.compile import Clock, folder_name
from flagtree.debug import Ladder
from flagtree.errors import BundleError, IRError
from flagtree.ir.canonical import Isolated, digest, isolate_all
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Extern, Kernel, Program
from flagtree.ir.text import print_program
from flagtree.ir.traffic import program_traffic
from flagtree.ir.verify import verify
from flagtree.passes.base import Fuel
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.progress import SILENT, Progress
from flagtree.settings import settings
from flagtree.targets import find_target
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.build import build_kernels

REFERENCE_TOKENS = 512  # the tokens of one step at which bytes are counted


def compile_graphs(
    graphs: Sequence[RecordedGraph],
    targets: Sequence[str],
    *,
    name: str = "graphs",
    out: Path | None = None,
    jobs: int | None = None,
    progress: Progress = SILENT,
) -> CompileReport:
    """One bundle a target from recorded graphs.  `out`: a folder for the bundles, or a file `.ftb` for one; else they stay in the store.

    Raises BundleError for a recording that is no valid program, and the error of the part that fails.
    """
    if out is not None and out.suffix == SUFFIX and len(targets) > 1:
        raise BundleError("one file cannot hold the bundles of several targets", where=str(out), hint="name a folder with --out")
    reports = []
    for target in map(find_target, targets):
        title = folder_name(f"{name}-{target.name}")
        place = None if out is None else out if out.suffix == SUFFIX else out / title
        if place is not None:
            check_place(place)
        identity = sha256(canonical_json([title, *(g.model_dump(mode="json") for g in graphs)]))
        home = settings.cache_dir / "bundles" / identity[:16] / title
        report = build_graphs(graphs, target, home, name=name, jobs=jobs or settings.jobs, progress=progress)
        if place is not None:
            copy_bundle(home, place)
        reports.append(report if place is None else BundleReport(**{**_fields(report), "path": str(place)}))
    return CompileReport(name, tuple(reports))


def _fields(report: BundleReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__slots__}


def build_graphs(
    graphs: Sequence[RecordedGraph],
    target: Target,
    home: Path,
    *,
    name: str,
    jobs: int,
    progress: Progress = SILENT,
    store: Store | None = None,
    check: bool = True,
) -> BundleReport:
    """Build the bundle at `home` and record that this machine built it.  `check`: execute every kernel for the certificate."""
    store, clock = store or Store(), Clock(progress)
    clock.phase("passes", len(graphs))
    lowered, programs, kernels = {}, {}, {}
    for graph in graphs:
        lowered[graph.name] = _parsed(graph)
        programs[graph.name] = _generated(graph.name, lowered[graph.name], target)
        kernels[graph.name] = {k.name: (alone, digest(alone.program)) for k, alone in isolate_all(programs[graph.name])}
        clock.advance()
    distinct = {d: alone.program for part in kernels.values() for alone, d in part.values()}
    clock.phase("kernels", len(distinct))
    built = {b.digest: b for b in build_kernels(list(distinct.items()), target, jobs, clock, store)}
    reports = {g.name: _report(g.name, target, lowered[g.name], programs[g.name], kernels[g.name], built) for g in graphs}
    clock.phase("certificate", len(distinct))
    evidence = gather_described(_described(programs, kernels), built, target, jobs, clock, store) if check else None
    files = evidence.files if evidence else {}
    clock.phase("bundle")
    made = write_bundle(
        home,
        name=name,
        target=target.name,
        parts={part: launch_list(program, kernels[part]) for part, program in programs.items()},
        kernels=[replace(built[d], files={**built[d].files, **files.get(d, {})}) for d in sorted(built)],
        libraries=libraries_of(target, built),
        coverage={g.name: _coverage(g, programs[g.name], reports[g.name]) for g in graphs},
        versions=versions(target),
        certificate=evidence.content if evidence else None,
        graphs={g.name: g.text for g in graphs},
        programs={part: print_program(program) for part, program in programs.items()},
    )
    record_built(made, store)
    executed = evidence.executed if evidence else {}
    return BundleReport(target.name, str(home), made, tuple(reports.values()), tiers(built), clock.seconds(), False, executed)


def _parsed(graph: RecordedGraph) -> Program:
    """The recorded program, one step a call."""
    try:
        program = parse_program(graph.program)
        verify(program)
    except IRError as error:
        raise BundleError("a recorded graph is no valid program", where=graph.name, why=error.render(), hint="record it again") from error
    return program


def _generated(name: str, lowered: Program, target: Target) -> Program:
    """The program after all passes."""
    ladder = Ladder(f"{name}-{target.name}")
    ladder.start(lowered)
    program, _ = run_pipeline(lowered, pipeline(target), target, fuel=Fuel(settings.fuel), after=ladder.after)
    ladder.finish(program)
    return program


def _report(
    part: str,
    target: Target,
    lowered: Program,
    program: Program,
    kernels: Mapping[str, tuple[Isolated, str]],
    built: Mapping[str, BuiltKernel],
) -> PartReport:
    digests = {kernel: d for kernel, (_, d) in kernels.items()}
    told = {d: Built(b.tier, b.missing, b.facts) for d, b in built.items()}
    sizes = {s.name: min(max(REFERENCE_TOKENS, s.lo), s.hi) for s in program.symbols}
    return part_report(part, target.name, program, digests, told, _bytes_by_node(lowered, sizes), None, sizes)


def _bytes_by_node(lowered: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes before fusion: as lowered, each call is a kernel of its own."""
    origins = {step.name: step.origins for step in lowered.steps if isinstance(step, Kernel | Extern)}
    out: dict[str, int] = {}
    for moved in program_traffic(lowered, sizes).steps:
        for origin in origins.get(moved.name, ())[:1]:
            out[origin.node] = out.get(origin.node, 0) + moved.bytes
    return out


def _coverage(graph: RecordedGraph, program: Program, report: PartReport) -> dict[str, object]:
    return {
        "graph": {"key": graph.key, "results": [list(r) for r in graph.results], "versions": graph.versions, "facts": graph.facts},
        "symbols": {s.name: [s.lo, s.hi, s.multiple] for s in program.symbols},
        "report": report.to_dict(),
    }


def _described(programs: Mapping[str, Program], kernels: Mapping[str, Mapping[str, tuple[Isolated, str]]]) -> dict[str, Description]:
    """Each distinct kernel by digest: a recording has no graph of torch's whose result could be compared."""
    out: dict[str, Description] = {}
    for part, program in programs.items():
        for kernel, _ in isolate_all(program):
            alone, key = kernels[part][kernel.name]
            out.setdefault(key, Description(kernel, alone, None, "the kernel comes from a recording"))
    return out
