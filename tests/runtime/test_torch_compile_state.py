"""What a stored graph depends on besides its text: sizes that Dynamo has specialised, the state of torch, our settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flagtree.runtime.compile import backend
from flagtree.settings import settings


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=True)


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (lambda x: x[: x.shape[0] // 2] * 2, (3, 4, 8, 9)),
        (lambda x: x[: x.shape[0] % 3 + 1] * 2, (8, 2, 5, 7)),
        (lambda x: x[: max(x.shape[0] - 5, 1)] + 1, (3, 9, 6)),
    ],
)
@torch.no_grad()
def test_one_graph_specialised_to_different_sizes(function: Callable[..., Any], rows: tuple[int, ...]) -> None:
    """Dynamo guards some sizes before it calls us; a launch list for one such set must not serve another."""
    kept = compiled(function)
    for n in rows:
        x = torch.randn(n, 6)
        for call in (kept, compiled(function)):  # in one process, and as a later one finds the store
            have, want = call(x), function(x)
            assert have.shape == want.shape
            assert torch.equal(have, want)


@torch.no_grad()
def test_broadcast_against_a_size_that_was_one() -> None:
    for a, b in (((8, 4), (4, 1)), ((2, 1), (1, 5)), ((6, 4), (3, 4))):
        x, y = torch.randn(a), torch.randn(b)
        function = lambda x, y: x[: x.shape[0] // 2] + y
        assert torch.equal(compiled(function)(x, y), function(x, y))


@torch.no_grad()
def test_autocast_and_default_dtype_are_part_of_the_key() -> None:
    weight, x = torch.randn(4, 4), torch.randn(3, 4)

    def line(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight) + 1

    assert compiled(line)(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(line)(x).dtype == line(x).dtype == torch.bfloat16

    def numbers() -> torch.Tensor:
        return torch.ones(4) * 2 + torch.arange(4) / 3

    assert compiled(numbers)().dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert compiled(numbers)().dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_fuel_is_part_of_the_key_and_is_used(capfd: pytest.CaptureFixture[str]) -> None:
    function = lambda x: (x + 1).exp().sum(-1)
    x = torch.randn(3, 5)
    counts = []
    for fuel in (None, 0):
        with settings.override(fuel=fuel, debug=1):
            assert torch.allclose(compiled(function)(x), function(x))
        text = capfd.readouterr().err
        counts.append(int(next(line.split(" kernels")[0].rsplit(" ", 1)[1] for line in text.splitlines() if " kernels, " in line)))
    assert counts == [1, 3]


@torch.no_grad()
def test_the_ladder_says_where_a_graph_comes_from(capfd: pytest.CaptureFixture[str]) -> None:
    function = lambda x: (x * 3).tanh()
    with settings.override(debug=2):
        compiled(function)(torch.randn(4, 7))
        assert "fuse_pointwise: " in capfd.readouterr().err
        compiled(function)(torch.randn(4, 7))
        assert "from the store" in capfd.readouterr().err


@torch.no_grad()
def test_numbers_that_do_not_fit_the_type() -> None:
    x = torch.tensor([0, 1, 44, 255], dtype=torch.uint8)
    function = lambda x: (x * -1, x > -1, x + 300, x == 300, x.clamp(0, 3), x.masked_fill(x > 3, 7))
    for have, want in zip(compiled(function)(x), function(x)):
        assert have.dtype == want.dtype
        assert torch.equal(have, want)


@torch.no_grad()
def test_constants_alone_and_patches() -> None:
    assert torch.equal(compiled(lambda: torch.tensor(1.5) * torch.tensor([1, 2]))(), torch.tensor([1.5, 3.0]))
    patches = lambda x, c: torch.cat([c, x.flatten(1)], 1) * 2
    x, c = torch.randn(2, 4, 4), torch.randn(2, 1)
    assert torch.equal(compiled(patches)(x, c), patches(x, c))
