"""Eager beside chosen tiles of a product of experts: their rows, experts and columns moved together into a small product of the same kind.

Invariant: a row's result depends on the row and its expert alone, so what PyTorch gives for the few is what it gives among all.
Called by check/sparse.py for tensors of true sizes, of which only what the tiles read exists.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flagtree.check.recipe import NoEager
from flagtree.check.upper_eager import Beside, Eager
from flagtree.ir.experts import BLOCK, COLUMN, ROW, Known
from flagtree.ir.program import Program

Tensor = torch.Tensor


def eager_tiles(program: Program, known: Known, tensors: Mapping[str, Tensor], points: Mapping[str, Tensor], eager: Eager) -> Beside:
    """PyTorch's values of all of `points`; `tensors` are of the true sizes and hold what the points read."""
    product, names = known.product, known.names
    out = program.buffers[-1].name
    rows, row_of = torch.unique(points[ROW], return_inverse=True)
    block = BLOCK if product.quantised else max(1, product.shared)
    blocks, block_of = torch.unique(points[COLUMN] // block, return_inverse=True)
    columns = (blocks[:, None] * block + torch.arange(block)).flatten()
    columns = columns[columns < product.inner]
    small = _small(known, tensors, rows, columns, blocks)
    sizes = {"tokens": len(rows), "experts": 1 if product.dense else len(small[names.starts]) - 1, "columns": len(columns)}
    try:
        theirs = eager(small, sizes)[out]
    except NoEager as error:
        return Beside(why=error.why)
    column_of = block_of * block + points[COLUMN] % block
    values = theirs[row_of, column_of] if product.up or product.dense else theirs[row_of, 0, column_of]
    return Beside({out: torch.arange(len(values))}, {out: values})


def _small(known: Known, tensors: Mapping[str, Tensor], rows: Tensor, columns: Tensor, blocks: Tensor) -> dict[str, Tensor]:
    """The operands of a product of one token a row.  Its other choices, which nobody looks at, are the last expert's."""
    product, names = known.product, known.names
    parts = torch.cat([columns + part * product.inner for part in range(product.parts)])
    scales = parts if product.shared == 1 else torch.cat([blocks + part * (product.inner // BLOCK) for part in range(product.parts)])
    if product.dense:
        chosen = ((names.x, rows), (names.x_scales, rows), (names.w, parts), (names.scales, scales))
        return {name: _rows(tensors[name], at) for name, at in chosen}
    count, top_k = len(rows), product.top_k
    used, own = torch.unique(torch.searchsorted(tensors[names.starts][1:].long(), rows, right=True), return_inverse=True)
    starts = torch.cat([torch.zeros(1), torch.bincount(own, minlength=len(used)).cumsum(0)]).to(torch.int32)
    starts[-1] = count * top_k
    others = torch.arange(count * top_k)[torch.arange(count * top_k) % top_k != 0]
    order = torch.cat([torch.arange(count) * top_k, others]).to(torch.int32)
    found = {names.starts: starts, names.order: order}
    if product.up:
        rows = torch.div(tensors[names.order][rows], top_k, rounding_mode="floor").long()
    for name in (n for n in (names.x, names.x_scales) if n):
        taken = _rows(tensors[name], rows)
        found[name] = taken if product.up else torch.cat([taken, taken.new_zeros(len(others), taken.shape[1])])
    for name, at in ((names.w, parts), (names.scales, scales)):
        if name:
            found[name] = torch.stack([_rows(tensors[name][e], at) for e in used.tolist()])
    return found


def _rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """Chosen rows; of bytes where the type has no indexing of its own."""
    return matrix.view(torch.uint8)[rows].view(matrix.dtype) if matrix.dtype.itemsize == 1 else matrix[rows]
