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
from flagtree.artifact.container import SUFFIX, check_one_file, check_place
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
from flagtree.ir.program import Extern, Kernel, Program, Repeat
from flagtree.ir.text import print_program
from flagtree.ir.traffic import program_traffic
from flagtree.ir.verify import verify
from flagtree.passes.base import Fuel
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.passes.repeat import fold_layers, named_layers, unrolled
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
    check_one_file(out, targets)
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
        programs[graph.name] = _generated(graph, lowered[graph.name], target)
        kernels[graph.name] = {k.name: (alone, digest(alone.program)) for k, alone in isolate_all(programs[graph.name])}
        clock.advance()
    distinct = {d: alone.program for part in kernels.values() for alone, d in part.values()}
    clock.phase("kernels", len(distinct))
    built = {b.digest: b for b in build_kernels(list(distinct.items()), target, jobs, clock, store)}
    reports = {g.name: _report(g, target, lowered[g.name], programs[g.name], kernels[g.name], built) for g in graphs}
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
    """The recorded program, one step a call; of equal inner layers the first two."""
    try:
        program = parse_program(graph.program)
        verify(program)
        _check_layers(graph, program)
    except IRError as error:
        raise BundleError("a recorded graph is no valid program", where=graph.name, why=error.render(), hint="record it again") from error
    return program


def _check_layers(graph: RecordedGraph, program: Program) -> None:
    """IRError when the names of layers and arguments are not those of one program."""
    names = [name for layer in graph.layers for name in layer]
    present = {b.name for b in program.buffers}
    if not graph.layers and not graph.arguments:
        return
    if len(graph.layers) < 3 or len({len(layer) for layer in graph.layers}) != 1 or len(set(names)) != len(names):
        raise IRError("the layers of the recording do not correspond")
    kept, gone = [[n for layer in some for n in layer] for some in (graph.layers[:2], graph.layers[2:])]
    if not present.issuperset(kept) or not present.isdisjoint(gone):
        raise IRError("the program of the recording does not have its first two inner layers")
    made = {name for step in program.steps if isinstance(step, Extern) for name in step.outputs}
    given = {b.name for b in program.buffers if b.alias_of is None and b.role != "temp"} - made
    if len(set(graph.arguments)) != len(graph.arguments) or set(graph.arguments) != given.union(names):
        raise IRError("the arguments of the recording are not those of its program")


def _generated(graph: RecordedGraph, lowered: Program, target: Target) -> Program:
    """The program after all passes, at full depth.  The passes see few layers; all of them where these no longer are equal then."""
    program = _passed(graph.name, lowered, target)
    if not graph.layers:
        return program
    layers = named_layers(graph.layers)
    try:
        folded = fold_layers(program, layers)
    except IRError:
        return _passed(graph.name, _in_order(unrolled(fold_layers(lowered, layers)), lowered, graph), target)
    folded = _in_order(folded, lowered, graph)
    verify(folded)
    return folded


def _passed(name: str, lowered: Program, target: Target) -> Program:
    ladder = Ladder(f"{name}-{target.name}")
    ladder.start(lowered)
    program, _ = run_pipeline(lowered, pipeline(target), target, fuel=Fuel(settings.fuel), after=ladder.after)
    ladder.finish(program)
    return program


def _in_order(program: Program, lowered: Program, graph: RecordedGraph) -> Program:
    """Every argument declared, in the order in which the server passes them, also one that nothing reads any more."""
    first = {name: like for layer in graph.layers for name, like in zip(layer, graph.layers[0])}
    declared = {b.name: b for b in program.buffers}
    given = {name: declared.get(name) or replace(lowered.buffer(first.get(name, name)), name=name) for name in graph.arguments}
    return program.with_(buffers=(*given.values(), *(b for b in program.buffers if b.name not in given)))


def _report(
    graph: RecordedGraph,
    target: Target,
    lowered: Program,
    program: Program,
    kernels: Mapping[str, tuple[Isolated, str]],
    built: Mapping[str, BuiltKernel],
) -> PartReport:
    digests = {kernel: d for kernel, (_, d) in kernels.items()}
    told = {d: Built(b.tier, b.missing, b.facts) for d, b in built.items()}
    sizes = {s.name: min(max(REFERENCE_TOKENS, s.lo), s.hi) for s in program.symbols}
    before = _bytes_of_a_layer(fold_layers(lowered, named_layers(graph.layers)), sizes) if graph.layers else None
    report = part_report(graph.name, target.name, program, digests, told, _bytes_by_node(lowered, sizes), before, sizes)
    return replace(report, about=_about(graph))


def _about(graph: RecordedGraph) -> str:
    """Whose graph it is, for a reader."""
    facts = graph.facts
    known = [facts.get("model", ""), f"tensor parallel {facts['tensor_parallel']}" if "tensor_parallel" in facts else ""]
    return ", ".join([*filter(None, known), f"predicted {facts['predicted']}" if "predicted" in facts else "recorded"])


def _bytes_of_a_layer(lowered: Program, sizes: Mapping[str, int]) -> int:
    """Bytes before fusion of one inner layer, externs included."""
    (repeat,) = (s for s in lowered.steps if isinstance(s, Repeat))
    inner = {step.name for step in repeat.body}
    return sum(s.bytes for s in program_traffic(lowered, sizes).steps if s.name in inner) // repeat.count


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
