"""What Facts and the verifier prove about accesses, against walking every point of the domain."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagtree.ir.element_rules import determined_axes, disjoint
from flagtree.ir.facts import Facts
from flagtree.ir.index import Index
from flagtree.ir.program import Access, Axis, BodyOp, Compute, IndexValue, Kernel, Program, Symbol
from tests.ir.test_index import AXES, EVERYWHERE, SYMBOLS, indices, positive

PROGRAM = Program("p", tuple(Symbol(n, lo, hi, ("argument",)) for n, (lo, hi) in SYMBOLS.items()), (), (), ())


def facts_of(*body: BodyOp) -> Facts:
    return Facts.of(PROGRAM, Kernel("k", tuple(Axis(n, e) for n, e in AXES.items()), tuple(body)))


@st.composite
def splits(draw: st.DrawFn) -> tuple[Index, ...]:
    """Indices as passes make them: an axis or a mix of axes, split by // and % several times."""
    flat = draw(st.sampled_from(["i", "j", "k"]))
    whole = draw(st.sampled_from([Index.of(flat), Index.of("i") * 5 + "k", Index.of("j") * 5 + "k", Index.of("k") * "s" + "i"]))
    d, e = draw(positive()), draw(positive())
    return draw(
        st.sampled_from([(whole,), (whole // d, whole % d), (whole // (d * e), whole // e % d, whole % e), (whole // d, Index.of("k"))])
    )


@given(st.one_of(splits(), st.lists(indices(2), min_size=1, max_size=3).map(tuple)))
def test_determined_axes_follow_from_the_element(index: tuple[Index, ...]) -> None:
    determined = sorted(determined_axes(facts_of(), Access("x", index)))
    owner: dict[tuple, tuple] = {}
    for v in EVERYWHERE:
        element = (v["s"], v["t"], *(i.evaluate(v) for i in index))
        position = tuple(v[a] for a in determined)
        assert owner.setdefault(element, position) == position


def test_splits_are_seen_through() -> None:
    j = Index.of("j")
    assert determined_axes(facts_of(), Access("x", (j // 6, j // 2 % 3, j % 2))) == {"j"}
    assert determined_axes(facts_of(), Access("x", (j // 6, j % 6 // 2, j % 2))) == {"j"}
    assert determined_axes(facts_of(), Access("x", (j // 6, j % 2))) == frozenset()


RELATIONS = ["lt", "le", "gt", "ge", "eq", "ne"]
HOLDS = {"lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__, "eq": int.__eq__, "ne": int.__ne__}


def masked(relation: str, a: Index, b: Index, negated: bool) -> tuple[BodyOp, ...]:
    mask = Compute("m", "b1", relation, ("a", "b"))
    return (IndexValue("a", "i64", a), IndexValue("b", "i64", b), mask, *((Compute("n", "b1", "not", ("m",)),) if negated else ()))


@given(st.sampled_from(RELATIONS), indices(1), indices(1), st.booleans(), indices(1), indices(1))
def test_masked_ranges_hold_where_the_mask_holds(relation: str, a: Index, b: Index, negated: bool, index: Index, extent: Index) -> None:
    facts = facts_of(*masked(relation, a, b, negated))
    mask = "n" if negated else "m"
    assumed = facts.constraints(mask)
    proved = facts.in_range(index, extent, mask)
    for v in EVERYWHERE:
        if HOLDS[relation](a.evaluate(v), b.evaluate(v)) != negated:
            assert all(c.evaluate(v) >= 0 for c in assumed)
            if proved:
                assert 0 <= index.evaluate(v) < extent.evaluate(v)


@given(indices(1), indices(1), indices(1), indices(1))
def test_disjoint_accesses_never_meet(a: Index, b: Index, c: Index, d: Index) -> None:
    facts = facts_of()
    if disjoint(facts, Access("x", (a, c)), Access("x", (b, d))):
        for s, t in itertools.product(range(1, 5), (2, 3)):
            points = [v for v in EVERYWHERE if (v["s"], v["t"]) == (s, t)]
            first = {(a.evaluate(v), c.evaluate(v)) for v in points}
            assert first.isdisjoint({(b.evaluate(v), d.evaluate(v)) for v in points})


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Compute("z", "i64", "add", ("a", 3)), "i + 3"),
        (Compute("z", "i64", "sub", (3, "a")), "-i + 3"),
        (Compute("z", "i64", "mul", ("a", "a")), "i*i"),
        (Compute("z", "i32", "cast", ("a",)), "i"),
        (Compute("z", "i64", "floordiv", ("a", 2)), "z"),
    ],
)
def test_integers_are_read_through(op: Compute, expected: str) -> None:
    facts = facts_of(IndexValue("a", "i64", Index.of("i")), op)
    assert str(facts.integer("z")) == expected
    assert facts.axes["z"] == {"i"}
