"""The accuracy that flagtree/codegen/cpp_math.py states for each function, measured against float64."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.codegen.cpp_math import ULP
from flagtree.codegen.cpp_ops import CALLS
from flagtree.ir.ops import OPS
from tests.codegen.cpp_runner import run
from tests.codegen.test_cpp_ops import elementwise


def sample(step: int) -> torch.Tensor:
    """Every `step`-th f32 bit pattern, and dense stretches where functions bend."""
    patterns = torch.arange(0, 2**32, step, dtype=torch.int64).to(torch.int32).view(torch.float32)
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(40000, generator=g), *(torch.linspace(a, b, 40009) for a, b in ((-110, 110), (-2, 2), (0.4, 2.1)))]
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, 88.72283, 88.72284, -103.97,
                          -103.98, -87.34, 1.0, -1.0])  # fmt: skip
    return torch.cat([patterns, *dense, edges])


def error(x: torch.Tensor, got: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Largest error in last places and its argument; inf and NaN demanded where f32 has them."""
    rounded = truth.float()
    finite = rounded.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7.0), rounded[~finite].nan_to_num(7.0))
    size = rounded[finite].abs()
    place = (torch.nextafter(size, torch.tensor(math.inf)) - size).double()
    place = torch.where(place.isfinite(), place, torch.tensor(2.0**104, dtype=torch.float64))
    off = ((got[finite].double() - truth[finite]) / place).abs()
    assert bool(off.isfinite().all())
    if not len(off):
        return 0.0, 0.0  # a piece where the truth has no finite value
    worst = int(off.argmax())
    return float(off[worst]), float(x[finite][worst])


def test_every_approximate_function_has_a_bound() -> None:
    inexact = {op.name for op in OPS.values() if not op.exact}
    assert inexact == set(ULP)
    assert inexact <= set(CALLS)


@pytest.mark.parametrize("name", [n for n in ULP if OPS[n].arity == 1])
def test_bound(name: str) -> None:
    x = sample(65537 if ULP[name] < 0.52 else 16411)
    got = run(elementwise(name, "f32", 1, "f32"), {"a": x}, {"n0": len(x)})["y"]
    worst, where = error(x, got, getattr(torch, name)(x.double()))
    assert worst <= ULP[name], f"{worst} at {where!r}"


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in ULP if OPS[n].arity == 1])
def test_bound_densely(name: str) -> None:
    for part in range(4):
        x = sample(257 + 2 * part)
        for piece in x.split(100000):
            got = run(elementwise(name, "f32", 1, "f32"), {"a": piece}, {"n0": len(piece)})["y"]
            assert error(piece, got, getattr(torch, name)(piece.double()))[0] <= ULP[name]


@pytest.mark.parametrize("name", ["pow", "atan2"])
def test_bound_of_two_arguments(name: str) -> None:
    x = sample(1048583)[:60000]
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    got = run(elementwise(name, "f32", 2, "f32"), {"a": x, "b": y}, {"n0": len(x)})["y"]
    assert error(x, got, getattr(torch, name)(x.double(), y.double()))[0] <= ULP[name]
