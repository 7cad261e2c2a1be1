"""Products of quantised activations and weights in a certificate: every kernel around them executed and compared with the definition."""

from __future__ import annotations

import pytest

from flagtree.check import examine as examining
from flagtree.check.certify import LONG, SHORT, examine
from flagtree.ir import experts
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets import find_target
from flagtree.toolchain import emulator
from tests.check.subjects import lowered_function_of, subjects_of
from tests.products import CASES

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing() or "the emulator runs")
METAX = find_target("metax")


@pytest.mark.parametrize("case", CASES)
def test_every_kernel_is_executed_and_is_eagers(case: str) -> None:
    for record in examine(subjects_of(*CASES[case], METAX, 64), METAX, form=SHORT).kernels.values():
        assert (record["verdict"], record["eager"]) == ("pass", "compared"), record


@pytest.mark.parametrize("case", ["e4m3fn in groups", "int8", pytest.param("experts, activations of e4m3fn", marks=pytest.mark.full)])
def test_a_product_too_large_to_fill_is_executed_tile_by_tile(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "WHOLE", 0)
    found = [s for s in subjects_of(*CASES[case], METAX, 64) if experts.known(s.isolated.program, s.isolated.kernel) is not None]
    for record in examine(found, METAX, form=LONG).kernels.values():
        assert (record["verdict"], record["eager"]) == ("pass", "compared"), record
        outputs = [out for run in record["runs"] for out in run["outputs"].values()]  # type: ignore[attr-defined]
        assert len(outputs) > 16 and all(out["elements_with_eager"] == out["elements"] for out in outputs)


def test_quantisations_fuse_and_products_are_kernels() -> None:
    """Route, quantise, sort, up, gate with quantise, down, sum; and a linear layer behind its quantisation."""
    for case, kernels, calls in (("experts, activations of e4m3fn", 7, 3), ("e4m3fn in groups", 2, 1), ("int8", 2, 1)):
        lowered = lowered_function_of(*CASES[case], 64)[1].program
        for name, left in (("metax", 0), ("cpu", calls - (calls == 3))):
            target = find_target(name)
            program, _ = run_pipeline(lowered, pipeline(target), target)
            assert (len(program.steps), sum(type(s).__name__ == "Extern" for s in program.steps)) == (kernels, left), (case, name)
