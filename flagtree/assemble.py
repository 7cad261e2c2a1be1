"""From captured parts to the content of one bundle for one target: pipeline, kernels, libraries, launch lists, evidence.

Nothing here looks at a target's name: its language, toolchain and facts decide.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flagtree.artifact.code import code_digest
from flagtree.artifact.store import Store
from flagtree.capture.parts import CapturedPart
from flagtree.check.report import PartReport
from flagtree.check.summary import Built, part_report
from flagtree.codegen.launch import launch_list
from flagtree.debug import Ladder
from flagtree.ir.canonical import Isolated, digest, isolate_all
from flagtree.ir.program import Kernel, Program
from flagtree.ir.text import print_program
from flagtree.ir.verify import verify
from flagtree.passes.base import Fuel, Report
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.passes.reinplace import rename_output
from flagtree.passes.repeat import fold_layers
from flagtree.progress import Progress
from flagtree.settings import settings
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.build import build_kernels, toolchain_of


@dataclass(frozen=True)
class GeneratedPart:
    """A part after all passes, at full depth: its kernels alone and by digest, and what the passes declined."""

    part: CapturedPart
    program: Program
    kernels: Mapping[str, tuple[Isolated, str]]  # kernel name -> (alone, digest)
    reports: tuple[Report, ...]

    def originals(self) -> Iterator[tuple[Kernel, Isolated, str]]:
        """Each kernel with its actual names, its isolated form and digest."""
        for kernel, _ in isolate_all(self.program):
            yield kernel, *self.kernels[kernel.name]


@dataclass(frozen=True)
class Assembled:
    """`content`: the keyword arguments of `write_bundle`; the rest is for the report."""

    content: dict[str, Any]
    parts: tuple[PartReport, ...]
    tiers: Mapping[str, int]
    executed: Mapping[str, int] = field(default_factory=dict)
    stored: int = 0


def generate_part(part: CapturedPart, target: Target) -> GeneratedPart:
    """Run the pipeline on the captured depth and fold it to the full one.  Raises IRError when a pass broke a rule."""
    ladder = Ladder(f"{part.captured.name}-{target.name}")
    ladder.start(part.lowered.program)
    fuel = Fuel(settings.fuel)
    program, reports = run_pipeline(part.lowered.program, pipeline(target), target, fuel=fuel, after=ladder.after)
    program = rename_output(fold_layers(program, part.layers), 0, part.captured.result)
    verify(program)
    ladder.finish(program)
    kernels = {kernel.name: (alone, digest(alone.program)) for kernel, alone in isolate_all(program)}
    return GeneratedPart(part, program, kernels, tuple(reports))


def assemble(parts: Mapping[str, CapturedPart], target: Target, jobs: int, progress: Progress, store: Store) -> Assembled:
    """Compile every part for `target`; kernels shared by parts are built once."""
    progress.phase("passes", len(parts))
    generated = {}
    for name, part in parts.items():
        generated[name] = generate_part(part, target)
        progress.advance()
    distinct = {d: alone.program for g in generated.values() for alone, d in g.kernels.values()}
    progress.phase("kernels", len(distinct))
    stored: list[int] = []
    built = {b.digest: b for b in build_kernels(list(distinct.items()), target, jobs, progress, store, stored.append)}
    Ladder(f"{next(iter(parts.values())).captured.name}-{target.name}").built(built.values())
    progress.phase("certificate", len(distinct))
    from flagtree.check.evidence import gather

    evidence = gather(generated, built, target, jobs, progress, store)
    reports = {name: _report(name, g, target, built) for name, g in generated.items()}
    content = {
        "parts": {name: launch_list(g.program, g.kernels) for name, g in generated.items()},
        "kernels": [replace(built[d], files={**built[d].files, **evidence.files[d]}) for d in sorted(built)],
        "libraries": libraries_of(target, built),
        "constants": _constants(parts),
        "coverage": _coverage(generated, reports),
        "versions": versions(target),
        "certificate": evidence.content,
        "programs": {name: print_program(g.program.with_(name=name)) for name, g in generated.items()},
    }
    return Assembled(content, tuple(reports.values()), tiers(built), evidence.executed, stored[0])


def _report(name: str, g: GeneratedPart, target: Target, built: Mapping[str, BuiltKernel]) -> PartReport:
    digests = {kernel: d for kernel, (_, d) in g.kernels.items()}
    told = {d: Built(b.tier, b.missing, b.facts) for d, b in built.items()}
    before = g.part.before
    inner = before.layer_bytes(g.part.captured.inner_layer)
    return part_report(name, target.name, g.program, digests, told, before.node_bytes(), inner, g.part.reference)


def libraries_of(target: Target, built: Mapping[str, BuiltKernel]) -> dict[str, bytes]:
    """One shared object a level, from the objects that every kernel has."""
    link = getattr(toolchain_of(target), "link", None)
    if link is None or not built:
        return {}
    levels = [level for level in target.levels if all(f"{level}.o" in b.files for b in built.values())]
    return {level: link([(d, b.files[f"{level}.o"]) for d, b in sorted(built.items())], level) for level in levels}


def _constants(parts: Mapping[str, CapturedPart]) -> dict[str, torch.Tensor]:
    """Tables by name; parts of one model share them."""
    out: dict[str, torch.Tensor] = {}
    for part in parts.values():
        out.update(part.constants)
    return out


def _coverage(generated: Mapping[str, GeneratedPart], reports: Mapping[str, PartReport]) -> dict[str, object]:
    """Which sizes each part promises, what its passes declined, and its report: all that `inspect` and `explain` show."""
    return {
        name: {
            "symbols": {s.name: [s.lo, s.hi, s.multiple] for s in g.program.symbols},
            "report": reports[name].to_dict(),
            "refused": _refusals(g),
        }
        for name, g in generated.items()
    }


def _refusals(g: GeneratedPart) -> list[str]:
    """What the passes declined for good: pairs that still stand apart; those that a later merge made moot are left out."""
    standing = {kernel.name for kernel, _ in isolate_all(g.program)}
    return sorted({str(r) for report in g.reports for r in report.refused if standing.issuperset(r.steps)})


def tiers(built: Mapping[str, BuiltKernel]) -> dict[str, int]:
    out: dict[str, int] = {}
    for kernel in built.values():
        out[kernel.tier] = out.get(kernel.tier, 0) + 1
    return out


def versions(target: Target) -> dict[str, str]:
    """What built the bundle, by name."""
    found = {"torch": importlib.metadata.version("torch"), "code": code_digest()}
    return found | {f"tool.{name}": value for name, value in toolchain_of(target).versions(target).items()}
