"""`index_select`: rows of a table as a kernel, equal to eager where eager does not raise."""

from __future__ import annotations

import pytest
import torch

from flagtree.runtime.compile import backend


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_eager(dim: int, kind: torch.dtype, dtype: torch.dtype) -> None:
    def rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return table.index_select(dim, index) * 2

    table = torch.randn(5, 7, 5).to(dtype).transpose(0, 1)
    index = torch.tensor([4, 0, 4, 1], dtype=kind)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(rows, backend=backend)(table, index), rows(table, index), rtol=0, atol=0)


def test_an_index_out_of_range_yields_no_other_row() -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda t, i: t.index_select(0, i), backend=backend)
        found = compiled(torch.ones(3, 2), torch.tensor([2, 3, -1]))
    assert found.isnan().tolist() == [[False, False], [True, True], [True, True]]


def test_integers_stay_with_aten_which_checks() -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda t, i: t.index_select(0, i), backend=backend)
        assert compiled(torch.arange(6).view(3, 2), torch.tensor([1])).tolist() == [[2, 3]]
        with pytest.raises((IndexError, RuntimeError)):
            compiled(torch.arange(6).view(3, 2), torch.tensor([3]))
