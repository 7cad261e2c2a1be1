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
    block = BLOCK if product.quantised else 1
    blocks, block_of = torch.unique(points[COLUMN] // block, return_inverse=True)
    columns = (blocks[:, None] * block + torch.arange(block)).flatten()
    small = _small(known, tensors, rows, columns, blocks)
    sizes = {"tokens": len(rows), "experts": len(small[names.starts]) - 1, "columns": len(columns)}
    try:
        theirs = eager(small, sizes)[out]
    except NoEager as error:
        return Beside(why=error.why)
    column_of = block_of * block + points[COLUMN] % block
    values = theirs[row_of, column_of] if product.up else theirs[row_of, 0, column_of]
    return Beside({out: torch.arange(len(values))}, {out: values})


def _small(known: Known, tensors: Mapping[str, Tensor], rows: Tensor, columns: Tensor, blocks: Tensor) -> dict[str, Tensor]:
    """The operands of a product of one token a row.  Its other choices, which nobody looks at, are the last expert's."""
    product, names = known.product, known.names
    count, top_k = len(rows), product.top_k
    ends = tensors[names.starts][1:].long()
    used, own = torch.unique(torch.searchsorted(ends, rows, right=True), return_inverse=True)
    starts = torch.cat([torch.zeros(1), torch.bincount(own, minlength=len(used)).cumsum(0)]).to(torch.int32)
    starts[-1] = count * top_k
    looked_at = torch.arange(count) * top_k
    others = torch.arange(count * top_k)[torch.arange(count * top_k) % top_k != 0]
    found = {names.starts: starts, names.order: torch.cat([looked_at, others]).to(torch.int32)}
    if product.up:
        found[names.x] = tensors[names.x][torch.div(tensors[names.order][rows], top_k, rounding_mode="floor").long()]
    else:
        x = tensors[names.x]
        found[names.x] = torch.cat([x[rows], x.new_zeros(len(others), x.shape[1])])
    parts = torch.cat([columns + part * product.inner for part in range(product.parts)])
    found[names.w] = torch.stack([_rows(tensors[names.w][e], parts) for e in used.tolist()])
    if product.quantised:
        parts = torch.cat([blocks + part * (product.inner // BLOCK) for part in range(product.parts)])
        found[names.scales] = torch.stack([tensors[names.scales][e][parts] for e in used.tolist()])
    return found


def _rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """Chosen rows; of bytes where the type has no indexing of its own."""
    return matrix.view(torch.uint8)[rows].view(matrix.dtype) if matrix.dtype.itemsize == 1 else matrix[rows]
