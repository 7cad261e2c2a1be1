"""The certificate of a small model: every kernel of its parts is executed and compared with the captured graph run by PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flagtree.artifact.store import Store
from flagtree.assemble import GeneratedPart, generate_part
from flagtree.capture.model_spec import ModelSpec
from flagtree.capture.parts import capture_part
from flagtree.check.certify import WrongKernel
from flagtree.check.evidence import Gathered, gather
from flagtree.ir.attention import form_of
from flagtree.progress import SILENT
from flagtree.runtime.cpu import levels
from flagtree.targets import find_target
from flagtree.targets.base import Target
from flagtree.toolchain import emulator
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.build import build_kernels
from tests.check.test_eager import CONFIG, PARTS


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    config = {**CONFIG, "num_hidden_layers": 4}
    fields = {"name": "small", "architecture": "Qwen3ForCausalLM", "dtype": "bfloat16", "config": config, "parts": PARTS}
    return ModelSpec.model_validate({**fields, "capture": {"layers": 4}})


def generated(spec: ModelSpec, target: Target) -> tuple[dict[str, GeneratedPart], dict[str, BuiltKernel]]:
    parts = {"decode": generate_part(capture_part(spec, "decode"), target)}
    distinct = {d: alone.program for part in parts.values() for alone, d in part.kernels.values()}
    return parts, {b.digest: b for b in build_kernels(list(distinct.items()), target, 2)}


def check(found: Gathered, kernels: int, way: str) -> None:
    records = found.content["kernels"]
    assert isinstance(records, dict) and len(records) == kernels >= 6
    assert found.executed[way] == kernels
    for record in records.values():
        assert (record["verdict"], record["eager"]) == ("pass", "compared")
        least = 0.5 if record["ops"] == ["flagtree.attend.default"] else 0.98  # attention rounds at other places than eager
        for run in record["runs"]:
            shares = [output.get("equal_to_eager") for output in run["outputs"].values()]
            assert "upper_end" in run["inputs"] or all(share > least for share in shares), (record["ops"], shares)


def test_every_kernel_of_the_model_is_compared_with_eager(spec: ModelSpec) -> None:
    target = replace(find_target("cpu"), levels=levels())
    parts, built = generated(spec, target)
    check(gather(parts, built, target, 1, SILENT, Store()), len(built), f"native {levels()[0]}")


def test_kernels_that_changed_places_stop_the_bundle(spec: ModelSpec) -> None:
    """The code of one norm under the digest of another: what a wrong store would hand out."""
    target = replace(find_target("cpu"), levels=levels()[:1])
    parts, built = generated(spec, target)
    isolated = {d: alone.program for alone, d in parts["decode"].kernels.values()}
    gates = {d: p for d, p in isolated.items() if form_of(p) is None}
    victim = next(d for d, p in gates.items() if any(getattr(op, "op", "") == "exp" for op in p.steps[0].body))  # type: ignore[union-attr]
    body = isolated[victim].steps[0].body  # type: ignore[union-attr]
    changed = tuple(replace(op, op="exp2") if getattr(op, "op", "") == "exp" else op for op in body)
    wrong = isolated[victim].with_(steps=(replace(isolated[victim].steps[0], body=changed),))
    (built[victim],) = build_kernels([(victim, wrong)], target, 1, store=Store(Store().root.parent / "wrong"))
    with pytest.raises(WrongKernel, match="aten.silu"):
        gather(parts, built, target, 1, SILENT, Store())


@pytest.mark.skipif(bool(emulator.missing()), reason="the emulator does not run here")
def test_a_chip_that_is_not_here(spec: ModelSpec) -> None:
    target = find_target("cuda:sm90")
    parts = {"decode": generate_part(capture_part(spec, "decode"), target)}
    built = {d: BuiltKernel(d, "source", "", {}, {}) for _, d in parts["decode"].kernels.values()}
    found = gather(parts, built, target, 1, SILENT, Store())
    check(found, len(built), "same TTIR through MACA lowering; ptx/hsaco not executed")
