"""Rows of an attention, which keys each sees, and the stated error of their results: between which two numbers an element must lie.

Read from the form (ir/attention.py), which gives the kernel's text back and nothing else.  Used by check/examine.py for whole tensors, by
check/upper_attention.py for rows at true sizes.

The bound.  With exact scores s, maximum m, weights w = exp(s - m) and values v, the result is N / W, N = sum w v, W = sum w.  Generated
code walks the keys in T tiles with a running maximum (templates/cpp_attention.h, templates/triton_attention.py.j2); u = 2^-24.
- A score is a sum of D products (height D + 1), times a constant of its own rounding, plus a mask: off by at most gamma(D + 4) of the sum
  of magnitudes, e (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).
- A weight is exp(s - base) times one exp(old base - new base) for each later tile.  Bases only rise and are exact, so the arguments add up
  to s - m whatever the bases are; each subtraction rounds by u of its size, in all u (m - s + 2 max e).  Each exp has its stated error.
  The factor between the last base and m is the same for all keys of a row, and cancels in N / W.  So a weight is off by a factor within
  exp(e + u (m - s + 2 max e)) (1 + exp's error)^(T + 1), times 1 + u' where it is rounded to the element type u' (in N only; GPUs, and
  many rows of bf16 on the CPU).
- Sums of n terms that pass through T rescales: gamma(n + T + 3) of the sum of magnitudes (Higham, section 4.2).
With |N' - N| <= A and |W' - W| <= B that is |N'/W' - N/W| <= (A + |N/W| B) / (W - B), and the division rounds by u, by 2 u where it is a
product with 1 / W'.  Where a product or an exp underflows, 2^-126 of the largest weight is added for each key and tile.
- Many rows of bf16 on the CPU go through products of pairs (templates/cpp_pairs.h), which take numbers below 2^-126 for zero: that much
  of an operand, of a product and of a sum is lost.  Their exp has WEIGHT_ERROR besides (codegen/cpp_attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flagtree.check.attention_inputs import tile_of
from flagtree.check.enclosure import Enclosed
from flagtree.check.stated import Stated
from flagtree.codegen.cpp_attention import PAIR_ROWS, WEIGHT_ERROR, in_pairs
from flagtree.ir.attention import CACHED, PACKED, Form, group_of, operands
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Buffer, Program

Tensor = torch.Tensor
_UNIT, _LEAST = 2.0**-24, 2.0**-126
_LARGEST = 2.0**100  # magnitudes beyond which an f32 sum may overflow: nothing is stated


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of queries: int64 tensors [R].  Row n sees the keys first[n]..end[n]-1 (under a mask some of them); `inside` is false where a
    kernel gives NaN, because the row's position is none of the cache."""

    sequence: Tensor
    token: Tensor
    head: Tensor
    first: Tensor
    end: Tensor
    inside: Tensor


def rows_at(program: Program, form: Form, told: Tensor | None, symbols: Mapping[str, int], points: Mapping[str, Tensor]) -> Rows:
    """The rows of points of the domain, one for each; `told`: the starts, lengths or bounds."""
    packed = form.kind == PACKED
    token, head = (points[n] for n in (("i0", "i1") if packed else ("i1", "i2")))
    sequence = torch.zeros_like(token) if packed else points["i0"]
    keys = operands(program, form)[1].shape[0 if packed else 2].evaluate(symbols)
    first, inside = torch.zeros_like(token), torch.ones_like(token, dtype=torch.bool)
    if packed:
        assert told is not None
        edges = told.long()
        low = torch.searchsorted(edges, token, right=True)
        seen = (low > 0) & (low < len(edges))
        first = torch.where(seen, edges[(low - 1).clamp(min=0)], 0)
        end = torch.where(seen, edges[low.clamp(max=len(edges) - 1)], 0)
    elif form.kind == CACHED:
        assert told is not None
        position = told[sequence] + token
        end, inside = position + 1, (told[sequence] >= 0) & (position < keys)
        first = (end - form.window).clamp(min=0) if form.window else first
    else:
        end = told[sequence] if form.limited and told is not None else torch.full_like(token, keys)
    end = torch.minimum(end, token + 1) if form.causal else end
    return Rows(sequence, token, head, first, end.clamp(0, keys), inside)


def enclose_attention(
    program: Program, form: Form, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], points: Mapping[str, Tensor], stated: Stated
) -> dict[str, Enclosed]:
    """Where the stored elements at `points` must lie, as check.enclosure.enclose says it."""
    q, k, _, *where, out = operands(program, form)
    rows = rows_at(program, form, tensors[where[0].name] if where and not form.mask else None, symbols, points)
    element = points["i2" if form.kind == PACKED else "i3"]
    group = group_of(q, k)
    count = len(element)
    low, high = torch.empty(count, dtype=torch.float64), torch.empty(count, dtype=torch.float64)
    heads = torch.stack([rows.sequence, rows.head // group], 1)
    for sequence, key_head in torch.unique(heads, dim=0).tolist():
        mine = ((heads[:, 0] == sequence) & (heads[:, 1] == key_head)).nonzero().flatten()
        same, at = torch.unique(torch.stack([rows.token[mine], rows.head[mine]], 1), dim=0, return_inverse=True)
        one = torch.stack([(at == n).nonzero()[0, 0] for n in range(len(same))])
        first, end, inside = (x[mine][one] for x in (rows.first, rows.end, rows.inside))
        part = _Part(program, form, tensors, sequence, key_head, same, first, end, symbols)
        result, error = part.bounded(stated)
        columns = element[mine]
        low[mine], high[mine] = ((result + sign * error)[at, columns] for sign in (-1, 1))
        outside = mine[~inside[at]]
        low[outside], high[outside] = math.nan, math.nan
    dtype = torch_dtype(out.dtype)
    offsets = sum((points[f"i{d}"] * stride.evaluate(symbols) for d, stride in enumerate(out.layout)), torch.zeros_like(element))
    assert isinstance(offsets, Tensor)
    return {out.name: Enclosed(offsets, low.float().to(dtype), high.float().to(dtype), False)}


class _Part:
    """Rows of one sequence over one key head, in float64: `rows` [R, 2] token and head, who see first[n]..end[n]-1."""

    def __init__(self, program: Program, form: Form, tensors: Mapping[str, Tensor], sequence: int, key_head: int, rows: Tensor,
                 first: Tensor, end: Tensor, symbols: Mapping[str, int]) -> None:  # fmt: skip
        q, k, v, *where, _ = operands(program, form)
        seen = end > first
        self.low = int(first[seen].min()) if bool(seen.any()) else 0
        self.high = int(end[seen].max()) if bool(seen.any()) else 0
        token, head = rows[:, 0], rows[:, 1]
        if form.kind == PACKED:
            queries, keys, values = tensors[q.name][token, head], tensors[k.name][:, key_head], tensors[v.name][:, key_head]
        else:
            queries = tensors[q.name][sequence, head, token]
            keys, values = tensors[k.name][sequence, key_head], tensors[v.name][sequence, key_head]
        self.queries, self.keys, self.values = queries.double(), keys[self.low : self.high].double(), values[self.low : self.high].double()
        place = torch.arange(self.low, self.high)
        self.seen = (place >= first[:, None]) & (place < end[:, None])
        self.added = torch.zeros((), dtype=torch.float64)
        if form.mask:
            mask = _masked(tensors[where[0].name], where[0], sequence, head, token)[:, self.low : self.high]
            self.seen = self.seen & mask if form.mask == "seen" else self.seen
            self.added = mask.double() if form.mask == "added" else self.added
        walked = k.shape[0].evaluate(symbols) if form.kind == PACKED else self.high - self.low + PAIR_ROWS  # the most rows of a block
        self.tiles = -(-walked // tile_of(program)) + 2
        self.scale, self.dtype = form.scale, q.dtype
        self.pairs = in_pairs(program, form)

    def bounded(self, stated: Stated) -> tuple[Tensor, Tensor]:
        """(result, its error) [R, E]; infinite errors where nothing is stated, zeros where a row sees nothing."""
        weighed, unseen = self.queries, ~self.seen
        if not self.keys.shape[0]:
            nothing = torch.zeros(len(weighed), self.values.shape[1], dtype=torch.float64)
            return nothing, nothing
        score = (weighed @ self.keys.T * self.scale + self.added).masked_fill(unseen, -math.inf)
        size = weighed.abs() @ self.keys.abs().T * abs(self.scale) + torch.where(self.added == -math.inf, 0.0, self.added.abs())
        size = size.masked_fill(unseen, 0.0)
        finite = torch.isfinite(self.keys).all() & torch.isfinite(self.values).all()
        fits = (size < _LARGEST).all(1) & (self.values.abs() < _LARGEST).all()
        empty = (score == -math.inf).all(1)
        gap = torch.where(empty[:, None], math.inf, score.amax(1, keepdim=True) - score)
        error = _gamma(torch.tensor(self.keys.shape[1] + 4)) * size
        pairs = self.pairs and not stated.threads
        rounds = self.pairs or stated.threads
        if pairs:
            magnitudes = weighed.abs().sum(1, keepdim=True) + self.keys.abs().sum(1) + 2 * self.keys.shape[1]
            error = error + (_LEAST * abs(self.scale) * magnitudes).masked_fill(unseen, 0.0)
        argument = error + 1.001 * _UNIT * (torch.where(torch.isfinite(gap), gap, 0.0) + 2 * error.amax(1, keepdim=True))
        one = stated.functions["exp2" if stated.threads else "exp"].ulp * 2 * _UNIT
        off = torch.expm1(argument + (self.tiles + 1) * math.log1p(one) + (math.log1p(WEIGHT_ERROR) if pairs else 0.0))
        weight = torch.exp(-gap)
        terms = self.seen.sum(1, keepdim=True)
        summed = _gamma(terms + self.tiles + 3)
        rounded = _unit(self.dtype) if rounds else 0.0
        lost = terms * (self.tiles + 2) * (_LEAST + (_least(self.dtype) if rounds else 0.0))
        total, sums = weight.sum(1, keepdim=True), weight @ self.values
        above = (weight * ((1 + off) * (1 + rounded) * (1 + summed) - 1)) @ self.values.abs()
        above = above + lost * self.values.abs().amax(0) + terms * (4 * _LEAST if pairs else 2.0**-149)
        below = (weight * ((1 + off) * (1 + summed) - 1)).sum(1, keepdim=True) + lost
        total = torch.where(empty[:, None], 1.0, total)
        result = sums / total
        bound = (above + result.abs() * below) / (total - below)
        bound = bound + (2.001 if pairs else 1) * _UNIT * (result.abs() + bound) + 2.0**-149
        known = finite & fits[:, None] & (below < total / 2) & torch.isfinite(bound)
        result, bound = torch.where(known, result, 0.0), torch.where(known, bound, math.inf)
        nothing = ((empty & finite) | unseen.all(1))[:, None]  # a mask of -inf, or no key at all
        return torch.where(nothing, 0.0, result), torch.where(nothing, 0.0, bound)


def _masked(mask: Tensor, buffer: Buffer, sequence: int, head: Tensor, token: Tensor) -> Tensor:
    """The mask's rows [R, L]."""
    at = (torch.full_like(head, sequence), head, token)[4 - mask.ndim :]
    return mask[tuple(torch.zeros_like(x) if n.constant == 1 else x for x, n in zip(at, buffer.shape[:-1], strict=True))]


def _gamma(height: Tensor) -> Tensor:
    return height.double() * _UNIT / (1 - height.double() * _UNIT)


def _unit(dtype: str) -> float:
    """By how much of itself a weight moves when it is rounded to the element type."""
    return 0.0 if dtype == "f32" else 2.0 ** -(DTYPES[dtype].mantissa + 1)


def _least(dtype: str) -> float:
    """By how much of the largest weight a tiny one moves: half a step of f16's denormals; bf16 has the range of f32."""
    return 2.0**-25 if dtype == "f16" else 0.0
