"""The kernels of a mixture of experts get their certificate: executed, and compared with eager where an operator of the graph is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flagtree.check.certify import certify
from flagtree.check.eager import eager_of
from flagtree.check.recipe import NoEager
from flagtree.check.stored import Description, subject_of
from flagtree.ir.canonical import digest, isolate_all
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets import find_target
from flagtree.toolchain import emulator
from flagtree.toolchain.build import toolchain_of
from tests.codegen.test_triton_experts import Layer, lowered_graph, operands_of

_emulated = pytest.param("metax", marks=pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing() or "the emulator runs"))


@pytest.mark.parametrize("name", ["cpu", _emulated])
def test_each_kernel_of_a_layer_is_executed_or_says_why_not(name: str) -> None:
    target = find_target(name)
    target = replace(target, levels=target.levels[:1]) if target.levels else target
    graph, before = lowered_graph(Layer(2, "softmax"), operands_of(4, 6, 2, torch.bfloat16, 64, 48), 64)
    program, _ = run_pipeline(before.program, pipeline(target), target)
    subjects = []
    for kernel, alone in isolate_all(program):
        try:
            told = Description(kernel, alone, eager_of(graph, program, kernel, alone, before.symbols))
        except NoEager as error:
            told = Description(kernel, alone, None, error.why)
        key = digest(alone.program)
        (built,) = toolchain_of(target).build([(key, alone.program)], target, 1)  # type: ignore[call-arg]
        subjects.append(subject_of(key, told, built))
    records = {str(r["name"]): r for r in certify(subjects, target).kernels.values()}
    executed = {n: r.get("verdict") for n, r in records.items()}
    products = {n for n, r in records.items() if "sorted by expert" in str(r.get("not_executed"))}
    assert len(products) == (2 if target.warp > 1 else 0)
    assert {v for n, v in executed.items() if n not in products} == {"pass"}
    assert next(r for n, r in records.items() if n.startswith("moe_route"))["eager"] == "compared"
