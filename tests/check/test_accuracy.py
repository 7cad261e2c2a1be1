"""Distances in units in the last place, against definitions that are computed another way."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.check.accuracy import accuracy, share_within, ulp_of, unequal_places

KINDS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_ulp_is_the_distance_to_the_next_number(name: str) -> None:
    x = torch.cat([torch.randn(200, dtype=torch.float64) * s for s in (1, 1e-30, 1e30)]).abs().to(KINDS[name])
    following = torch.nextafter(x, torch.full_like(x, math.inf))
    assert torch.equal(ulp_of(x.double(), name), following.double() - x.double())


@pytest.mark.parametrize(("name", "mantissa", "lowest"), [("bf16", 7, -133), ("f16", 10, -24), ("f32", 23, -149)])
def test_ulp_of_one_and_of_zero(name: str, mantissa: int, lowest: int) -> None:
    one, smallest = 2.0**-mantissa, 2.0**lowest
    assert ulp_of(torch.tensor([1.0, -1.5, 2.0, 0.0], dtype=torch.float64), name).tolist() == [one, one, 2 * one, smallest]


@pytest.mark.parametrize("name", KINDS)
def test_correct_rounding_is_at_most_half_an_ulp(name: str) -> None:
    truth = torch.randn(5000, dtype=torch.float64)
    found = accuracy(truth.to(KINDS[name]), truth, name)
    assert found.max_ulp <= 0.5001  # PyTorch rounds a double to f16 through f32
    assert found.mean_ulp == pytest.approx(0.25, abs=0.02) or name == "f64"
    assert found.rms == pytest.approx(float((truth.to(KINDS[name]).double() - truth).pow(2).mean().sqrt()))


def test_only_finite_elements_count() -> None:
    truth = torch.tensor([1.0, math.inf, math.nan, 4.0], dtype=torch.float64)
    found = accuracy(torch.tensor([1.5, math.inf, 3.0, math.nan]), truth, "f32")
    assert (found.rms, found.magnitude) == (0.5, 1.0)
    assert accuracy(torch.empty(0), torch.empty(0, dtype=torch.float64), "f32").max_ulp == 0


def test_places_of_nan_and_infinity() -> None:
    a = torch.tensor([1.0, math.nan, math.inf, -math.inf, math.inf])
    assert unequal_places(a, a) == 0
    assert unequal_places(a, torch.tensor([math.nan, 1.0, -math.inf, 5.0, math.inf])) == 4


def test_shares() -> None:
    a = torch.tensor([0.0, math.nan, 1.0, 2.0])
    b = torch.tensor([-0.0, math.nan, 1.0, 2.0 + 2**-22])
    assert share_within(a, b, 0, "f32") == 0.75
    assert share_within(a, b, 1, "f32") == 1.0
