"""The real engine with tensor parallel 2, two worker processes: one bundle serves both ranks, and the tokens are those of eager.

The reference is eager in the same layout, since a sum over ranks has another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.bed import PLAIN, QUIET, Bed, unlike
from tests.serve.test_engine import KINDS

pytestmark = pytest.mark.vllm
THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # a core a rank: vLLM's own choice refuses one node of memory for two ranks


@pytest.fixture(scope="module", params=KINDS)
def bed(request: pytest.FixtureRequest, beds: Callable[..., Bed]) -> Bed:
    return beds(request.param, "two", tensor_parallel_size=2)


def lenient(bed: Bed) -> Any:
    runs = {"eager": {"arguments": PLAIN}, "off": {"arguments": bed.lenient()}}
    return bed.process("lenient", runs, **QUIET, **THREADS)


def test_two_ranks_equal_eager(bed: Bed) -> None:
    records = lenient(bed)
    assert not unlike(records["off"], records["eager"])
    assert len({graph.key for graph in bed.graphs()}) == 1, "ranks have one capture key"


def test_one_bundle_serves_both_ranks(bed: Bed) -> None:
    eager = lenient(bed)["eager"]
    record = bed.process("first", {"strict": {"arguments": bed.strict("serve")}}, **THREADS)
    assert not unlike(record["strict"], eager)
    assert record["compilers"] == 0
    assert [report["rank"] for report in record["strict"]["reports"]] == [0, 1]
    for report in record["strict"]["reports"]:
        counts = report["flagtree"]
        assert (counts["graphs_found"], counts["graphs_missing"], counts["graphs_compiled"]) == (1, 0, 0)
        assert report["compiler_imported"] == []
        assert report["inductor_kernels"] == 0
