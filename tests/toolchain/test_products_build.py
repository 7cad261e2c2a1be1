"""Products of experts and of quantised operands as device code of chips that are not here: both variants, at the last tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagtree.codegen.triton import generate
from flagtree.ir import experts
from flagtree.ir.canonical import digest, isolate_all
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.settings import settings
from flagtree.targets import find_target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.build import toolchain_of
from tests.check.subjects import lowered_function_of
from tests.products import CASES
from tests.toolchain.triton31 import compiled_by_31

SAMPLE = {("cuda:sm90", "e4m3fn in groups"), ("cuda:sm80", "experts"), ("rocm:gfx942", "e4m3fn in groups")}
ALL = [
    pytest.param(target, case, marks=() if (target, case) in SAMPLE else pytest.mark.full)
    for target in ("cuda:sm80", "cuda:sm89", "cuda:sm90", "rocm:gfx942") for case in CASES
]  # fmt: skip


def built(name: str, case: str) -> list[BuiltKernel]:
    target = find_target(name)
    program, _ = run_pipeline(lowered_function_of(*CASES[case], 4096)[1].program, pipeline(target), target)
    alone = [a.program for _, a in isolate_all(program) if experts.known(a.program, a.kernel) is not None]
    return toolchain_of(target).build([(digest(p), p) for p in alone], target, 1)  # type: ignore[call-arg]


@pytest.mark.skipif(settings.triton31_python is None, reason="FLAGTREE_TRITON31_PYTHON names no Python with stock Triton 3.1")
def test_stock_triton_31_compiles_every_kernel_around_a_product(tmp_path: Path) -> None:
    """The gate that stands for MetaX's fork of Triton 3.1: the same text, for cuda:80."""
    target, sources = find_target("cuda:sm80"), {}
    for case in CASES:
        program, _ = run_pipeline(lowered_function_of(*CASES[case], 4096)[1].program, pipeline(target), target)
        sources |= {f"{case}: {k.name}": generate(a.program, digest(a.program), target) for k, a in isolate_all(program)}
    assert len(sources) > 20 and compiled_by_31(sources, tmp_path) == {}


@pytest.mark.parametrize(("name", "case"), ALL)
def test_a_product_reaches_the_last_tier_with_and_without_promises(name: str, case: str) -> None:
    """Where loads are copied asynchronously, the variant without promises is the one stage of the same layouts."""
    kernels = built(name, case)
    assert len(kernels) == (2 if "experts" in case else 1)
    for kernel in kernels:
        assert (kernel.tier, kernel.missing) == ("binary", "")
        assert set(kernel.launch["variants"]) == {"aligned", "generic"}  # type: ignore[call-overload]
        text = (kernel.files.get("aligned.ptx") or kernel.files["aligned.amdgcn"]).decode()
        native = "e4m3" in text
        assert native == ("activations" in case or "groups" in case or "rows of e4m3fn" in case) * (name in ("cuda:sm89", "cuda:sm90"))
        assert "mma" in text or "mfma" in text
