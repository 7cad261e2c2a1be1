"""Triton for products (`ir/experts.py`): tiles of one expert's rows, or of all rows, by columns, through `tl.dot`.

Invariant: a tile holds rows of one expert; which one follows from the starts alone, so no table of tiles is made or read.
`triton.py` calls this for a kernel that `known` knows; the work stands in templates/triton_experts.py.j2 and triton_scaled.py.j2.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flagtree.codegen.triton_ops import TYPES, Speller, bare
from flagtree.errors import CodegenError
from flagtree.ir.bounds import Bounds
from flagtree.ir.experts import BLOCK, COLUMN, ROW, Known
from flagtree.ir.index import ONE, Index, floordiv
from flagtree.ir.program import Compute, Kernel, Program, Store, defined


def context(program: Program, kernel: Kernel, found: Known, need: Callable[[str], None]) -> dict[str, Any]:
    """What the template of a product needs.  CodegenError for a kernel without the tiles of its axes."""
    tiles = dict(kernel.schedule.tiles) if kernel.schedule is not None else {}
    if not {ROW, COLUMN, kernel.axes[-1].name} <= tiles.keys():
        raise CodegenError("the product has no tiles", hint="the pass that makes it gives it them")
    product = found.product
    dtypes = {n: op.dtypes[k] if hasattr(op, "dtypes") else op.dtype for op in kernel.body for k, n in enumerate(defined(op))}  # type: ignore[union-attr]
    speller = Speller(dtypes, need)
    after = [f"{op.name} = {bare(speller.compute(op))}" for op in found.after if isinstance(op, Compute) and op.op != "mod"]
    store = found.after[-1]
    assert isinstance(store, Store)
    experts = 1 if product.dense else kernel.axes[2].extent.constant
    depth = program.buffer(found.names.w).shape[-1].constant
    assert experts is not None and depth is not None
    return {
        "b": found.names, "out": store.access.buffer, "value": store.value, "type": TYPES[program.buffer(store.access.buffer).dtype],
        "up": product.up, "top_k": product.top_k, "parts": range(product.parts), "sums": found.sums, "inner": product.inner,
        "wide": product.inner * product.parts, "experts": experts, "depth": depth, "lanes": 1 << (experts - 1).bit_length(),
        "rows": tiles[ROW], "columns": tiles[COLUMN], "step": tiles[kernel.axes[-1].name], "after": after,
        "quantised": TYPES[product.dtype] if product.quantised else "", "block": BLOCK,
        "precision": ', input_precision="ieee"' if product.dtype == "f32" else "",
    }  # fmt: skip


def scaled(kernel: Kernel, found: Known, native: bool) -> dict[str, Any]:
    """What the template of a scaled product needs beside `context`.  `native`: the target multiplies e4m3fn; elsewhere its bytes become
    bf16, which has every one of its values."""
    product, integer = found.product, found.product.scaled == "i8"
    operand = "%s" if integer else "%s.to(tl.float8e4nv, bitcast=True)" if native else "f8e4m3fn_value(%s).to(tl.bfloat16)"
    return {
        "dense": product.dense, "extent": str(kernel.axes[0].extent), "blocks": kernel.axes[-2].extent.constant, "shared": product.shared,
        "integer": integer, "operand": operand, "total": found.sums[0],
    }  # fmt: skip


def grid(program: Program, kernel: Kernel, found: Known) -> tuple[Index, Index, Index]:
    """Instances: tiles of rows times tiles of columns.  Each expert ends in at most one tile that is not full, and no tile is empty."""
    assert kernel.schedule is not None
    tiles = dict(kernel.schedule.tiles)
    rows = kernel.axes[0].extent
    across = -(-(kernel.axes[1].extent.constant or 1) // tiles[COLUMN])
    if found.product.dense:
        return floordiv(rows + (tiles[ROW] - 1), Index.of(tiles[ROW])) * across, ONE, ONE
    experts = kernel.axes[2].extent
    full = floordiv(rows, Index.of(tiles[ROW])) + experts
    bounds = Bounds({s.name: (s.lo, s.hi) for s in program.symbols}, {})
    high = rows if bounds.nonnegative(full - rows) else full
    return high * across, ONE, ONE


class Tiles:
    """Which points of the domain each instance computes, for `starts` of the experts (dense: 0 and the number of rows): what the template
    finds for itself.

    `grid`: its three sizes; `busy`: the instances that have rows come first, and are so many.
    """

    def __init__(self, program: Program, kernel: Kernel, found: Known, symbols: Mapping[str, int], starts: Sequence[int]) -> None:
        assert kernel.schedule is not None and kernel.axes[1].extent.constant is not None
        tiles = dict(kernel.schedule.tiles)
        self.rows, self.columns, self.inner = tiles[ROW], tiles[COLUMN], kernel.axes[1].extent.constant
        self.across = -(-self.inner // self.columns)
        self.starts = list(starts)
        self.ends = [0, *itertools.accumulate(-(-(b - a) // self.rows) for a, b in itertools.pairwise(starts))]  # tiles before each expert
        x, y, z = (n.evaluate(symbols) for n in grid(program, kernel, found))
        self.grid = (x, y, z)
        self.busy = (self.ends[-1] * self.across, 1, 1)

    def points(self, block: Sequence[int]) -> list[dict[str, int]]:
        """The points of instance (x, 0, 0), none where it has no rows: coordinates by parallel axis."""
        tile, column = divmod(block[0], self.across)
        if tile >= self.ends[-1]:
            return []
        expert = bisect.bisect_right(self.ends, tile) - 1
        first = self.starts[expert] + (tile - self.ends[expert]) * self.rows
        rows = range(first, min(first + self.rows, self.starts[expert + 1]))
        columns = range(column * self.columns, min((column + 1) * self.columns, self.inner))
        return [{ROW: row, COLUMN: place} for row in rows for place in columns]
