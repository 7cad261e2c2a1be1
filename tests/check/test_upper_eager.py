"""Rows of the upper end given to PyTorch: its own values come back, another computation shows, and what cannot be compared says why."""

from __future__ import annotations

import re

import pytest
import torch

from flagtree.check.gate import judge
from flagtree.check.points import kernel_of, some_points
from flagtree.check.recipe import no_eager
from flagtree.check.upper_eager import Beside, Eager, eager_rows
from flagtree.ir.canonical import isolate
from flagtree.ir.program import Kernel, Program
from flagtree.ir.sample import stores_at
from flagtree.ir.text import parse_program
from tests.check.test_certify import COUNT, NORM, ROWS, norm, rows

POSITION = COUNT.replace("mul v0, 3", "add v0, r").replace("v1: i64 = add", "r: i64 = index i0\n    v1: i64 = add")
PRODUCT_SIZE = """program joined
  symbol s0 in 1..64 from dim x 0
  symbol s1 in 1..64 from dim x 1
  buffer x: f32[s0*s1, 8] input
  buffer y: f32[s0*s1, 8] temp
  kernel joined {i0 < s0*s1, i1 < 8} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1]
    v1: f32 = neg v0
    store y[i0, i1] = v1
  outputs y
"""


def alone(text: str) -> Program:
    program = parse_program(text)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return isolate(program, kernel).program


def compared(text: str, symbols: dict[str, int], eager: Eager, **given: torch.Tensor) -> tuple[Beside, list[str]]:
    """What came back, and what the gate says of the interpreter's values beside it."""
    program = alone(text)
    kernel = kernel_of(program)
    torch.manual_seed(3)
    tensors = {b.name: torch.randn([n.evaluate(symbols) for n in b.shape]).to(dtype_of(b.dtype)) for b in program.buffers} | given
    points = some_points(kernel, symbols, 600, 1)
    own, truth = (stores_at(program, kernel, tensors, symbols, points, precise) for precise in (False, True))
    found = eager_rows(program, kernel, tensors, symbols, points, own, eager)
    faults: list[str] = []
    for name, at in found.places.items():
        dtype = program.buffer(name).dtype
        ours = own[name].values[at]
        faults += judge(dtype, ours, ours, truth[name].values[at], found.values[name], None).faults
        assert len(at) and {0, len(own[name].values) - 1} <= set(at.tolist())  # the first and the last of what was looked at
    return found, faults


def dtype_of(name: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}[name]


def test_the_values_are_those_of_the_whole_tensors() -> None:
    x, w = torch.randn(9, 700, 64).bfloat16(), torch.randn(64).bfloat16()
    found, faults = compared(NORM, {"n0": 9, "n1": 700}, norm, b0=x, b1=w)
    assert not found.why and not faults
    program = alone(NORM)
    points = some_points(kernel_of(program), {"n0": 9, "n1": 700}, 600, 1)
    own = stores_at(program, kernel_of(program), {"b0": x, "b1": w, "b2": x}, {"n0": 9, "n1": 700}, points)
    whole = norm({"b0": x, "b1": w}, {})["b2"].flatten()
    assert torch.equal(found.values["b2"], whole[own["b2"].offsets[found.places["b2"]]])


def test_another_computation_shows() -> None:
    def other(tensors: dict[str, torch.Tensor], symbols: dict[str, int]) -> dict[str, torch.Tensor]:
        return {"b2": norm(tensors, symbols)["b2"] * 1.1}

    _, faults = compared(NORM, {"n0": 9, "n1": 700}, other)  # type: ignore[arg-type]
    assert any("its meaning is another" in fault for fault in faults)


def test_rows_that_indices_name() -> None:
    start = torch.tensor([5, 0, 30, 2])
    found, faults = compared(ROWS, {"n0": 4, "n1": 20, "n2": 64}, rows, b0=start)  # type: ignore[arg-type]
    assert not found.why and not faults


@pytest.mark.parametrize(
    ("text", "symbols", "why"),
    [
        (POSITION, {"n0": 2000}, "depends on where it stands"),
        (PRODUCT_SIZE, {"n0": 40, "n1": 50}, "no symbol of its own"),
        (ROWS, {"n0": 4, "n1": 3, "n2": 1 << 20}, "depends on where it stands"),
    ],
)
def test_what_cannot_be_compared_says_why(text: str, symbols: dict[str, int], why: str) -> None:
    start = {"b0": torch.tensor([5, 0, 30, 1 << 19])} if text == ROWS else {}
    found, _ = compared(text, symbols, lambda tensors, sizes: pytest.fail("nothing to compare"), **start)
    assert not found.places
    assert re.search(why, found.why), found.why


def test_a_recipe_that_refuses_says_why() -> None:
    def refuses(tensors: dict[str, torch.Tensor], symbols: dict[str, int]) -> dict[str, torch.Tensor]:
        raise no_eager("eager refuses")

    found, _ = compared(NORM, {"n0": 9, "n1": 700}, refuses)  # type: ignore[arg-type]
    assert found.why == "eager refuses"
