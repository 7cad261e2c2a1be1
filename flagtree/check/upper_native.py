"""CPU code at the upper end of a symbol's range: it computes every point, and chosen points of it are looked at.

Inputs are zeros but where the chosen points read, so they cost no memory; what the kernel stores does, and where that is too much the run
is left out with its size.  Called by check/examine.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import torch

from flagtree.check.execute import Differs, Executor
from flagtree.check.points import count, kernel_of, reduced, some_points
from flagtree.check.sparse import Expected, Sampled, elements, same_bits
from flagtree.check.stated import Stated
from flagtree.check.upper_attention import AttentionExpected, expected_at, products
from flagtree.check.upper_eager import Eager
from flagtree.errors import FlagtreeError
from flagtree.ir.attention import form_of
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Program
from flagtree.toolchain.base import BuiltKernel

Tensor = torch.Tensor
MOST_STORED = 520_000_000  # elements that a run may store: the gate of 40 960 tokens of Qwen3-8B stores 5.03e8
MOST_PRODUCTS = 2e10  # of an attention's elements: a second of one core, a minute at x86-64-v2, which has no fused multiply-add
WORK = 1 << 15  # points times reduced elements that are looked at
GUARD = 64  # elements before and after each buffer that must stay zero
_NO_RESERVE = 0x4000  # Linux, mman.h: MAP_NORESERVE


class TooLarge(FlagtreeError):
    """A run that this machine leaves out; `why` says what it would store."""


def run_native(
    program: Program, built: BuiltKernel, executor: Executor, symbols: Mapping[str, int], seed: int, stated: Stated,
    eager: Eager | None = None,
) -> Sampled:  # fmt: skip
    """Execute the whole kernel at each level that this CPU has; `eager` computes some rows.  Raises TooLarge before anything is
    allocated; Differs when levels give different bits or memory around a buffer changes."""
    kernel = kernel_of(program)
    points = count(kernel, symbols)
    inner, form = reduced(kernel, symbols), form_of(program)
    stored = points * (inner if form is None else 1) * len(kernel.stores)
    if stored > MOST_STORED:
        why = f"CPU code computes every row, and would store up to {stored:.3g} elements; at most {MOST_STORED:.3g} are computed"
        raise TooLarge("not run", why=why)
    if form is not None and (work := products(program, form, symbols)) > MOST_PRODUCTS:
        why = f"CPU code computes every row, which takes {work:.3g} products of two elements; at most {MOST_PRODUCTS:.3g} are computed"
        raise TooLarge("not run", why=why)
    chosen = some_points(kernel, symbols, max(16, WORK // inner), seed)
    levels = executor.levels(built)
    first: Sampled | None = None
    bits: dict[str, Tensor] = {}
    expected: Expected | AttentionExpected | None = None
    for level in levels:
        flat = {b.name: _zeros(elements(b, symbols), torch_dtype(b.dtype)) for b in program.buffers}
        inside = {name: memory[GUARD : len(memory) - GUARD] for name, memory in flat.items()}
        expected = expected_at(expected, program, symbols, inside, chosen, seed, stated, eager)
        executor.native(built.digest, level, list(inside.values()), list(symbols.values()))
        for name, memory in flat.items():
            if bool(memory[:GUARD].view(torch.uint8).any()) or bool(memory[len(memory) - GUARD :].view(torch.uint8).any()):
                raise Differs(f"{level} wrote outside of a buffer", why=f"next to {name}")
        looked = f"{len(next(iter(chosen.values()), ()))} of {points} points: first, last and random"
        ours = expected.stored()
        found = expected.sampled(ours, looked, tuple(levels))
        if bits and (name := same_bits(bits, ours)):
            raise Differs(f"{levels[0]} and {level} give different bits", why=f"in buffer {name}")
        first, bits = first or found, bits or ours
    assert first is not None
    return first


def _zeros(length: int, dtype: torch.dtype) -> Tensor:
    """Elements and GUARD more on both sides, zero, that take memory only where they are written."""
    size = (length + 2 * GUARD) * dtype.itemsize
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(length + 2 * GUARD, dtype=dtype)
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    return torch.frombuffer(mapped, dtype=dtype)
