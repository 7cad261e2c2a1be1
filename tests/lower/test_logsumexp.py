"""`logsumexp` rounds where ATen's composition of calls rounds: in halves the bits are eager's."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.runtime.compile import backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [-1, (1, 2)])
def test_halves_have_the_bits_of_eager(dtype: torch.dtype, dims: int | tuple[int, ...]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.logsumexp(dims, keepdim=True)

    x = (torch.randn(2000, 2, 4, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    special = x.clone()
    special[0], special[1], special[2, 1, 3], special[3, 0, 1] = math.inf, -math.inf, math.nan, math.inf
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend)
    with torch.no_grad():
        for given in (x, special):
            torch.testing.assert_close(compiled(given), function(given), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(function(x), function(x.float()).to(dtype)), "one rounding at the end would have given the same"
