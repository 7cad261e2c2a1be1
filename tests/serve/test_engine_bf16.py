"""The real engine in bf16, teacher-forced on the tokens of eager: as near to it as eager is to itself with another number of threads.

The bound is the larger of 0.05 and the difference between two plain runs, with one and two threads (on two ranks, each of one thread,
0.05).  A token may differ only where eager's first two choices lie closer.  A decoder without experts has eager's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.architectures import ARCHITECTURES
from tests.serve.bed import PLAIN, QUIET, Bed, furthest
from tests.serve.test_engine import KINDS
from tests.serve.test_engine_parallel import THREADS

pytestmark = pytest.mark.vllm
LEAST = 0.05

TWO_RANKS = [pytest.param(f"{kind} on 2 ranks", marks=pytest.mark.full) for kind in ARCHITECTURES]
ROUTED = ("qwen3_moe", "minimax_m2", "step3_text", "step3_vl")  # softmax and sigmoid of f32 have other bits, within their error


@pytest.fixture(scope="module", params=[*KINDS, *TWO_RANKS])
def records(request: pytest.FixtureRequest, beds: Callable[..., Bed]) -> Any:
    """Eager as reference and flagtree, in one process; beside one rank eager with another number of threads."""
    kind, _, ranks = request.param.partition(" on ")
    bed = beds(kind, "two_bf16", dtype="bfloat16", tensor_parallel_size=2) if ranks else beds(kind, "bf16", dtype="bfloat16")
    runs = {"plain": {"arguments": PLAIN, "threads": 2}, "ours": {"arguments": bed.lenient(), "threads": 2, "taught_by": "plain"}}
    if ranks:
        return {"kind": kind, **bed.process("bf16", runs, **QUIET, **THREADS)}
    other = {"arguments": PLAIN, "threads": 1, "taught_by": "plain"}
    return {"kind": kind, **bed.process("bf16", {**runs, "other": other}, **QUIET)}


def bound(records: Any) -> float:
    """Of a log-probability's difference."""
    if records["kind"] not in ROUTED:
        return 0.0
    return max(LEAST, furthest(records["other"]["taught"], records["plain"]["taught"])) if "other" in records else LEAST


def test_log_probabilities_are_as_near_as_eager_is_to_itself(records: Any) -> None:
    assert all(report["flagtree"]["graphs_found"] == 1 for report in records["ours"]["reports"])
    assert furthest(records["ours"]["taught"], records["plain"]["taught"]) <= bound(records)


def test_a_token_differs_only_where_two_were_as_likely(records: Any) -> None:
    want = records["plain"]
    for have, ids, margins in zip(records["ours"]["ids"], want["ids"], want["margins"], strict=True):
        first = next((k for k, (a, b) in enumerate(zip(have, ids, strict=True)) if a != b), None)
        assert first is None or margins[first] <= bound(records)
