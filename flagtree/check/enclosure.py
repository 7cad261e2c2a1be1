"""Between which two numbers each stored element must lie: the kernel's body in interval arithmetic, in its own dtypes and roundings.

Invariant: an exactly rounded operation on exact operands stays one number, so a kernel of such operations must have the interpreter's
bits; only functions and sums widen, by their stated errors (check/stated.py), and every rounding after them is taken at both ends.
Read by check/gate.py.  check/enclosed_sums.py does reductions and scans.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flagtree.check.enclosed_sums import enclose_reduction, enclose_scan, enclose_stores
from flagtree.check.stated import Stated
from flagtree.errors import IRError
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.evaluate import FUNCTIONS, Tensor, torch_dtype
from flagtree.ir.ops import OPS
from flagtree.ir.program import BodyOp, Compute, Kernel, Load, Program, Reduce, Scan, Store
from flagtree.ir.sample import Sampled
from flagtree.ir.walk import flat

Pair = tuple[Tensor, Tensor]
# how a result moves with each operand: + with it, - against it
_MONOTONE = {
    "add": "++", "sub": "+-", "neg": "-", "sqrt": "+", "rsqrt": "-", "floor": "+", "ceil": "+", "trunc": "+", "round": "+", "sign": "+",
    "min": "++", "max": "++", "cast": "+",
}  # fmt: skip
_BOOLEAN = {"and": "++", "or": "++", "not": "-"}
_FUNCTIONS = {
    "exp": "+", "exp2": "+", "expm1": "+", "log": "+", "log2": "+", "log10": "+", "log1p": "+", "tanh": "+", "erf": "+", "sinh": "+",
    "asin": "+", "atan": "+", "erfc": "-", "acos": "-",
}  # fmt: skip
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@dataclass(frozen=True, slots=True)
class Enclosed:
    """Of one stored buffer, one-dimensional: element `offsets`; each value lies within `low` and `high`, both NaN where it must be NaN.
    `exact`: nothing on the way is approximate, so they are one number everywhere."""

    offsets: Tensor
    low: Tensor
    high: Tensor
    exact: bool


def enclose(
    program: Program, kernel: Kernel, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], points: Mapping[str, Tensor],
    stated: Stated,
) -> dict[str, Enclosed]:  # fmt: skip
    """`ir.sample.stores_at` with intervals.  Where stores accumulate, `points` are all of the domain and what comes back is every element
    of each stored buffer.  Raises IRError for a kernel whose accesses depend on an approximate value, and for one that accumulates into
    what it also loads or sets."""
    walk = _Enclosure(kernel, tensors, symbols, points, stated)
    walk.run(program.name)
    out = {}
    for name, found in walk.found.items():
        if name in walk.added:
            continue
        offsets, low = (torch.cat(parts) for parts in zip(*found, strict=True))
        out[name] = Enclosed(offsets, low, torch.cat(walk.upper[name]), walk.exact[name])
    if walk.added:
        return {name: walk.whole(name, out.get(name)) for name in kernel.writes}
    return out


class _Enclosure(Sampled):
    """`values` holds the lower ends, `high` the upper ones: the same tensor where a value is exact."""

    def __init__(self, kernel: Kernel, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], points: Mapping[str, Tensor],
                 stated: Stated) -> None:  # fmt: skip
        super().__init__(kernel, tensors, symbols, False, points, None)
        self.stated = stated
        self.high: dict[str, Tensor] = {}
        self.upper: dict[str, list[Tensor]] = {name: [] for name in kernel.writes}
        self.exact = dict.fromkeys(kernel.writes, True)
        self.added: dict[str, list[tuple[str, Tensor, Pair]]] = {}  # buffer -> mode, offsets and values of its accumulating stores

    def is_exact(self, name: str) -> bool:
        return name not in self.values or self.high[name] is self.values[name]

    def define(self, name: str, dtype: str, value: Tensor) -> None:
        super().define(name, dtype, value)
        self.high[name] = self.values[name]

    def define_pair(self, name: str, dtype: str, pair: Pair) -> None:
        self.define(name, dtype, pair[0])
        if pair[1] is not pair[0]:
            self.high[name] = pair[1].to(self.held(dtype))

    def execute(self, op: BodyOp) -> None:
        if isinstance(op, Load | Store):
            names = {n for e in op.access.index for n in e.names()} | ({op.access.mask} if op.access.mask else set())
            if loose := sorted(n for n in names if not self.is_exact(n)):
                raise IRError("an access depends on an approximate value", why=f"'{loose[0]}'")
        if isinstance(op, Compute):
            self.define_pair(op.name, op.dtype, self.compute_pair(op))
        elif isinstance(op, Reduce):
            dims = tuple(self.place[a] for a in op.axes)
            shapes = torch.broadcast_shapes(*(self.values[a].shape for a in op.args))
            args = [tuple(self.spread(side[a].expand(shapes), dims) for side in (self.values, self.high)) for a in op.args]
            height = self.stated.height({a: self.extents[self.place[a]] for a in op.axes})
            exact = all(self.is_exact(a) for a in op.args)
            pairs = enclose_reduction(op, args, dims, [self.accumulator(d) for d in op.dtypes], height, self.stated, exact)  # type: ignore[arg-type]
            for name, dtype, pair in zip(op.names, op.dtypes, pairs, strict=True):
                self.define_pair(name, dtype, pair)
        elif isinstance(op, Scan):
            k = self.place[op.axis]
            low, high = (self.spread(side[op.arg], (k,)) for side in (self.values, self.high))
            pair = enclose_scan(op, (low, high), k, self.accumulator(op.dtype), self.is_exact(op.arg))
            self.define_pair(op.name, op.dtype, pair)
        else:
            super().execute(op)

    def store(self, op: Store) -> None:
        mask = None if op.access.mask is None else self.values[op.access.mask]
        if op.mode != "set":
            offsets, low = self.placed(op, mask, self.values[op.value])
            self.added.setdefault(op.access.buffer, []).append((op.mode, offsets, (low, self.placed(op, mask, self.high[op.value])[1])))
            self.exact[op.access.buffer] &= self.is_exact(op.value) and (op.mode == "max" or not low.is_floating_point())
            return
        super().store(op)
        self.upper[op.access.buffer].append(self.placed(op, mask, self.high[op.value])[1])
        self.exact[op.access.buffer] &= self.is_exact(op.value)

    def whole(self, name: str, stored: Enclosed | None) -> Enclosed:
        """Every element of a stored buffer of a kernel whose stores accumulate."""
        memory = flat(self.tensors[name])
        low, high, parts = memory, memory, self.added.get(name, ())
        if parts and (stored is not None or len({mode for mode, _, _ in parts}) > 1 or name in self.kernel.reads):
            raise IRError("a buffer that stores accumulate into is also set or loaded", why=f"'{name}'")
        if parts:
            offsets, least, most = (torch.cat(x) for x in zip(*((at, *pair) for _, at, pair in parts), strict=True))
            low, high = enclose_stores(memory, parts[0][0], offsets, (least, most))
        elif stored is not None:
            low, high = (memory.clone().index_copy_(0, stored.offsets, x.to(memory.dtype)) for x in (stored.low, stored.high))
        return Enclosed(torch.arange(len(memory)), low, high, self.exact[name])

    # -- one operation -----------------------------------------------------------------------------------------------
    def compute_pair(self, op: Compute) -> Pair:
        names = [a for a in op.args if isinstance(a, str)]
        exact = all(self.is_exact(a) for a in names)
        if OPS[op.op].exact and exact:
            value = self.compute(op)
            return value, value
        if op.op == "where":
            return self._where(op)
        dtype, work = self.working(op)
        low, high = ([self.operand(a, dtype, work, side) for a in op.args] for side in (self.values, self.high))
        point = _all_equal(low, high)
        if op.op in FUNCTIONS and not OPS[op.op].exact:
            return _whole(self._function(op, dtype, low, high, point), _any(_free, low, high) & ~point)
        apply = self._applied(op)
        value = apply(low)
        pair = self._ends(op, DTYPES[dtype].kind, apply, low, high)
        if pair is None:  # copysign, remainders, shifts, bitcast: known at a point only
            return _settled((value, value), value, point, ~point)
        if op.op in _COMPARISONS:
            return _settled(pair, value, point, torch.zeros_like(point))
        never = _any(_never, low, high)
        unknown = (pair[0] != pair[0]) | (pair[1] != pair[1]) | _any(_free, low, high)
        least, most = _settled(pair, value, point, ~point & unknown & ~never)
        if not least.is_floating_point():
            return least, most
        return torch.where(never, math.nan, least), torch.where(never, math.nan, most)

    @staticmethod
    def _ends(op: Compute, kind: str, apply: Callable[[list[Tensor]], Tensor], low: list[Tensor], high: list[Tensor]) -> Pair | None:
        """The least and the greatest result of an exactly rounded operation between the ends of its operands; None where not known."""
        if op.op in _COMPARISONS:
            return _compared(op.op, low, high)
        signs = _BOOLEAN.get(op.op) if kind == "bool" else _MONOTONE.get(op.op)
        if signs is not None and len(signs) == len(op.args):
            return _monotone(apply, signs, low, high)
        if op.op in ("mul", "div"):
            return _corners(apply, low, high, op.op == "div")
        if op.op == "abs":
            ends = apply([low[0]]), apply([high[0]])
            inside = (low[0] < 0) & (high[0] > 0)
            return torch.where(inside, torch.zeros_like(ends[0]), torch.minimum(*ends)), torch.maximum(*ends)
        return None

    def _applied(self, op: Compute) -> Callable[[list[Tensor]], Tensor]:
        """The operation, exactly as the interpreter does it, on operands in its working type."""
        result = torch_dtype(op.dtype) if op.op == "bitcast" else self.held(op.dtype)
        function = (lambda x: x) if op.op == "cast" else (lambda x: x.contiguous().view(result)) if op.op == "bitcast" else FUNCTIONS[op.op]
        return lambda args: function(*args).to(result)

    def _where(self, op: Compute) -> Pair:
        dtype, work = self.working(op)
        sure = self.operand(op.args[0], "b1", torch.bool, self.values)
        maybe = self.operand(op.args[0], "b1", torch.bool, self.high)
        ends = [[self.operand(a, dtype, work, side) for a in op.args[1:]] for side in (self.values, self.high)]
        (x_low, y_low), (x_high, y_high) = ends
        open_ = ~sure & maybe
        low = torch.where(open_, torch.minimum(x_low, y_low), torch.where(sure, x_low, y_low))
        high = torch.where(open_, torch.maximum(x_high, y_high), torch.where(sure, x_high, y_high))
        held = self.held(op.dtype)
        return _whole((low.to(held), high.to(held)), open_ & ((low != low) | (high != high)))

    def _function(self, op: Compute, dtype: str, low: list[Tensor], high: list[Tensor], point: Tensor) -> Pair:
        """A function that is not exactly rounded: its exact value at both ends, widened by its stated error."""
        work = "f64" if DTYPES[dtype].bits == 64 else "f32"
        wide = [[x.double() for x in side] for side in (low, high)]
        signs, function = _FUNCTIONS.get(op.op), FUNCTIONS[op.op]
        first, last = (function(*side) for side in wide)
        if signs == "-":
            first, last, wide = last, first, wide[::-1]
        elif op.op in ("sin", "cos"):
            width = wide[1][0] - wide[0][0]
            first, last = torch.minimum(first, last) - width, torch.maximum(first, last) + width
        elif op.op == "cosh":
            inside = (wide[0][0] < 0) & (wide[1][0] > 0)
            first, last = torch.where(inside, 1.0, torch.minimum(first, last)), torch.maximum(first, last)
        below = first - self.stated.error(op.op, work, first, wide[0][-1])
        above = last + self.stated.error(op.op, work, last, wide[1][-1])
        limited = point if signs is None and op.op not in ("sin", "cos", "cosh") else torch.ones_like(point)
        undefined = (torch.isnan(below) != torch.isnan(above)) | (torch.isnan(below) & ~point) | ~limited
        held = self.held(op.dtype)
        pair = below.to(torch_dtype(work)).to(held), above.to(torch_dtype(work)).to(held)
        return torch.where(undefined, -torch.inf, pair[0]), torch.where(undefined, torch.inf, pair[1])


def _all_equal(low: list[Tensor], high: list[Tensor]) -> Tensor:
    """Where every operand is one number, or NaN."""
    same = torch.ones((), dtype=torch.bool)
    for a, b in zip(low, high, strict=True):
        same = same & ((a == b) | ((a != a) & (b != b)))
    return same


def _free(low: Tensor, high: Tensor) -> Tensor:
    """Where a value may be anything, NaN included."""
    return (low == -torch.inf) & (high == torch.inf) if low.is_floating_point() else torch.zeros_like(low, dtype=torch.bool)


def _never(low: Tensor, high: Tensor) -> Tensor:
    """Where a value is NaN for sure; what is computed with it is NaN too."""
    return (low != low) & (high != high)


def _any(of: Callable[[Tensor, Tensor], Tensor], low: list[Tensor], high: list[Tensor]) -> Tensor:
    found = of(low[0], high[0])
    for a, b in zip(low[1:], high[1:], strict=True):
        found = found | of(a, b)
    return found


def _monotone(apply: Callable[[list[Tensor]], Tensor], signs: str, low: list[Tensor], high: list[Tensor]) -> Pair:
    lower = apply([a if s == "+" else b for s, a, b in zip(signs, low, high, strict=True)])
    upper = apply([b if s == "+" else a for s, a, b in zip(signs, low, high, strict=True)])
    return lower, upper


def _corners(apply: Callable[[list[Tensor]], Tensor], low: list[Tensor], high: list[Tensor], division: bool) -> Pair:
    values = [apply([a, b]) for a, b in itertools.product(*zip(low, high, strict=True))]
    lower, upper = values[0], values[0]
    for value in values[1:]:
        lower, upper = torch.minimum(lower, value), torch.maximum(upper, value)
    if division and lower.is_floating_point():
        straddles = (low[1] <= 0) & (high[1] >= 0)
        lower, upper = torch.where(straddles, -torch.inf, lower), torch.where(straddles, torch.inf, upper)
    return lower, upper


def _compared(op: str, low: list[Tensor], high: list[Tensor]) -> Pair:
    """(certainly true, possibly true)."""
    (a, b), (c, d) = low, high  # a..c against b..d
    if op in ("gt", "ge"):
        a, b, c, d, op = b, a, d, c, "lt" if op == "gt" else "le"
    if op in ("lt", "le"):
        less = torch.lt if op == "lt" else torch.le
        return less(c, b), less(a, d)
    same, overlap = (a == c) & (b == d) & (a == b), (a <= d) & (b <= c)
    return (same, overlap) if op == "eq" else (~overlap, ~same)


def _settled(pair: Pair, value: Tensor, point: Tensor, unknown: Tensor) -> Pair:
    """At a point the value itself, anything where it is not known, elsewhere the pair."""
    low, high = _whole(pair, unknown)
    return torch.where(point, value, low), torch.where(point, value, high)


def _whole(pair: Pair, where: Tensor) -> Pair:
    """The pair; where told so, any value at all."""
    low, high = pair
    if low.dtype == torch.bool:
        return low & ~where, high | where
    if not low.is_floating_point():
        info = torch.iinfo(low.dtype)
        return torch.where(where, info.min, low), torch.where(where, info.max, high)
    return torch.where(where, -torch.inf, low), torch.where(where, torch.inf, high)
