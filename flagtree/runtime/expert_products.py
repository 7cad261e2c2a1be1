"""The matrix products of a mixture of experts over rows that are sorted by expert, as torch operators.

Invariant: a row's result depends on the row and its expert alone, not on what lies beside it in the sort.
Registered by `operators.py`; `lower/experts.py` calls them between its sort and its weighted sum.

    flagtree::experts_up(x, w, order, starts, top_k) -> y      x [T, K], w [E, J, K]: y [T * top_k, J], sorted by expert
        y[p] = x[order[p] // top_k] w[e]^T    where starts[e] <= p < starts[e + 1]
    flagtree::experts_down(x, w, order, starts, top_k) -> y    x [T * top_k, K] sorted by expert: y [T, top_k, J], back at its choice
        y.flatten(0, 1)[order[p]] = x[p] w[e]^T

order int32 [T * top_k]: the choices (token * top_k + place) by expert; starts int32 [E + 1]: where each expert's rows begin.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from flagtree.errors import BindError

_library = torch.library.Library("flagtree", "FRAGMENT")
_library.define("experts_up(Tensor x, Tensor w, Tensor order, Tensor starts, int top_k) -> Tensor")
_library.define("experts_down(Tensor x, Tensor w, Tensor order, Tensor starts, int top_k) -> Tensor")


def _ends(w: torch.Tensor, order: torch.Tensor, starts: torch.Tensor) -> list[int]:
    """The starts as integers; BindError where some choice is of no expert (its place in `order` holds anything)."""
    ends: list[int] = starts.tolist()
    if len(ends) != len(w) + 1 or ends[0] != 0 or ends[-1] != len(order):
        why = "an index is out of range"
        raise BindError(f"experts: of {len(order)} choices {ends[-1] - ends[0]} are of one of {len(w)} experts", why=why)
    return ends


def _each(x: torch.Tensor, w: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Rows sorted by expert times the weights of their experts."""
    y = x.new_empty(len(x), w.shape[1])
    for expert, (first, end) in enumerate(pairwise(ends)):
        if end == first + 1:  # measured: a matrix times a vector is up to 1.7 times as fast as a product of one row
            torch.mv(w[expert], x[first], out=y[first])
        elif end > first:
            torch.mm(x[first:end], w[expert].t(), out=y[first:end])
    return y


def _up(x: torch.Tensor, w: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, top_k: int) -> torch.Tensor:
    ends = _ends(w, order, starts)
    return _each(x.index_select(0, order.div(top_k, rounding_mode="floor")), w, ends)


def _down(x: torch.Tensor, w: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, top_k: int) -> torch.Tensor:
    y = _each(x, w, _ends(w, order, starts))
    return torch.empty_like(y).index_copy_(0, order.long(), y).view(len(x) // top_k, top_k, w.shape[1])


def _up_shape(x: torch.Tensor, w: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, top_k: int) -> torch.Tensor:
    return x.new_empty(order.shape[0], w.shape[1])


def _down_shape(x: torch.Tensor, w: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, top_k: int) -> torch.Tensor:
    return x.new_empty(x.shape[0] // top_k, top_k, w.shape[1])


# CompositeExplicitAutograd: built from ATen calls, so it serves every device; on an accelerator reading `starts` synchronises once
_library.impl("experts_up", _up, "CompositeExplicitAutograd")
_library.impl("experts_down", _down, "CompositeExplicitAutograd")
torch.library.register_fake("flagtree::experts_up", _up_shape, lib=_library)
torch.library.register_fake("flagtree::experts_down", _down_shape, lib=_library)
