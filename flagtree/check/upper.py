"""A GPU kernel at the upper end of its symbols' ranges: first, last and random blocks of the true grid, at true sizes and addresses.

Only what those blocks read is filled and only what they must store is computed; everything else of the tensors is untouched memory, and
a write into it is found.  Called by the certificate (check/certify.py) for kernels that the emulator executes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from flagtree.check.execute import fits
from flagtree.check.points import kernel_of
from flagtree.check.positions import Positions
from flagtree.check.sparse import Expected, Sampled, Strays, elements, same_bits
from flagtree.check.stated import Stated, stated_gpu
from flagtree.check.upper_attention import AttentionExpected, expected_at
from flagtree.check.upper_eager import Eager
from flagtree.codegen.triton_experts import Tiles
from flagtree.codegen.triton_points import AttentionInstances, Instances
from flagtree.codegen.triton_points import instances as instances_of
from flagtree.ir import experts
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Program
from flagtree.toolchain import emulator
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.emulator_sparse import Pages, SparseMemory

Tensor = torch.Tensor
BLOCKS = 5


def run_blocks(
    program: Program, built: BuiltKernel, symbols: Mapping[str, int], seed: int, count: int = BLOCKS,
    orders: Sequence[str] = emulator.ORDERS, seconds: float = 120, stated: Stated | None = None, eager: Eager | None = None,
    kind: str = "ordinary",
) -> Sampled:  # fmt: skip
    """Execute `count` blocks of the isolated kernel `program`, built by `toolchain.maca`, in each variant and each of `orders`, on floats
    of a `kind`; `eager` computes some of their rows.

    Raises Strays when a block writes what is not its to write or bits differ; ToolchainError as `emulator.execute_in` does; IRError for
    a kernel whose stores accumulate.
    """
    values = list(symbols.values())
    stated = stated or stated_gpu(kernel_of(program), int(built.launch["threads"]))  # type: ignore[call-overload]
    instances = _instances(program, symbols, seed)
    grid = tuple(emulator.grid_of(built, values))
    if grid != instances.grid:
        raise Strays("the launch record has another grid than the schedule", why=f"{grid} instead of {instances.grid}")
    blocks = emulator.sample_blocks(instances.busy, count, seed)[-count:]
    points = [point for block in blocks for point in instances.points(block)]
    columns = {name: torch.tensor([p[name] for p in points]) for name in points[0]}
    variants = [v for v in ("aligned", "generic") if f"{v}.llir" in built.files and fits(built, v, symbols)]
    first: Sampled | None = None
    bits: dict[str, Tensor] = {}
    expected: Expected | AttentionExpected | None = None
    for variant in variants:
        spans = [(elements(b, symbols), torch_dtype(b.dtype)) for b in program.buffers]
        with SparseMemory(spans, shift=0 if variant == "aligned" else 1) as memory:
            flat = {b.name: memory.tensors[i] for i, b in enumerate(program.buffers)}
            expected = expected_at(expected, program, symbols, flat, columns, seed, stated, eager, kind)
            run = partial(emulator.execute_in, built, variant, memory, values, blocks, seconds=seconds)
            ours = _in_all_orders(memory, expected, run, orders, variant)
            found = expected.sampled(ours, f"blocks {_listed(blocks)} of {grid}", tuple(variants))
        if bits and (name := same_bits(bits, ours)):
            raise Strays(f"{' and '.join(variants)} give different bits", why=f"in buffer {name}")
        first, bits = first or found, bits or ours
    assert first is not None
    return first


def _instances(program: Program, symbols: Mapping[str, int], seed: int) -> Instances | AttentionInstances | Tiles:
    """The points of each block; for products of experts they follow from where the rows of each expert end."""
    kernel = kernel_of(program)
    if (known := experts.known(program, kernel)) is None:
        return instances_of(program, symbols)
    if known.product.dense:
        return Tiles(program, kernel, known, symbols, [0, kernel.axes[0].extent.evaluate(symbols)])
    starts = Positions(program, symbols, seed).whole(known.names.starts)
    return Tiles(program, kernel, known, symbols, starts.tolist())


def _in_all_orders(
    memory: SparseMemory, expected: Expected | AttentionExpected, run: Callable[[str], object], orders: Sequence[str], variant: str
) -> dict[str, Tensor]:
    """What `run` of one variant stores, the same in each order; the memory is as it was afterwards."""
    start = memory.pages()
    orders = orders[:1] if isinstance(expected, AttentionExpected) else orders  # a long row takes seconds; small calls run in all orders
    first: dict[str, Tensor] = {}
    for order in orders:
        run(order)
        ours = expected.stored()
        expected.put_back()
        _nothing_else(memory, start)
        if first and (name := same_bits(first, ours)):
            raise Strays(f"{variant} gives other bits in another order of threads", why=f"{orders[0]} and {order}, buffer {name}")
        first = first or ours
    return first


def _nothing_else(memory: SparseMemory, start: Pages) -> None:
    """With the elements that the blocks store put back, the whole memory must be what it was."""
    now = memory.pages()
    changed = sorted(place for place in now.keys() | start.keys() if now.get(place) != start.get(place))
    if changed:
        owner = memory.owner(changed[0])
        region = memory.regions[owner]
        memory.restore(start)
        raise Strays(
            "a block wrote what is not its to write", where=f"buffer b{owner}, near byte {changed[0] - region.offset} of {region.length}",
            why=f"{len(changed)} pages changed that no executed block stores into",
        )  # fmt: skip


def _listed(blocks: Sequence[tuple[int, int, int]]) -> str:
    """Blocks as a reader wants them: a number where the grid has one dimension."""
    flat = not any(y or z for _, y, z in blocks)
    return ", ".join(str(x) if flat else f"({x}, {y}, {z})" for x, y, z in blocks)
