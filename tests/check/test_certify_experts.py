"""The kernels of a mixture of experts get their certificate: every one executed and compared with PyTorch's calls; a wrong one is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from flagtree.check import examine as examining
from flagtree.check.certify import LONG, SHORT, Subject, certify, examine
from flagtree.check.inputs import make_operands, sample_symbols
from flagtree.check.positions import Positions
from flagtree.codegen import triton_experts
from flagtree.ir import experts
from flagtree.ir.canonical import isolate_all
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets import find_target
from flagtree.targets.base import Target
from flagtree.toolchain import emulator
from flagtree.toolchain.build import toolchain_of
from tests.check.subjects import subjects
from tests.codegen.test_triton_experts import Layer, lowered_graph, operands_of

emulated = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing() or "the emulator runs")


def subjects_of(target: Target, most: int = 64) -> list[Subject]:
    """Every kernel of a small layer, built."""
    return subjects(*lowered_graph(Layer(2, "softmax"), operands_of(4, 6, 2, torch.bfloat16, 64, 48), most), target)


def one_level(name: str) -> Target:
    target = find_target(name)
    return replace(target, levels=target.levels[:1]) if target.levels else target


def product_of(subjects: list[Subject], up: bool) -> Subject:
    for subject in subjects:
        known = experts.known(subject.isolated.program, subject.isolated.kernel)
        if known is not None and known.product.up == up:
            return subject
    raise AssertionError("no product")


@pytest.mark.parametrize("name", ["cpu", pytest.param("metax", marks=emulated)])
def test_each_kernel_of_a_layer_is_executed_and_compared_with_eager(name: str) -> None:
    target = one_level(name)
    records = certify(subjects_of(target), target).kernels.values()
    assert len(records) == 5 - (target.warp == 1)  # route, sort, up with gate, down, sum; on the CPU the products are calls
    for record in records:
        assert (record["verdict"], record["eager"]) == ("pass", "compared"), record
        assert all("rms_eager" in out or not out["dtype"].startswith(("f", "bf")) for run in record["runs"]  # type: ignore[attr-defined]
                   for out in run["outputs"].values() if "computed" not in run["inputs"])  # fmt: skip


@emulated
@pytest.mark.parametrize("up", [True, False])
def test_large_weights_are_executed_tile_by_tile_in_every_kind_of_input(up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for MiniMax-M2, whose experts' weights no test holds."""
    monkeypatch.setattr(examining, "WHOLE", 0)
    target = find_target("metax")
    subject = product_of(subjects_of(target, 8), up)
    (record,) = examine([subject], target, form=LONG).kernels.values()
    assert record["verdict"] == "pass", record
    runs: list[Mapping] = record["runs"]  # type: ignore[assignment]
    assert len({run["inputs"]["kind"] for run in runs}) == 8 and all("blocks" in run["inputs"]["computed"] for run in runs)
    assert all(out["elements_with_eager"] == out["elements"] for run in runs for out in run["outputs"].values())


@emulated
@pytest.mark.parametrize("whole", [True, False])
def test_a_product_with_another_experts_weights_is_found(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(examining, "WHOLE", 0)
    target = find_target("metax")
    subject = product_of(subjects_of(target), True)
    written = triton_experts.context
    monkeypatch.setattr(triton_experts, "context", lambda *given: written(*given) | {"wide": 95})
    (built,) = toolchain_of(target).build([(subject.digest, subject.isolated.program)], target, 1)  # type: ignore[call-arg]
    (record,) = examine([replace(subject, built=built)], target, form=SHORT).kernels.values()
    assert record["verdict"] == "fail"


def test_rows_are_sorted_choices_permuted_and_some_experts_empty() -> None:
    target = find_target("metax")
    _, before = lowered_graph(Layer(2, "softmax"), operands_of(4, 6, 2, torch.bfloat16, 64, 48), 64)
    program, _ = run_pipeline(before.program, pipeline(target), target)
    found = [(alone.program, k) for _, alone in isolate_all(program) if (k := experts.known(alone.program, alone.kernel)) is not None]
    assert len(found) == 2
    empty = 0
    for alone, known in found:
        for symbols in (*sample_symbols(alone), {s.name: s.hi for s in alone.symbols}):
            for seed in range(4):
                operands = make_operands(alone, symbols, seed)
                values = Positions(alone, symbols, seed)
                for starts, order in (
                    (operands[known.names.starts].tensor, operands[known.names.order].tensor),
                    (values.whole(known.names.starts), values.whole(known.names.order)),
                ):
                    rows = 2 * symbols["n0"]
                    assert starts[0] == 0 and starts[-1] == rows and bool((starts.diff() >= 0).all())
                    assert sorted(order.tolist()) == list(range(rows))
                    empty += int((starts.diff() == 0).any())
    assert empty > 10
