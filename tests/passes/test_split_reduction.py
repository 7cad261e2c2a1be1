"""Split column reductions where they run: equal bits at every CPU level and from call to call, and the emulated GPU's numbers."""

from __future__ import annotations

import pytest
import torch

from flagtree.ir.canonical import digest, isolate, isolate_all
from flagtree.ir.program import Kernel, Program
from flagtree.ir.text import parse_program, print_program
from flagtree.passes.pipeline import parse_pipeline, pipeline, run_pipeline
from flagtree.targets import find_target
from flagtree.toolchain.emulator import execute_built, missing
from tests.codegen.cpp_runner import reference, run
from tests.codegen.triton_kernels import METAX, assert_close
from tests.scheduled import build_maca

TEXT = """
program gradients
  symbol s0 in 1..100000 from dim x 0
  buffer x: {dtype}[s0, {columns}] input
  buffer dy: {dtype}[s0, {columns}] input
  buffer dw: {dtype}[{columns}] temp
  buffer db: f32[{columns}] temp
  kernel sums {{i0 < {columns}}} reduce {{r0 < s0}} numerics(eager, contract=off, acc=f32)
    v0: {dtype} = load x[r0, i0]
    v1: f32 = cast v0
    v2: {dtype} = load dy[r0, i0]
    v3: f32 = cast v2
    v4: f32 = mul v1, v3
    v5: f32 = sum v4 over r0
    v6: f32 = sum v3 over r0
    v7: {dtype} = cast v5
    store dw[i0] = v7
    store db[i0] = v6
  outputs dw, db
"""
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
Tensors = dict[str, torch.Tensor]


def made(dtype: str, columns: int, rows: int) -> tuple[str, Program, Tensors]:
    """(text before, program after the pass, inputs)."""
    text = TEXT.format(dtype=dtype, columns=columns).lstrip("\n")
    program, (report,) = run_pipeline(parse_program(text), parse_pipeline("split_reduction"), find_target("cpu"))
    assert report.rewrites == 1 and [s.name for s in program.steps] == ["sums_partial", "sums"]
    generator = torch.Generator().manual_seed(rows)
    return text, program, {n: torch.randn(rows, columns, generator=generator).to(DTYPES[dtype]) for n in ("x", "dy")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (255, 40), (256, 40), (1000, 77)])
def test_every_level_gives_the_same_bits_and_they_are_the_whole_sum_s(dtype: str, rows: int, columns: int) -> None:
    text, program, inputs = made(dtype, columns, rows)
    symbols, have = {"s0": rows}, dict(inputs)
    for step in program.steps:  # `run` compares the levels
        assert isinstance(step, Kernel)
        have |= run(print_program(program.with_(steps=(step,), outputs=step.writes)), {n: have[n] for n in step.reads}, symbols)
    eager, truth = reference(text, inputs, symbols), reference(text, inputs, symbols, dtype_override="f64")
    whole = run(text, inputs, symbols)
    for name in ("dw", "db"):
        assert_close(name, have[name], eager[name], truth[name])
        assert torch.equal(have[name], whole[name]), "the generator joins blocks of as many rows too"


@pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_emulated_gpu(dtype: str) -> None:
    text, program, inputs = made(dtype, 40, 600)
    kernels = [(step, isolate(program, step)) for step in program.steps if isinstance(step, Kernel)]
    built = build_maca([(digest(one.program), one.program) for _, one in kernels], METAX)
    have = dict(inputs)
    for (step, one), kernel in zip(kernels, built, strict=True):
        for name in step.writes:
            shape = [n.evaluate({"s0": 600}) for n in program.buffer(name).shape]
            have[name] = torch.full(shape, float("nan"), dtype=DTYPES[program.buffer(name).dtype])
        # fibers in several orders, all of which must leave the same bits
        execute_built(kernel, "generic", [have[n] for n in one.buffers], [600] * len(one.symbols))
    eager, truth = reference(text, inputs, {"s0": 600}), reference(text, inputs, {"s0": 600}, dtype_override="f64")
    for name in ("dw", "db"):
        assert_close(name, have[name], eager[name], truth[name])


def test_the_pipeline_splits_for_every_target() -> None:
    for name in ("cpu", "metax", "cuda:sm80"):
        target = find_target(name)
        program, _ = run_pipeline(parse_program(TEXT.format(dtype="f32", columns=64).lstrip("\n")), pipeline(target), target)
        assert len(list(isolate_all(program))) == 2
