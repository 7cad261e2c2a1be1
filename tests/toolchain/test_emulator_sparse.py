"""Memory of true size: addresses behind 4 and 64 GB are reached, and every page that changed is seen."""

from __future__ import annotations

import pytest
import torch

from flagtree.errors import ToolchainError
from flagtree.toolchain import emulator
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.emulator_memory import PAGE
from flagtree.toolchain.emulator_sparse import SparseMemory
from tests.toolchain.test_emulator import POINTER, source

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())
HUGE = 64 * 40960 * 12288  # elements: 129 GB of f32
# y[n + lane] = x[n + lane]
WIDE = """  %w = zext i32 %t to i64
  %i = add i64 %w, %n
  %p = getelementptr float, ptr addrspace(1) %0, i64 %i
  %v = load float, ptr addrspace(1) %p, align 4
  %q = getelementptr float, ptr addrspace(1) %1, i64 %i
  store float %v, ptr addrspace(1) %q, align 4
"""
NARROW = WIDE.replace("%i = add i64 %w, %n", "%s = add i64 %w, %n\n  %c = trunc i64 %s to i32\n  %i = sext i32 %c to i64")


def built(body: str) -> BuiltKernel:
    launch = {"function": "k", "signature": [["b0", "*fp32"], ["b1", "*fp32"], ["n0", "i64"]], "grid": [1, 1, 1], "warps": 1, "shared": 0,
              "variants": {"generic": {"shared": 0}}}  # fmt: skip
    text = source(body, f"{POINTER} %0, {POINTER} %1, i64 %n")
    return BuiltKernel("d" * 64, "llir", "", {"generic.llir": text.encode()}, launch)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_last_elements_of_a_huge_tensor(shift: int) -> None:
    first = HUGE - 64
    with SparseMemory([(HUGE, torch.float32), (HUGE, torch.float32)], shift) as memory:
        x, y = memory.tensors
        assert y.data_ptr() % 16 == 4 * shift
        x[first:] = torch.arange(1.0, 65)
        before = memory.pages()
        emulator.execute_in(built(WIDE), "generic", memory, [first], [(0, 0, 0)])
        assert torch.equal(y[first:], torch.arange(1.0, 65))
        changed = memory.pages().keys() - before.keys()
        assert {memory.owner(place) for place in changed} == {1} and len(changed) == 1 + shift
        memory.restore(before)
        assert memory.pages() == before and not y[first:].any()


def test_an_index_of_32_bits_is_seen() -> None:
    with SparseMemory([(HUGE, torch.float32), (HUGE, torch.float32)]) as memory:
        for first in (2**31 + 64, 2**32 - 128):  # both wrap to a negative offset
            with pytest.raises(ToolchainError, match="bytes before argument 0"):
                emulator.execute_in(built(NARROW), "generic", memory, [first], [(0, 0, 0)])
        first = HUGE - 64  # wraps to a place inside
        memory.tensors[0][first:] = 1.0
        emulator.execute_in(built(NARROW), "generic", memory, [first], [(0, 0, 0)])
        assert not memory.tensors[1][first:].any()


def test_pages_that_hold_only_zeros_are_none() -> None:
    with SparseMemory([(10 * PAGE, torch.uint8), (3, torch.int64), (0, torch.float32)]) as memory:
        bytes_, words, none = memory.tensors
        assert none.numel() == 0
        bytes_[PAGE : 2 * PAGE] = 0  # touched
        words[2] = -1
        assert memory.pages().keys() == {10 * PAGE}
        assert [memory.owner(p) for p in (0, 9 * PAGE, 10 * PAGE)] == [0, 0, 1]


def test_more_than_the_address_space() -> None:
    with pytest.raises(ToolchainError, match="no address space"):
        SparseMemory([(1 << 60, torch.float64)])
