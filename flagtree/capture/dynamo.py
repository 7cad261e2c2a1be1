"""One graph from Dynamo to a launch list, a library and what the caller needs to run them again without us.

Everything here happens on a miss only.  The conditions that tracing added to Dynamo's guards are kept as data: a
later process that takes the stored result adds the same guards before it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flagtree.artifact.files import canonical_json
from flagtree.capture.normalise import Normalised, normalise
from flagtree.codegen import cpp, triton
from flagtree.codegen.launch import launch_list
from flagtree.debug import Ladder
from flagtree.errors import CodegenError, IRError, ToolchainError
from flagtree.ir.canonical import digest, isolate_all
from flagtree.ir.index import Index, from_sympy
from flagtree.ir.program import Kernel, Program
from flagtree.ir.verify import unproved
from flagtree.lower.backward import ONE_THREAD
from flagtree.lower.decompositions import DECOMPOSITIONS
from flagtree.lower.lowering import lower, lowers
from flagtree.passes.base import Fuel, Report
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.runtime.capture_key import example_value
from flagtree.settings import settings
from flagtree.targets import find_target
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.build import build_kernels
from flagtree.toolchain.cxx import link


@dataclass(frozen=True)
class CompiledGraph:
    """`launch`: JSON; `kernels`: their files by name, for the CPU "kernels.so" (none without a kernel), else "kernels.json" (digest to
    launch record) and the binaries "<16 hex>.<file>"; `results`: JSON, one entry a result of
    the graph; `conditions`: JSON relations that must hold, None when they cannot be written down (then nothing is stored)."""

    launch: dict
    kernels: dict[str, bytes]
    results: list
    conditions: list | None
    constants: dict[str, torch.Tensor]
    program: Program
    reports: list[Report]


def placeholder_names(module: fx.GraphModule) -> list[str]:
    """Buffer names in argument order; a number's is kept apart from a tensor's."""
    names = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            tensor = isinstance(example_value(node), torch.Tensor)
            names.append(node.name if tensor else f"size_{node.name}")
    return names


def compile_graph(
    module: fx.GraphModule, symbols: dict[str, str], target_name: str, level: str, jobs: int = 1, name: str = "graph"
) -> CompiledGraph:
    """Compile Dynamo's graph for a target; `level` is the CPU's, of the targets that have levels.

    `symbols` renames the shape environment's symbols as the capture key did.  Raises CaptureError, LoweringError, CodegenError or
    ToolchainError; the caller decides whether the graph then runs as it is.
    """
    names = placeholder_names(module)
    values = [example_value(n) for n in module.graph.nodes if n.op == "placeholder"]
    shape_env = _shape_env(values)
    before = len(shape_env.guards) if shape_env is not None else 0
    normal = normalise(module, names, values, lowers, DECOMPOSITIONS, _fake_mode(values))
    ladder, target = Ladder(name), find_target(target_name)
    program, results, reports = _generated(normal, ladder, target)
    ladder.finish(program)
    isolated = {kernel.name: (one, digest(one.program)) for kernel, one in isolate_all(program)}
    target = replace(target, levels=(level,)) if target.levels else target
    built = build_kernels([(d, one.program) for one, d in isolated.values()], target, jobs)
    ladder.built(built)
    return CompiledGraph(
        launch=launch_list(program, isolated),
        kernels=_files(built, target),
        results=[result_of(r, program) for r in results],
        conditions=_conditions(shape_env, before, symbols),
        constants=normal.constants,
        program=program,
        reports=reports,
    )


def _files(built: Sequence[BuiltKernel], target: Target) -> dict[str, bytes]:
    """What `CompiledGraph.kernels` holds."""
    if target.levels:
        (level,) = target.levels
        return {"kernels.so": link([(b.digest, b.files[f"{level}.o"]) for b in built], level)} if built else {}
    unfinished = next((b for b in built if b.tier != "binary"), None)
    if unfinished is not None:
        raise ToolchainError(f"kernels for {target.name} do not run here", where=unfinished.digest[:16], why=unfinished.missing)
    binaries = {f"{b.digest[:16]}.{v['file']}": b.files[v["file"]] for b in built for v in _variants(b)}
    return {"kernels.json": canonical_json({b.digest: b.launch for b in built}), **binaries}


def _variants(kernel: BuiltKernel) -> list[Any]:
    variants: Any = kernel.launch["variants"]
    return list(variants.values())


def _generated(normal: Normalised, ladder: Ladder, target: Target) -> tuple[Program, list[object], list[Report]]:
    """The program after all passes.  Calls whose kernel the generator cannot express, or whose indices nobody can prove (sizes that torch
    knows to be equal and the IR does not), become externs with the reason."""
    refused = {} if target.warp <= 1 else dict(ONE_THREAD)
    while True:
        lowered = lower(normal.graph, "graph", dict.fromkeys(normal.constants, "constant"), refused)
        ladder.start(lowered.program)
        try:
            program, reports = run_pipeline(lowered.program, pipeline(target), target, fuel=Fuel(settings.fuel), after=ladder.after)
            more = {op: reason for kernel, reason in _inexpressible(program, target) for op in kernel.ops}
        except IRError:
            more = {op: why for kernel, why in _unprovable(lowered.program) for op in kernel.ops}
            if not more:  # a pass broke the program
                raise
        if not more:
            return program, lowered.results, reports
        if more.keys() <= refused.keys():  # an op that is an extern already cannot be at fault
            raise CodegenError("a kernel cannot be generated", where=", ".join(more), why=next(iter(more.values())))
        refused |= more


def _unprovable(program: Program) -> Iterator[tuple[Kernel, str]]:
    """Kernels that break a rule as they were lowered."""
    for step in program.steps:
        if isinstance(step, Kernel) and (why := unproved(program, step)) is not None:
            yield step, f"sizes: {why}"


def _inexpressible(program: Program, target: Target) -> Iterator[tuple[Kernel, str]]:
    for kernel, one in isolate_all(program):
        try:
            if target.language == "triton":
                triton.generate(one.program, digest(one.program), target)
            else:
                cpp.generate(one.program, digest(one.program))
        except CodegenError as error:
            yield kernel, f"code generation: {error.why or error.what}"


def _shape_env(values: Sequence[Any]) -> Any:
    for value in values:
        for size in (value, *(value.shape if isinstance(value, torch.Tensor) else ())):
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def _fake_mode(values: Sequence[Any]) -> FakeTensorMode:
    """The mode of the example values, which tracing must not mix with another."""
    found = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    return found if found is not None else FakeTensorMode(allow_non_fake_inputs=True)


def result_of(value: object, program: Program) -> list:
    """["buffer", position among the outputs], ["index", expression] or ["value", a plain value]."""
    if isinstance(value, str):
        return ["buffer", program.outputs.index(value)]
    return ["index", value.to_json()] if isinstance(value, Index) else ["value", value]


_RELATIONS = {"Equality": "==", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=", "StrictGreaterThan": ">", "GreaterThan": ">="}


def _conditions(shape_env: Any, before: int, symbols: dict[str, str]) -> list | None:
    """The guards that tracing added, as [relation, left, right] over the capture key's symbol names."""
    if shape_env is None:
        return []
    out = []
    for guard in shape_env.guards[before:]:
        relation = _RELATIONS.get(type(guard.expr).__name__)
        if relation is None or any(s.name not in symbols for s in guard.expr.free_symbols):
            return None
        sides = [from_sympy(a, symbols.__getitem__) for a in guard.expr.args]
        if any(s is None for s in sides):
            return None
        out.append([relation, *(s.to_json() for s in sides if s is not None)])
    return out
