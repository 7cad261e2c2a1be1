"""The runtime's table of element types is the IR's."""

from __future__ import annotations

import torch

from flagtree.ir.dtypes import DTYPES as IR
from flagtree.ir.dtypes import TORCH_NAMES
from flagtree.runtime.dtypes import DTYPES


def test_the_tables_agree() -> None:
    assert {n: getattr(torch, t) for n, t in TORCH_NAMES.items()} == DTYPES
    assert {n: d.bytes for n, d in IR.items()} == {n: t.itemsize for n, t in DTYPES.items()}
