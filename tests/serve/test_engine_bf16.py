"""The real engine in bf16, teacher-forced on the tokens of eager: as near to it as eager is to itself with another number of threads.

The bound is the larger of 0.05 and the difference between two plain runs with one and two threads; a token may differ only where
eager's first two choices lie closer than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.bed import PLAIN, QUIET, Bed, furthest
from tests.serve.test_engine import KINDS

pytestmark = pytest.mark.vllm
LEAST = 0.05


@pytest.fixture(scope="module", params=KINDS)
def records(request: pytest.FixtureRequest, beds: Callable[..., Bed]) -> Any:
    """Eager with two threads, with one, and flagtree with two: in one process."""
    bed = beds(request.param, "bf16", dtype="bfloat16")
    taught = {"taught_by": "two"}
    runs = {"two": {"arguments": PLAIN, "threads": 2}, "one": {"arguments": PLAIN, "threads": 1, **taught},
            "ours": {"arguments": bed.lenient(), "threads": 2, **taught}}  # fmt: skip
    return bed.process("bf16", runs, **QUIET)


def bound(records: Any) -> float:
    return max(LEAST, furthest(records["one"]["taught"], records["two"]["taught"]))


def test_log_probabilities_are_as_near_as_eager_is_to_itself(records: Any) -> None:
    assert records["ours"]["reports"][0]["flagtree"]["graphs_found"] == 1
    assert furthest(records["ours"]["taught"], records["two"]["taught"]) <= bound(records)


def test_a_token_differs_only_where_two_were_as_likely(records: Any) -> None:
    want = records["two"]
    for have, ids, margins in zip(records["ours"]["ids"], want["ids"], want["margins"], strict=True):
        first = next((k for k, (a, b) in enumerate(zip(have, ids, strict=True)) if a != b), None)
        assert first is None or margins[first] <= bound(records)
