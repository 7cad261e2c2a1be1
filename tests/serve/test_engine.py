"""The real engine of vLLM, from recording to a strict second start; the reference is its own eager mode in the same process layout.

Needs the extra `vllm`; run with `-m "vllm and not full"`, or without `not full` for all architectures (docs/serving.md, "Tests").
Eight prompts of mixed length in one batch, 48 greedy tokens, chunked prefill and prefix caching on, fp32; images where the model sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flagtree.artifact.bundle import open_bundle
from tests.serve.architectures import ARCHITECTURES
from tests.serve.bed import MODE, PLAIN, QUIET, Bed, unlike
from tests.serve.fused import Fused, fused

pytestmark = pytest.mark.vllm
PLAIN_RUN = ("qwen3", "qwen3_moe")
KINDS = [kind if kind in PLAIN_RUN else pytest.param(kind, marks=pytest.mark.full) for kind in ARCHITECTURES]


@pytest.fixture(scope="module", params=KINDS)
def bed(request: pytest.FixtureRequest, beds: Callable[..., Bed]) -> Bed:
    return beds(request.param)


def lenient(bed: Bed) -> Any:
    """Eager, single operators in eager mode, and a start that records and builds what it misses: in one process."""
    operators = {"enforce_eager": True, "additional_config": {"flagtree": {"custom_ops": True}}}
    runs = {"eager": PLAIN, "operators": operators, "off": bed.lenient()}
    return bed.process("lenient", {name: {"arguments": arguments} for name, arguments in runs.items()}, **QUIET)


def first(bed: Bed) -> Any:
    lenient(bed)
    return bed.process("first", {"strict": {"arguments": bed.strict("serve")}})


def second(bed: Bed) -> Any:
    first(bed)
    none = bed.folder / "none"
    none.touch()
    try:
        return bed.process("second", {"strict": {"arguments": bed.strict("serve")}}, FLAGTREE_CXX=str(none), VLLM_FORCE_AOT_LOAD="1")
    finally:
        none.unlink()


def test_a_lenient_start_records_builds_and_equals_eager(bed: Bed) -> None:
    records = lenient(bed)
    assert not unlike(records["off"], records["eager"])
    counts = records["off"]["reports"][0]["flagtree"]
    assert counts["missing"] and counts["graphs_compiled"] == counts["graphs_missing"]


def test_single_operators_answer_in_eager_mode(bed: Bed) -> None:
    records = lenient(bed)
    assert not unlike(records["operators"], records["eager"])
    assert {"RMSNorm", "RotaryEmbedding"} & records["operators"]["reports"][0]["flagtree"]["operators"].keys()


def test_a_strict_start_compiles_nothing(bed: Bed) -> None:
    record = first(bed)
    assert not unlike(record["strict"], lenient(bed)["eager"])
    (report,) = record["strict"]["reports"]
    assert record["compilers"] == 0
    assert report["dynamo"]["stats"]["unique_graphs"] == 1
    assert report["compiler_imported"] == []
    assert report["inductor_kernels"] == 0
    counts = report["flagtree"]
    assert (counts["graphs_found"], counts["graphs_missing"], counts["graphs_compiled"]) == (1, 0, 0)


def test_the_second_start_traces_nothing_even_without_a_compiler(bed: Bed) -> None:
    record = second(bed)
    assert not unlike(record["strict"], lenient(bed)["eager"])
    (report,) = record["strict"]["reports"]
    assert record["compilers"] == 0
    assert report["dynamo"] == {}
    assert report["compiler_imported"] == []
    assert report["inductor_kernels"] == 0
    assert report["vllm"]["num_aot_artifacts_loaded"] == 1
    assert report["flagtree"]["loaded_warm"] == 1


# -- what is generated -----------------------------------------------------------------------------------------------------
def generated(bed: Bed) -> Fused:
    lenient(bed)
    (graph,) = bed.graphs()[-1:]
    return fused(graph, open_bundle(bed.bundle()))


def test_nearly_all_of_the_decoder_lies_in_generated_kernels(bed: Bed) -> None:
    found = generated(bed)
    assert found.share >= 0.95, found.left


def test_what_belongs_together_is_one_kernel(bed: Bed) -> None:
    found = generated(bed)
    layers = 2
    normed = [k for k in found.having("rsqrt", "add") if sum(op.startswith("aten.add.") for op in k.ops) >= 2 and not found_turn(k.ops)]
    assert sum(k.launches for k in normed) >= 2 * layers, "residual and norm"
    for kernel in found.having("silu"):
        assert any(op.startswith("aten.mul.") for op in kernel.ops), "SiLU and multiply"


def test_heads_are_normed_and_turned_in_one_kernel(bed: Bed) -> None:
    norms, found = ARCHITECTURES[bed.kind].norms, generated(bed)
    turning = found.having("cat", "sub")
    assert sum(k.launches for k in turning) >= 2
    assert all(k in found.having("rsqrt") for k in turning) or not norms


def found_turn(ops: tuple[str, ...]) -> bool:
    """Is it a norm of heads, and no residual?"""
    return any(op.startswith("aten.cat.") for op in ops)


# -- refused ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "bfloat16"}, "another element type"),
        ({"compilation_config": {**MODE, "backend": "flagtree"}}, "flagtree.serve.bundles.d_"),
    ],
)
def test_bad_input_stops_before_weights_are_loaded(beds: Callable[..., Bed], change: dict[str, Any], says: str) -> None:
    bed = beds("qwen3")
    lenient(bed)
    done = bed.start("refused", {"strict": {"arguments": {**bed.strict("start"), **change}}})
    assert done.returncode != 0
    assert says in done.stderr
    assert "Loading safetensors" not in done.stderr
