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

from flagtree.capture.normalise import Normalised, normalise
from flagtree.codegen.cpp import generate
from flagtree.codegen.launch import launch_list
from flagtree.debug import Ladder
from flagtree.errors import CodegenError
from flagtree.ir.canonical import digest, isolate_all
from flagtree.ir.index import Index, from_sympy
from flagtree.ir.program import Kernel, Program
from flagtree.lower.decompositions import DECOMPOSITIONS
from flagtree.lower.lowering import lower, lowers
from flagtree.passes.base import Fuel, Report
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.runtime.capture_key import example_value
from flagtree.settings import settings
from flagtree.targets import find_target
from flagtree.toolchain.build import build_kernels
from flagtree.toolchain.cxx import link


@dataclass(frozen=True)
class CompiledGraph:
    """`launch`: JSON; `library`: a shared object for `level`, empty when there is no kernel; `results`: JSON, one entry a result of
    the graph; `conditions`: JSON relations that must hold, None when they cannot be written down (then nothing is stored)."""

    launch: dict
    library: bytes
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


def compile_graph(module: fx.GraphModule, symbols: dict[str, str], level: str, jobs: int = 1, name: str = "graph") -> CompiledGraph:
    """Compile Dynamo's graph for this CPU at `level`.

    `symbols` renames the shape environment's symbols as the capture key did.  Raises CaptureError, LoweringError, CodegenError or
    ToolchainError; the caller decides whether the graph then runs as it is.
    """
    names = placeholder_names(module)
    values = [example_value(n) for n in module.graph.nodes if n.op == "placeholder"]
    shape_env = _shape_env(values)
    before = len(shape_env.guards) if shape_env is not None else 0
    normal = normalise(module, names, values, lowers, DECOMPOSITIONS, _fake_mode(values))
    ladder = Ladder(name)
    program, results, reports = _generated(normal, ladder)
    ladder.finish(program)
    isolated = {kernel.name: (one, digest(one.program)) for kernel, one in isolate_all(program)}
    target = replace(find_target("cpu"), levels=(level,))
    built = build_kernels([(d, one.program) for one, d in isolated.values()], target, jobs)
    ladder.built(built)
    objects = [(b.digest, b.files[f"{level}.o"]) for b in built]
    return CompiledGraph(
        launch=launch_list(program, isolated),
        library=link(objects, level) if objects else b"",
        results=[_result(r, program) for r in results],
        conditions=_conditions(shape_env, before, symbols),
        constants=normal.constants,
        program=program,
        reports=reports,
    )


def _generated(normal: Normalised, ladder: Ladder) -> tuple[Program, list[object], list[Report]]:
    """The program after all passes.  Calls whose kernel the generator cannot express become externs with its reason."""
    target = find_target("cpu")
    refused: dict[str, str] = {}
    while True:
        lowered = lower(normal.graph, "graph", dict.fromkeys(normal.constants, "constant"), refused)
        ladder.start(lowered.program)
        program, reports = run_pipeline(lowered.program, pipeline(target), target, fuel=Fuel(settings.fuel), after=ladder.after)
        more = {op: reason for kernel, reason in _inexpressible(program) for op in kernel.ops}
        if not more:
            return program, lowered.results, reports
        if more.keys() <= refused.keys():  # an op that is an extern already cannot be at fault
            raise CodegenError("a kernel cannot be generated", where=", ".join(more), why=next(iter(more.values())))
        refused |= more


def _inexpressible(program: Program) -> Iterator[tuple[Kernel, str]]:
    for kernel, one in isolate_all(program):
        try:
            generate(one.program, digest(one.program))
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


def _result(value: object, program: Program) -> list:
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
