"""Random programs through every pass: whatever a pass makes of a legal program is legal and computes the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from flagtree.errors import IRError
from flagtree.ir.index import Index, parse_index
from flagtree.ir.interp import run
from flagtree.ir.program import Program
from flagtree.ir.text import print_program
from flagtree.passes.base import Fuel
from flagtree.passes.pipeline import parse_pipeline, pipeline, run_pipeline
from flagtree.targets import find_target
from tests.passes.pass_file import make_inputs
from tests.passes.random_steps import random_pipeline_program

# the order of the pipeline, and orders that nobody chose: each pass is right by itself
ORDERS = (
    "",
    "fuse_reduction, fuse_pointwise",
    "reinplace, fuse_pointwise, fuse_pointwise",
    "fuse_reduction, canonicalize, reinplace, fuse_reduction",
)


def examine(seed: int) -> bool:
    """Did anything run?  Sizes at which the program as written cannot run (a maximum over nothing) say nothing about a pass."""
    program = random_pipeline_program(seed)
    target, rng = find_target("cpu"), random.Random(seed)
    order = ORDERS[0] if seed % 2 else rng.choice(ORDERS)
    fuel = Fuel(rng.randint(0, 4) if rng.random() < 0.2 else None)
    after, _ = run_pipeline(program, parse_pipeline(order) if order else pipeline(target), target, fuel=fuel)
    done = False
    for sample in range(2):
        sizes = {s.name: rng.randint(s.lo, s.hi) if sample else s.lo for s in program.symbols}
        inputs = make_inputs(program, sizes, _row_numbers(program, sizes), seed)
        try:
            want, exact = _run(program, inputs, None), _run(program, inputs, "f64")
        except (IRError, RuntimeError, IndexError):
            continue
        done = True
        for override, truth in ((None, want), ("f64", exact)):
            _same(
                truth, _run(after, inputs, override), override, f"seed {seed} at {sizes}\n{print_program(program)}\n{print_program(after)}"
            )
    return done


def _row_numbers(program: Program, sizes: dict[str, int]) -> dict[str, tuple[Index, Index]]:
    rows = program.buffer("g").shape[0].evaluate(sizes)
    return {"g": (parse_index("0"), Index.of(max(rows - 1, 0)))}


def _run(program: Program, inputs: dict[str, Any], override: str | None) -> dict[str, torch.Tensor]:
    """Outputs and states; one that is copied onto itself is no longer written."""
    own = {n: t.clone() for n, t in inputs.items()}
    result = run(program, own, dtype_override=override)
    return {n: t.double() if override and t.is_floating_point() else t for n, t in {**own, **result}.items()}


def _same(want: dict[str, torch.Tensor], have: dict[str, torch.Tensor], override: str | None, what: str) -> None:
    """In float64 nothing but the order of a sum differs; in the program's own types that may move a rounding to bf16."""
    missing = want.keys() - have.keys()
    assert not missing and not have.keys() - want.keys(), f"{missing} {what}"
    for name, tensor in want.items():
        tolerance = 1e-9 if override else 2e-2
        assert tensor.dtype == have[name].dtype and tensor.shape == have[name].shape, f"{name} {what}"
        close = torch.allclose(tensor, have[name], rtol=tolerance, atol=tolerance, equal_nan=True)
        assert close, f"{name}: {have[name]} instead of {tensor}\n{what}"


@pytest.mark.parametrize("first", range(0, 320, 40))
def test_random_programs_mean_the_same_after_every_pass(first: int) -> None:
    assert sum(examine(seed) for seed in range(first, first + 40)) > 30


@pytest.mark.full
@pytest.mark.parametrize("first", range(320, 8_000, 80))
def test_random_programs_of_the_campaign(first: int) -> None:
    assert sum(examine(seed) for seed in range(first, first + 80)) > 60
