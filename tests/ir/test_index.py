"""Index arithmetic against brute-force integers: every rewriting keeps the value, every bound holds, every proof is true."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flagtree.errors import IRError
from flagtree.ir.index import (
    ONE,
    ZERO,
    Bounds,
    Index,
    contiguous_strides,
    flatten,
    floordiv,
    from_sympy,
    parse_index,
    remainder,
    split_multiple,
    unflatten,
)

# symbols with small ranges, axes below an extent over the symbols: every assignment can be walked
SYMBOLS = {"s": (1, 4), "t": (2, 3)}
AXES = {"i": Index.of("s"), "j": Index.of("s") * "t", "k": Index.of(5)}
BOUNDS = Bounds(SYMBOLS, AXES)
NAMES = ("s", "t", "i", "j", "k")


def assignments():
    for s, t in itertools.product(*(range(a, b + 1) for a, b in SYMBOLS.values())):
        extents = [e.evaluate({"s": s, "t": t}) for e in AXES.values()]
        for point in itertools.product(*map(range, extents)):
            yield {"s": s, "t": t, **dict(zip(AXES, point, strict=True))}


EVERYWHERE = tuple(assignments())
SOME = EVERYWHERE[:: max(1, len(EVERYWHERE) // 150)]


@st.composite
def positive(draw: st.DrawFn) -> Index:
    """A divisor: positive at every assignment."""
    return draw(
        st.sampled_from([Index.of(n) for n in (1, 2, 3, 4, 6)] + [Index.of("s"), Index.of("t"), Index.of("s") * "t", Index.of("t") * 2])
    )


@st.composite
def indices(draw: st.DrawFn, depth: int = 2) -> Index:
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.one_of(st.sampled_from(NAMES).map(Index.of), st.integers(-5, 9).map(Index.of)))
    kind = draw(st.sampled_from(["+", "-", "*", "//", "%"]))
    a = draw(indices(depth - 1))
    if kind in ("//", "%"):
        d = draw(positive())
        return floordiv(a, d) if kind == "//" else remainder(a, d)
    b = draw(indices(depth - 1))
    return a + b if kind == "+" else a - b if kind == "-" else a * b


@given(indices(3), indices(3))
def test_arithmetic_is_integer_arithmetic(a: Index, b: Index) -> None:
    for v in SOME:
        x, y = a.evaluate(v), b.evaluate(v)
        assert (a + b).evaluate(v) == x + y
        assert (a - b).evaluate(v) == x - y
        assert (a * b).evaluate(v) == x * y
        assert (-a).evaluate(v) == -x


@given(indices(3), positive())
def test_division_floors(a: Index, d: Index) -> None:
    quotients = (floordiv(a, d), floordiv(a, d, BOUNDS), a // d)
    remainders = (remainder(a, d), remainder(a, d, BOUNDS), a % d)
    q, r = split_multiple(a, d)
    for v in SOME:
        x, y = a.evaluate(v), d.evaluate(v)
        assert [n.evaluate(v) for n in quotients] == [x // y] * 3
        assert [n.evaluate(v) for n in remainders] == [x % y] * 3
        assert q.evaluate(v) * y + r.evaluate(v) == x


@given(indices(3))
def test_simplify_keeps_the_value(a: Index) -> None:
    simple = BOUNDS.simplify(a)
    for v in SOME:
        assert simple.evaluate(v) == a.evaluate(v)


@given(indices(3))
def test_bounds_hold_everywhere(a: Index) -> None:
    values = [a.evaluate(v) for v in EVERYWHERE]
    low, high = BOUNDS.minimum(a), BOUNDS.maximum(a)
    assert low is None or low <= min(values)
    assert high is None or high >= max(values)
    low, high = BOUNDS.interval(a)
    assert low is None or low <= min(values)
    assert high is None or high >= max(values)
    if BOUNDS.nonnegative(a):
        assert min(values) >= 0


@given(indices(2), indices(2))
def test_proofs_are_true(a: Index, b: Index) -> None:
    if BOUNDS.in_range(a, b):
        assert all(0 <= a.evaluate(v) < b.evaluate(v) for v in EVERYWHERE)
    if BOUNDS.equal(a, b):
        assert all(a.evaluate(v) == b.evaluate(v) for v in SOME)


@given(indices(3), st.dictionaries(st.sampled_from(NAMES), indices(1), max_size=3))
def test_substitution_is_composition(a: Index, values: dict[str, Index]) -> None:
    # a divisor must stay positive
    out = None
    for v in SOME:
        inner = {n: values[n].evaluate(v) if n in values else v[n] for n in NAMES}
        assume(all(inner[n] > 0 for n in ("s", "t")))
        out = a.substitute(values) if out is None else out
        assert out.evaluate(v) == a.evaluate(inner)


@given(indices(3))
def test_text_json_and_sympy_round_trip(a: Index) -> None:
    assert parse_index(str(a)) == a
    back = from_sympy(a.to_sympy())
    data = json.loads(json.dumps(a.to_json()))
    for v in SOME[::10]:
        assert back is None or back.evaluate(v) == a.evaluate(v)
        assert evaluate_json(data, v) == a.evaluate(v)


def evaluate_json(data: object, v: dict[str, int]) -> int:
    if isinstance(data, int):
        return data
    if isinstance(data, str):
        return v[data]
    op, *args = data  # type: ignore[misc]
    values = [evaluate_json(x, v) for x in args]
    return sum(values) if op == "+" else math.prod(values) if op == "*" else values[0] // values[1] if op == "//" else values[0] % values[1]


@given(indices(3))
def test_coefficient_splits(a: Index) -> None:
    factor = a.coefficient("k")
    if factor is not None:
        rest = a.substitute({"k": ZERO})
        assert "k" not in factor.names()
        for v in SOME[::5]:
            assert factor.evaluate(v) * v["k"] + rest.evaluate(v) == a.evaluate(v)


SHAPES = st.lists(st.sampled_from([Index.of(1), Index.of(3), Index.of(4), Index.of("s"), Index.of("t")]), min_size=1, max_size=4).map(tuple)


@given(SHAPES)
def test_unflatten_undoes_flatten(shape: tuple[Index, ...]) -> None:
    axes = {f"a{k}": n for k, n in enumerate(shape)}
    bounds = Bounds(SYMBOLS, axes)
    position = tuple(ZERO if n == ONE else Index.of(f"a{k}") for k, n in enumerate(shape))
    offset = flatten(position, contiguous_strides(shape))
    found = unflatten(offset, shape, bounds)
    assert found == position  # proved without evaluating: the very axes come back


@given(SHAPES)
def test_unflatten_of_one_flat_axis(shape: tuple[Index, ...]) -> None:
    total = math.prod(shape, start=ONE)
    found = unflatten(Index.of("f"), shape, Bounds(SYMBOLS, {"f": total}))
    for s, t in itertools.product((1, 4), (2, 3)):
        v = {"s": s, "t": t}
        sizes = [n.evaluate(v) for n in shape]
        points = list(itertools.product(*map(range, sizes)))
        assert [tuple(i.evaluate({**v, "f": f}) for i in found) for f in range(len(points))] == points


@pytest.mark.parametrize(
    ("value", "extent", "axes"),
    [
        ("f // s", "t", {"f": "s*t"}),
        ("f // (4*s)", "t", {"f": "4*s*t"}),
        ("f // s % t", "t", {"f": "s*t*7"}),
        ("s*i + j", "s*t", {"i": "t", "j": "s"}),
        ("(f % s)*64 + r // 64", "64*s", {"f": "s*t", "r": "4096"}),
        ("s - 1 - i", "s", {"i": "s"}),
    ],
)
def test_ranges_that_must_be_proved(value: str, extent: str, axes: dict[str, str]) -> None:
    bounds = Bounds({"s": (1, 4096), "t": (1, 64)}, {n: parse_index(e) for n, e in axes.items()})
    assert bounds.in_range(parse_index(value), parse_index(extent))


@pytest.mark.parametrize("text", ["", "a +", "(a", "a b", "a // 0", "a % (0)", "a // (0 - 2)", "1.5", "a ** b", "$", "a)"])
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(IRError):
        parse_index(text)
