"""The points of all instances of a grid are the domain, each point once; the grid is the one that the source states."""

from __future__ import annotations

import collections
import itertools
from dataclasses import replace

import pytest

from flagtree.codegen.triton import generate
from flagtree.codegen.triton_points import Instances
from flagtree.errors import CodegenError
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.program import Kernel, Program, Schedule
from flagtree.ir.text import parse_program
from flagtree.passes.tiling import scheduled
from flagtree.targets import find_target
from flagtree.toolchain.emulator import evaluate_index
from tests.check.test_certify import COUNT, NORM, PAD, ROWS, TRANSPOSE

METAX = find_target("metax")
GATE = """program gate
  symbol s0 in 1..64 from dim x 0
  symbol s1 in 1..4096 from dim x 1
  buffer x: f32[s0, s1, 300] input
  buffer y: f32[s0, s1, 300] temp
  kernel gate {i0 < s0, i1 < s1, i2 < 300} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1, i2]
    v1: f32 = mul v0, v0
    store y[i0, i1, i2] = v1
  outputs y
"""


def alone(text: str) -> Program:
    program = parse_program(text)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return scheduled(isolate(program, kernel).program, METAX)


@pytest.mark.parametrize("text", [NORM, PAD, ROWS, COUNT, TRANSPOSE, GATE])
@pytest.mark.parametrize("size", [(2, 2, 2), (3, 5, 7), (5, 2, 9)])
def test_every_point_once(text: str, size: tuple[int, ...]) -> None:
    program = alone(text)
    symbols = {s.name: max(s.lo, n) for s, n in zip(program.symbols, size, strict=False)}
    instances = Instances(program, symbols)
    grid = generate(program, digest(program), METAX).grid
    assert instances.grid == tuple(evaluate_index(e, symbols) for e in grid)
    found = collections.Counter(
        tuple(sorted(p.items())) for block in itertools.product(*map(range, instances.grid)) for p in instances.points(block)
    )
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    parallel = [a for a in kernel.axes if a.kind != "reduce"]
    every = itertools.product(*(range(a.extent.evaluate(symbols)) for a in parallel))
    expected = [tuple(sorted(zip((a.name for a in parallel), p, strict=True))) for p in every]
    assert found == collections.Counter(expected)


def test_first_and_last_block_hold_the_corners() -> None:
    instances = Instances(alone(GATE), {"n0": 64, "n1": 4096})
    last = [size - 1 for size in instances.grid]
    assert instances.points((0, 0, 0))[0] == {"i0": 0, "i1": 0, "i2": 0}
    assert instances.points(last)[-1] == {"i0": 63, "i1": 4095, "i2": 299}


def test_a_kernel_without_a_schedule() -> None:
    program = alone(GATE)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel) and isinstance(kernel.schedule, Schedule)
    with pytest.raises(CodegenError, match="no schedule"):
        Instances(program.with_(steps=(replace(kernel, schedule=None),)), {"n0": 1, "n1": 1})
