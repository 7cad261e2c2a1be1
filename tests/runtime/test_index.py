"""Index expressions at run time give what `Index.evaluate` gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagtree.errors import BundleError
from flagtree.ir.index import Index
from flagtree.runtime.index import compile_index, evaluate, row_major, same_strides, symbols_of

NAMES = ("s0", "s1", "k")
indices = st.recursive(
    st.integers(0, 40).map(Index.of) | st.sampled_from(NAMES).map(Index.of),
    lambda inner: (
        st.tuples(inner, inner).map(lambda p: p[0] + p[1])
        | st.tuples(inner, inner).map(lambda p: p[0] * p[1])
        | st.tuples(inner, st.integers(1, 9)).map(lambda p: p[0] // p[1])
        | st.tuples(inner, st.integers(1, 9)).map(lambda p: p[0] % p[1])
    ),
    max_leaves=10,
)


@given(indices, st.tuples(*[st.integers(0, 1000)] * 3))
def test_it_is_the_ir_s_value(index: Index, values: tuple[int, ...]) -> None:
    json = index.to_json()
    places = {n: i for i, n in enumerate(NAMES)}
    assert evaluate(compile_index(json, places), values) == index.evaluate(dict(zip(NAMES, values)))
    assert symbols_of(json) == index.names()


@pytest.mark.parametrize(
    "json", [None, True, 1.5, "__import__", [], ["+"], ["+", 1], ["-", 1, 2], ["//", 1, 2, 3], {"a": 1}, ["+", ["x"], 1]]
)
def test_other_forms_are_refused(json: object) -> None:
    with pytest.raises(BundleError):
        compile_index(json, {"s0": 0})


def test_strides() -> None:
    assert row_major((2, 3, 4)) == (12, 4, 1)
    assert row_major(()) == ()
    assert same_strides((1, 3), (7, 1), (3, 1))
    assert same_strides((0, 3), (9, 9), (3, 1))
    assert not same_strides((2, 3), (1, 2), (3, 1))
