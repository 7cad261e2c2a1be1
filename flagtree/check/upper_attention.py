"""Rows of an attention at true sizes: what they read is filled, what they must store is stated, all else of the tensors is untouched.

With all sizes at their upper ends the last sequence sees every key, all others a few, so that a run has an end; every row lies at its
true address.  A row whose number decides what it sees (a prompt's last token) sees all that it must.
Takes the place of check/sparse.py's `Expected` for attention: every element that is looked at must lie within the stated error
(check/attention_rows.py), a few are computed by the interpreter too, and some rows by eager.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from flagtree.check import attention_inputs
from flagtree.check.attention_rows import enclose_attention, rows_at
from flagtree.check.enclosure import Enclosed
from flagtree.check.gate import outside
from flagtree.check.inputs import unwritten
from flagtree.check.points import kernel_of
from flagtree.check.positions import Positions
from flagtree.check.recipe import NoEager
from flagtree.check.sparse import NOT_ASKED, Expected, Sampled, Strays, geometry
from flagtree.check.stated import Stated
from flagtree.check.upper_eager import Beside, Eager, Unlike, empty
from flagtree.errors import IRError
from flagtree.ir.attention import CACHED, FULL, PACKED, Form, form_of, group_of, operands
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Buffer, Program
from flagtree.ir.sample import Stored, stores_at

Tensor = torch.Tensor
INTERPRETED = 1 << 24  # products of queries and keys that the interpreter computes, a score anew for each element of a result
LARGEST_VALUE = 3.5  # of check/positions.py
HELD = 1 << 23  # of them at once
EAGER_ROWS, EAGER_LARGEST = 2, 1 << 27  # rows that eager computes, and elements of a tensor that it gets


def told_at_end(program: Program, form: Form, symbols: Mapping[str, int]) -> Tensor | None:
    """Starts and lengths: two tiles at most, but as many keys as there are for the last sequence where every symbol is at its upper end.
    Bounds: sequences of up to two tiles, the last of which ends with the last token.  None for a form without them."""
    q, k, _, *where, _ = operands(program, form)
    if not where or form.mask:
        return None
    tokens, keys = (b.shape[0 if form.kind == PACKED else 2].evaluate(symbols) for b in (q, k))
    count, most = where[0].shape[0].evaluate(symbols), 2 * attention_inputs.tile_of(program)
    if form.kind == PACKED:
        step = max(1, min(most, tokens // max(1, count - 1)))
        return (tokens - torch.arange(count).flip(0) * step).clamp(min=0).to(torch_dtype(where[0].dtype))
    highest = max(0, keys - tokens) if form.kind == CACHED else keys
    told = (torch.arange(count) * 7 % (most + 1)).clamp(max=highest)
    if all(symbols[s.name] == s.hi // s.multiple * s.multiple for s in program.symbols):
        told[-1:] = highest
    return told


def products(program: Program, form: Form, symbols: Mapping[str, int]) -> float:
    """About how many products of one query's and one key's or value's element a whole call computes, at `told_at_end`."""
    q, k, v, *_ = operands(program, form)
    heads, widths = q.shape[1].evaluate(symbols), q.shape[-1].evaluate(symbols) + v.shape[-1].evaluate(symbols)
    tokens, keys = (b.shape[0 if form.kind == PACKED else 2].evaluate(symbols) for b in (q, k))
    told = told_at_end(program, form, symbols)
    if form.kind == PACKED:
        assert told is not None
        scores = float((told.double().diff() ** 2).sum())
    elif form.kind == CACHED:
        assert told is not None
        seen = (told + tokens).clamp(max=form.window + 64) if form.window else told + tokens
        scores = float(seen.double().sum()) * tokens
    else:
        scores = tokens * (float(told.double().sum()) if told is not None else keys * float(q.shape[0].evaluate(symbols)))
    return scores * heads * widths


class AttentionExpected:
    """As `Expected`, for an attention: sparse buffers (`flat`) filled where rows of `points` read and NaN where they store."""

    def __init__(self, program: Program, form: Form, symbols: Mapping[str, int], flat: Mapping[str, Tensor],
                 points: Mapping[str, Tensor], seed: int, stated: Stated, eager: Eager | None = None) -> None:  # fmt: skip
        self.program, self.form, self.symbols, self.flat, self.points = program, form, symbols, flat, points
        self.positions = Positions(program, symbols, seed)
        self.filled: list[tuple[Buffer, tuple[int | Tensor, ...], Tensor]] = []  # buffer, rows of it, their values
        self._place(flat)
        told, out = told_at_end(program, form, symbols), operands(program, form)[-1]
        self.out, self.rows = out.name, rows_at(program, form, told, symbols, points)
        self._fill()
        self.enclosed = enclose_attention(program, form, self.tensors, symbols, points, stated)[out.name]
        self.chosen = self._some()
        self.own, self.truth = (self._interpreted(precise) for precise in (False, True))
        self.beside = NOT_ASKED if eager is None else self._eager(eager)
        self._unwrite()

    def elsewhere(self, flat: Mapping[str, Tensor]) -> AttentionExpected:
        """The same rows in other memory, which is all zero; what this holds of the old one is gone."""
        self._place(flat)
        for buffer, at, values in self.filled:
            self.flat[buffer.name][self._offsets(buffer, at)] = values
        self._unwrite()
        return self

    def _place(self, flat: Mapping[str, Tensor]) -> None:
        self.flat = flat
        self.tensors = {b.name: torch.as_strided(flat[b.name], *geometry(b, self.symbols)) for b in self.program.buffers}
        if (told := told_at_end(self.program, self.form, self.symbols)) is not None:
            self.tensors[operands(self.program, self.form)[3].name].copy_(told)

    def _unwrite(self) -> None:
        self.flat[self.out][self.enclosed.offsets] = unwritten(self.flat[self.out].dtype)
        self.before = self.stored()

    def stored(self) -> dict[str, Tensor]:
        """What is now where the points store."""
        return {self.out: self.flat[self.out][self.enclosed.offsets].clone()}

    def put_back(self) -> None:
        """Make what the points store what it was."""
        self.flat[self.out][self.enclosed.offsets] = self.before[self.out]

    def sampled(self, ours: Mapping[str, Tensor], what: str, ways: tuple[str, ...]) -> Sampled:
        """The record of what was executed.  Raises Strays when one of all elements is outside of its stated error."""
        found, at, whole = ours[self.out], self.chosen, self.enclosed
        if wrong := outside(found, whole):
            raise Strays(f"attention at true sizes: {wrong[0]}")
        part = Enclosed(whole.offsets[at], whole.low[at], whole.high[at], False)
        self._near_eager(part)
        values = {self.out: found[at]}, {self.out: self.own.values}, {self.out: self.truth.values}
        return Sampled(f"{what}; {len(found)} elements, {len(at)} by the interpreter", ways, *values, {self.out: part}, self.beside)

    def _near_eager(self, stated: Enclosed) -> None:
        """Eager rounds at other places, weights to the element type among them: within eight times the stated error and four roundings
        of the largest value.  Raises Strays: the kernel's text means something else."""
        if self.beside.why:
            return
        at, dtype = self.beside.places[self.out], self.program.buffer(self.out).dtype
        low, high, theirs = (x.double() for x in (stated.low[at], stated.high[at], self.beside.values[self.out]))
        allowed = 4 * (high - low) + 4 * LARGEST_VALUE * 2.0 ** -(DTYPES[dtype].mantissa + 1)
        if bool(((theirs - (low + high) / 2).abs() > allowed).any()):
            raise Strays("attention at true sizes: eager computes something else", why=f"{theirs.tolist()} is far from {low.tolist()}")

    # -- inputs ------------------------------------------------------------------------------------------------------
    def _fill(self) -> None:
        """Queries of the rows, the keys and values that they see, and their mask."""
        q, k, v, *where, _ = operands(self.program, self.form)
        rows, packed = self.rows, self.form.kind == PACKED
        group = group_of(q, k)
        for sequence, head, token in torch.unique(torch.stack([rows.sequence, rows.head, rows.token], 1), dim=0).tolist():
            self._put(q, (token, head) if packed else (sequence, head, token))
            if self.form.mask:
                at = (sequence, head, token)[4 - len(where[0].shape) :]
                self._put(where[0], tuple(0 if n.constant == 1 else x for x, n in zip(at, where[0].shape[:-1], strict=True)))
        heads = torch.stack([rows.sequence, rows.head // group], 1)
        for sequence, key_head in torch.unique(heads, dim=0).tolist():
            mine = (heads[:, 0] == sequence) & (heads[:, 1] == key_head) & (rows.end > rows.first)
            if not bool(mine.any()):
                continue
            seen = torch.arange(int(rows.first[mine].min()), int(rows.end[mine].max()))
            for buffer in (k, v):
                self._put(buffer, (seen, key_head) if packed else (sequence, key_head, seen))

    def _put(self, buffer: Buffer, at: tuple[int | Tensor, ...]) -> None:
        """Fill rows of a buffer by position: `at` has all dimensions but the last."""
        offsets = self._offsets(buffer, at)
        values = self.positions.at(buffer.name, offsets)
        self.flat[buffer.name][offsets] = values
        self.filled.append((buffer, at, values))

    def _offsets(self, buffer: Buffer, at: tuple[int | Tensor, ...]) -> Tensor:
        strides = [s.evaluate(self.symbols) for s in buffer.layout]
        start = sum((torch.as_tensor(x) * s for x, s in zip(at, strides, strict=False)), torch.zeros((), dtype=torch.int64))
        return (start.reshape(-1, 1) + torch.arange(buffer.shape[-1].evaluate(self.symbols)) * strides[-1]).flatten()

    # -- references --------------------------------------------------------------------------------------------------
    @property
    def _inner(self) -> int:
        return math.prod(a.extent.evaluate(self.symbols) for a in kernel_of(self.program).axes if a.kind == "reduce")

    def _some(self) -> Tensor:
        """The points that the interpreter computes: the first, the last and those between at even steps."""
        count = len(self.enclosed.offsets)
        wanted = min(count, max(3, INTERPRETED // max(1, self._inner)), 64)
        return torch.unique(torch.linspace(0, count - 1, wanted).long())

    def _interpreted(self, precise: bool) -> Stored:
        kernel, several = kernel_of(self.program), max(1, HELD // max(1, self._inner))
        parts = [
            stores_at(self.program, kernel, self.tensors, self.symbols, {n: x[at] for n, x in self.points.items()}, precise)[self.out]
            for at in self.chosen.split(several)
        ]
        return Stored(torch.cat([p.offsets for p in parts]), torch.cat([p.values for p in parts]))

    def _eager(self, eager: Eager) -> Beside:
        """PyTorch's values of some of the chosen points: each row alone, with the keys that it sees."""
        row = torch.stack([self.rows.sequence, self.rows.token, self.rows.head], 1)[self.chosen]
        element = self.points["i2" if self.form.kind == PACKED else "i3"][self.chosen]
        same, of = torch.unique(row, dim=0, return_inverse=True)
        places, values = [], []
        try:
            for n in torch.unique(torch.linspace(0, len(same) - 1, EAGER_ROWS).long()).tolist():
                at = (of == n).nonzero().flatten()
                places.append(at)
                values.append(_Alone(self, int(self.chosen[at[0]])).result(eager)[element[at]])
        except (Unlike, NoEager, IRError) as error:
            return Beside(why=getattr(error, "why", "") or str(error))
        return Beside({self.out: torch.cat(places)}, {self.out: torch.cat(values)})


def expected_at(
    before: Expected | AttentionExpected | None, program: Program, symbols: Mapping[str, int], flat: Mapping[str, Tensor],
    points: Mapping[str, Tensor], seed: int, stated: Stated, eager: Eager | None, kind: str = "ordinary",
) -> Expected | AttentionExpected:  # fmt: skip
    """What a kernel must store at chosen points, whatever it is.  `before`: of another way to run it, in memory that is gone; eager has
    computed there.  `kind` of floats (check/regimes.py): an attention takes ordinary ones."""
    if before is not None:
        return before.elsewhere(flat)
    form = form_of(program)
    if form is None:
        return Expected(program, symbols, flat, points, seed, stated, eager, kind)
    return AttentionExpected(program, form, symbols, flat, points, seed, stated, eager)


class _Alone:
    """One row as a problem of its own: one sequence of as many keys as it sees."""

    def __init__(self, of: AttentionExpected, point: int) -> None:
        self.of, form, rows = of, of.form, of.rows
        q, k, *_ = operands(of.program, form)
        self.sequence, self.token, self.head, self.first, self.end = (
            int(x[point]) for x in (rows.sequence, rows.token, rows.head, rows.first, rows.end)
        )
        axis = 0 if form.kind == PACKED else 2
        together = q.shape[axis] == k.shape[axis]  # as many tokens as keys
        self.seen = self.end - self.first
        self.at = (self.token - self.first if form.kind == PACKED else self.token) if together else 0
        tokens = max(self.seen, self.at + 1) if together else 1
        wanted = {"batch": 1, "tokens": tokens, "keys": tokens if together else max(1, self.seen), "edges": 2}
        self.sizes = attention_inputs.setting(of.program, form, wanted)
        if q.shape[axis].evaluate(self.sizes) < tokens:
            raise Unlike("its row alone does not fit the sizes of a smaller call")
        held = [math.prod(n.evaluate(self.sizes) for n in b.shape) for b in of.program.buffers]
        if max(held) > EAGER_LARGEST or tokens * wanted["keys"] * q.shape[1].evaluate(self.sizes) > EAGER_LARGEST:
            raise Unlike("as many rows as keys: more than a few of them would have to be computed")
        exact = form.kind == FULL and not form.limited
        if (exact and k.shape[2].evaluate(self.sizes) != self.seen) or (form.causal and not together and self.at != self.token):
            raise Unlike("its row alone sees other keys")

    def result(self, eager: Eager) -> Tensor:
        """What PyTorch gives for the row, element by element."""
        of, form = self.of, self.of.form
        q, k, v, *where, out = operands(of.program, form)
        small = {b.name: empty(b, self.sizes) for b in of.program.buffers}
        key_head, packed = self.head // group_of(q, k), form.kind == PACKED
        here, there = ((self.at, self.head), (self.token, self.head)) if packed else (
            (0, self.head, self.at), (self.sequence, self.head, self.token))  # fmt: skip
        small[q.name][here] = of.tensors[q.name][there]
        for name in (k.name, v.name):
            near, far = ((small[name][:, key_head], of.tensors[name][:, key_head]) if packed else
                         (small[name][0, key_head], of.tensors[name][self.sequence, key_head]))  # fmt: skip
            near[: self.seen] = far[self.first : self.end]
        if form.mask:
            near, far = _row(small[where[0].name], here), _row(of.tensors[where[0].name], there)
            near.copy_(far[: near.shape[0]])
        elif where:
            told = self.seen - 1 - self.at if form.kind == CACHED else self.seen
            small[where[0].name].copy_(torch.tensor([0, self.seen]) if packed else torch.tensor(told))
        found = eager(small, self.sizes)
        if out.name not in found:
            raise Unlike(f"{out.name} is internal to one operator")
        return found[out.name][here if packed else (0, self.at, self.head)]


def _row(mask: Tensor, point: tuple[int, ...]) -> Tensor:
    """The mask's row of (sequence, head, token)."""
    return mask[tuple(0 if n == 1 else x for x, n in zip(point[4 - mask.ndim :], mask.shape[:-1], strict=True))]
