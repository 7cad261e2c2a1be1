"""Reductions, scans and accumulating stores as intervals: sums within Higham's bound for their height, extrema exactly, the rest by ends.

Ends are summed in float64, which is exact beside the bound of f32; sums of f64 count their bound twice (check/stated.py).
Used by check/enclosure.py only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flagtree.check.stated import Stated, gamma
from flagtree.errors import IRError
from flagtree.ir.evaluate import IR_NAMES, Tensor, reduce, scan
from flagtree.ir.program import Reduce, Scan

Pair = tuple[Tensor, Tensor]


def enclose_reduction(
    op: Reduce, args: Sequence[Pair], dims: tuple[int, ...], types: Sequence[torch.dtype], height: int, stated: Stated, exact: bool
) -> list[Pair]:
    """The pairs of a Reduce from those of its operands, whose sums have at most `height` additions on a path; `types`: accumulators.
    Raises IRError for a combiner of approximate operands that has no rule."""
    count = math.prod(args[0][0].shape[d] for d in dims)
    floating = types[0].is_floating_point
    rules = {"welford": _welford, "online_softmax": _softmax} | ({"sum": _sum, "prod": _product} if floating and count > 1 else {})
    if rule := rules.get(op.combiner):
        return [_rounded(pair, kind) for pair, kind in zip(rule(args, dims, height, stated, IR_NAMES[types[0]]), types, strict=True)]
    low, high = ([pair[side].to(kind) for pair, kind in zip(args, types, strict=True)] for side in (0, 1))
    least = reduce(op.combiner, low, dims)
    if exact:
        return [(value, value) for value in least]
    if op.combiner in ("argmin", "argmax"):
        return _arg(op.combiner == "argmax", low, high, dims)
    if op.combiner in ("sum", "min", "max", "any", "all"):  # a sum of one term, or of integers
        (most,) = reduce(op.combiner, high, dims)
        if not floating:
            return [(least[0], most)]
        anything = ((low[0] == -torch.inf) & (high[0] == torch.inf)).any(dims, keepdim=True) & ~torch.isnan(least[0])
        return [(torch.where(anything, -torch.inf, least[0]), torch.where(anything, torch.inf, most))]
    raise IRError(f"'{op.combiner}' of approximate operands has no stated bound")


def enclose_scan(op: Scan, pair: Pair, dim: int, kind: torch.dtype, exact: bool) -> Pair:
    """The pair of a Scan: a running sum of n terms has height n."""
    low, high = pair[0].to(kind), pair[1].to(kind)
    if not kind.is_floating_point or op.combiner not in ("sum", "prod"):
        least = scan(op.combiner, low, dim)
        if exact:
            return least, least
        if kind.is_floating_point and bool(((low == -torch.inf) & (high == torch.inf)).any()):
            raise IRError("a running extremum of a value that may be anything has no stated bound")
        return least, scan(op.combiner, high, dim)
    bound = gamma(max(1, low.shape[dim]), IR_NAMES[kind])
    if op.combiner == "sum":
        size = torch.maximum(low.double().abs(), high.double().abs()).cumsum(dim)
        return _rounded(_widened((low.double().cumsum(dim), high.double().cumsum(dim)), bound * size, size, kind), kind)
    if not exact:
        raise IRError("a running product of approximate operands has no stated bound")
    value = low.double().cumprod(dim)
    return _rounded(_widened((value, value), bound * value.abs(), value.abs(), kind), kind)


def enclose_stores(start: Tensor, mode: str, offsets: Tensor, pair: Pair) -> Pair:
    """What accumulating stores leave in memory that held `start`: the values of `pair` go to `offsets`, in any order.

    An element that n values are added to, each sum rounded to the memory's type, has a sum of height n: Higham's bound, as for others.
    """
    low, high = (x.to(start.dtype) for x in pair)
    if mode == "max":
        least, most = (start.clone().scatter_reduce_(0, offsets, x, "amax") for x in (low, high))
        return least, most
    if not start.dtype.is_floating_point:
        least, most = (start.clone().index_add_(0, offsets, x) for x in (low, high))
        return least, most
    size = start.double().abs().index_add_(0, offsets, torch.maximum(low.double().abs(), high.double().abs()))
    least, most = (start.double().clone().index_add_(0, offsets, x.double()) for x in (low, high))
    count = torch.zeros_like(size).index_add_(0, offsets, torch.ones_like(offsets, dtype=torch.float64))
    relative = count * gamma(1, IR_NAMES[start.dtype])  # 1 / (1 - u) instead of u: a little more than count u
    share = torch.where(relative < 0.5, relative / (1 - relative), math.inf)
    widened = _widened((least, most), torch.where(count > 0, share * size, 0.0), size, start.dtype)
    return _rounded(widened, start.dtype)


def _rounded(pair: Pair, kind: torch.dtype) -> Pair:
    return pair[0].to(kind), pair[1].to(kind)


def _widened(pair: Pair, by: Tensor, largest: Tensor, kind: torch.dtype) -> Pair:
    """The pair widened where it is finite; anything where an intermediate result may overflow.  NaN and infinity among the terms decide
    the result whatever the order."""
    low, high = pair
    sure = ~torch.isfinite(low) | ~torch.isfinite(high)
    overflow = torch.isfinite(low) & torch.isfinite(high) & (largest > torch.finfo(kind).max / 2)
    low, high = torch.where(sure, low, low - by), torch.where(sure, high, high + by)
    unequal = sure & ((low != low) != (high != high))
    anything = overflow | unequal
    return torch.where(anything, -torch.inf, low), torch.where(anything, torch.inf, high)


def _sum(args: Sequence[Pair], dims: tuple[int, ...], height: int, stated: Stated, dtype: str) -> list[Pair]:
    low, high = (x.double() for x in args[0])
    size = torch.maximum(low.abs(), high.abs()).sum(dims, keepdim=True)
    pair = low.sum(dims, keepdim=True), high.sum(dims, keepdim=True)
    return [_widened(pair, gamma(height, dtype) * size, size, _type(dtype))]


def _product(args: Sequence[Pair], dims: tuple[int, ...], height: int, stated: Stated, dtype: str) -> list[Pair]:
    low, high = (x.double() for x in args[0])
    if not torch.equal(torch.nan_to_num(low), torch.nan_to_num(high)):
        raise IRError("a product of approximate operands has no stated bound")
    value = reduce("prod", [low], dims)[0]
    return [_widened((value, value), gamma(height, dtype) * value.abs(), value.abs(), _type(dtype))]


def _welford(args: Sequence[Pair], dims: tuple[int, ...], height: int, stated: Stated, dtype: str) -> list[Pair]:
    """Mean and sum of squared deviations by pairwise updates: relative error at most 4 h u times the condition number
    sqrt(1 + n mean^2 / M2) (Chan, Golub, LeVeque, The American Statistician 37 (1983), table 1)."""
    low, high = ([pair[side].double() for pair in args] for side in (0, 1))
    ends = [reduce("welford", [side[0], side[1], args[2][0]], dims) for side in (low, high)]
    count = ends[0][2].double()
    total = torch.where(count == 0, 1.0, count)
    size = (torch.maximum(low[0].abs(), high[0].abs()) * args[2][0]).sum(dims, keepdim=True) / total
    step, spread = 4 * gamma(height + 2, dtype), (high[0] - low[0]).amax(dims, keepdim=True)
    mean = _widened((ends[0][0], ends[1][0]), step * size, size * total, _type(dtype))
    second = torch.maximum(ends[0][1], ends[1][1])
    error = step * torch.sqrt(second * second + second * total * size * size) + step * step * total * size * size
    error = error + 2 * spread * torch.sqrt(total * second) + total * spread * spread
    middle = torch.minimum(ends[0][1], ends[1][1]), second
    m2 = _widened(middle, error, second + total * size * size, _type(dtype))
    return [mean, (m2[0].clamp(min=0), m2[1]), (ends[0][2], ends[0][2])]


def _softmax(args: Sequence[Pair], dims: tuple[int, ...], height: int, stated: Stated, dtype: str) -> list[Pair]:
    """Maximum, and the sum of exp(x - maximum): each term is scaled by at most one exp for each step of its path."""
    (low, high), (start_low, start_high) = ((a.double(), b.double()) for a, b in args)
    top_low, top_high = (x.amax(dims, keepdim=True) for x in (low, high))
    far = stated.error("exp", dtype, torch.exp(low - top_high), low - top_high) / torch.exp(low - top_high).clamp(min=1e-300)
    share = torch.where(torch.isfinite(far), far, 0.0).clamp(max=1e-2)  # the relative error of one exp
    grown = (1 + share) ** 2 * (1 + gamma(2 * height + 2, dtype)) ** 2

    def terms(x: Tensor, start: Tensor, top: Tensor) -> Tensor:
        return torch.where(x == top, start, start * torch.exp(x - top))

    least = (terms(low, start_low, top_high) / grown).sum(dims, keepdim=True)
    most = (terms(torch.minimum(high, top_low), start_high, top_low) * grown).sum(dims, keepdim=True)
    return [(top_low, top_high), _widened((least, most), torch.zeros_like(least), most, _type(dtype))]


def _arg(largest: bool, low: Sequence[Tensor], high: Sequence[Tensor], dims: tuple[int, ...]) -> list[Pair]:
    """Candidates are the points that may hold the extremum; their first and last index enclose the index."""
    if bool(torch.isnan(low[0]).any() | torch.isnan(high[0]).any()):
        raise IRError("the place of an extremum among NaN and approximate operands has no stated bound")
    extremum = torch.amax if largest else torch.amin
    best = extremum(low[0], dims, keepdim=True), extremum(high[0], dims, keepdim=True)
    candidate = high[0] >= best[0] if largest else low[0] <= best[1]
    index = low[1]
    info = torch.iinfo(index.dtype)
    first = torch.where(candidate, index, info.max).amin(dims, keepdim=True)
    last = torch.where(candidate, index, info.min).amax(dims, keepdim=True)
    return [best, (first, last)]


def _type(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "f64" else torch.float32
