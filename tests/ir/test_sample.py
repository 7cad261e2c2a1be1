"""A kernel at chosen points stores there what it stores when all points are computed."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from flagtree.check.inputs import make_operands
from flagtree.errors import IRError
from flagtree.ir.canonical import isolate
from flagtree.ir.program import Kernel, Program
from flagtree.ir.sample import stores_at
from flagtree.ir.text import parse_program
from flagtree.ir.walk import flat, run_kernel
from tests.check.test_certify import COUNT, NORM, PAD, ROWS, TRANSPOSE

SCATTER = """program scatter
  symbol s0 in 2..64 from dim x 0
  buffer x: f32[s0, 8] input
  buffer y: f32[8] state
  kernel scatter {i0 < s0, i1 < 8} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1]
    store.add y[i1] = v0
  outputs y
"""


def alone(text: str) -> tuple[Program, Kernel]:
    program = parse_program(text)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    isolated = isolate(program, kernel)
    return isolated.program, isolated.kernel


@pytest.mark.parametrize("text", [NORM, PAD, ROWS, COUNT, TRANSPOSE])
@pytest.mark.parametrize("precise", [False, True])
def test_the_same_values_as_all_points_together(text: str, precise: bool) -> None:
    program, kernel = alone(text)
    symbols = {s.name: 3 + 4 * k for k, s in enumerate(program.symbols)}
    tensors = {name: operand.tensor for name, operand in make_operands(program, symbols, 5).items()}
    whole = {n: (t.double() if precise and t.is_floating_point() else t).clone() for n, t in tensors.items()}
    run_kernel(program, kernel, whole, symbols, precise=precise)
    parallel = [a for a in kernel.axes if a.kind != "reduce"]
    every = list(itertools.product(*(range(a.extent.evaluate(symbols)) for a in parallel)))
    chosen = random.Random(1).sample(every, min(7, len(every)))
    points = {a.name: torch.tensor([p[k] for p in chosen]) for k, a in enumerate(parallel)}
    before = {n: t.clone() for n, t in tensors.items()}
    read: dict[str, int] = {}
    found = stores_at(program, kernel, tensors, symbols, points, precise, lambda name, at: read.update({name: at.numel()}))
    assert found.keys() == set(kernel.writes) and read.keys() == set(kernel.reads)
    for name, stored in found.items():
        assert stored.offsets.numel() == stored.values.numel() > 0
        assert torch.equal(flat(whole[name])[stored.offsets], stored.values)
    assert all(torch.equal(torch.nan_to_num(t), torch.nan_to_num(before[n])) for n, t in tensors.items())


def test_what_accumulates_has_no_value_at_some_points() -> None:
    program, kernel = alone(SCATTER)
    tensors = {name: operand.tensor for name, operand in make_operands(program, {"n0": 4}, 1).items()}
    with pytest.raises(IRError, match="accumulates"):
        stores_at(program, kernel, tensors, {"n0": 4}, {"i0": torch.tensor([0]), "i1": torch.tensor([3])})
