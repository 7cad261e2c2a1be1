"""A right kernel gets a certificate; the same kernel with one thing wrong never does, and the error names it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from flagtree.artifact.certificate import Certificate, decode
from flagtree.check.certify import LONG, SHORT, Eager, Evidence, Subject, WrongKernel, certify, runs_of
from flagtree.check.recipe import NoEager
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.program import Kernel, Origin
from flagtree.ir.text import parse_program
from flagtree.passes.tiling import scheduled
from flagtree.runtime.cpu import levels
from flagtree.targets import find_target
from flagtree.toolchain import cxx, emulator
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.build import toolchain_of

NORM = """program norm
  symbol s0 in 2..64 from dim x 0
  symbol s1 in 2..4096 from dim x 1
  buffer x: bf16[s0, s1, 64] input
  buffer w: bf16[64] weight
  buffer y: bf16[s0, s1, 64] temp
  kernel norm {i0 < s0, i1 < s1} reduce {r0 < 64} numerics(eager, contract=off, acc=f32)
    ops "aten.pow.Tensor_Scalar" "aten.mean.dim"
    v0: bf16 = load x[i0, i1, r0]
    v1: f32 = cast v0
    v2: f32 = mul v1, v1
    v3: f32 = sum v2 over r0
    v4: f32 = div v3, 64.0
    v5: f32 = add v4, 1e-06
    v6: f32 = rsqrt v5
    v7: f32 = mul v1, v6
    v8: bf16 = cast v7
    v9: f32 = cast v8
    v10: bf16 = load w[r0]
    v11: f32 = cast v10
    v12: f32 = mul v9, v11
    v13: bf16 = cast v12
    store y[i0, i1, r0] = v13
  outputs y
"""
PAD = """program pad
  symbol s0 in 2..64 from dim x 0
  buffer x: f32[s0, 12] input
  buffer y: f32[s0, 20] temp
  kernel pad {i0 < s0, i1 < 20} numerics(eager, contract=off, acc=f32)
    ops "aten.constant_pad_nd.default"
    v0: i64 = index i1 - 3
    v1: b1 = ge v0, 0
    v2: b1 = lt v0, 12
    v3: b1 = and v1, v2
    v4: f32 = load x[i0, i1 - 3] if v3 else 0.5
    store y[i0, i1] = v4
  outputs y
"""
ROWS = """program rows
  symbol s0 in 2..64 from dim k 0
  symbol s1 in 2..64 from dim k 1
  symbol s2 in 2..64 from dim cache 1
  buffer start: i64[s0] input
  buffer k: bf16[s0, s1, 8] input
  buffer cache: bf16[s0, s2, 8] state
  kernel rows {i0 < s0, i1 < s1, i2 < 8} numerics(eager, contract=off, acc=f32)
    ops "flagtree.attention.default"
    v0: i64 = load start[i0]
    v1: i64 = index i1
    v2: i64 = add v0, v1
    v3: b1 = ge v2, 0
    v4: i64 = index s2
    v5: b1 = lt v2, v4
    v6: b1 = and v3, v5
    v7: bf16 = load k[i0, i1, i2]
    store cache[i0, v2, i2] = v7 if v6
  outputs cache
"""
COUNT = """program count
  symbol s0 in 2..64 from dim x 0
  buffer x: i64[s0, 8] input
  buffer y: i64[s0] temp
  kernel count {i0 < s0} reduce {r0 < 8} numerics(eager, contract=off, acc=f32)
    ops "aten.sum.dim_IntList"
    v0: i64 = load x[i0, r0]
    v1: i64 = mul v0, 3
    v2: i64 = sum v1 over r0
    store y[i0] = v2
  outputs y
"""
ADDED = """program added
  symbol s0 in 2..64 from dim x 0
  buffer at: i64[s0] input
  buffer x: f32[s0, 8] input
  buffer y: f32[5, 8] state
  kernel added {i0 < s0, i1 < 8} numerics(eager, contract=off, acc=f32)
    ops "aten.embedding_dense_backward.default"
    v0: i64 = load at[i0]
    v1: f32 = load x[i0, i1]
    v2: f32 = mul v1, 0.1
    store.add y[v0, i1] = v2
  outputs y
"""
TRANSPOSE = """program transpose
  buffer x: f32[6, 6] input
  buffer y: f32[6, 6] temp
  kernel transpose {i0 < 6, i1 < 6} numerics(eager, contract=off, acc=f32)
    ops "aten.clone.default"
    v0: f32 = load x[i1, i0]
    store y[i0, i1] = v0
  outputs y
"""


def norm(tensors: dict[str, torch.Tensor], symbols: dict[str, int]) -> dict[str, torch.Tensor]:
    wide = tensors["b0"].float()
    return {"b2": (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16() * tensors["b1"]}


def pad(tensors: dict[str, torch.Tensor], symbols: dict[str, int]) -> dict[str, torch.Tensor]:
    return {"b1": torch.nn.functional.pad(tensors["b0"], (3, 5), value=0.5)}


def rows(tensors: dict[str, torch.Tensor], symbols: dict[str, int]) -> dict[str, torch.Tensor]:
    start, k, cache = tensors["b0"].tolist(), tensors["b1"], tensors["b2"].clone()
    for b, first in enumerate(start):
        assert 0 <= first <= cache.shape[1] - k.shape[1]
        cache[b, first : first + k.shape[1]] = k[b]
    return {"b2": cache}


RIGHT: dict[str, tuple[str, Eager | None]] = {
    "norm": (NORM, norm),
    "pad": (PAD, pad),
    "rows": (ROWS, rows),
    "count": (COUNT, lambda t, s: {"b1": (t["b0"] * 3).sum(-1)}),
    "added": (ADDED, lambda t, s: {"b2": t["b2"].index_add(0, t["b0"], t["b1"] * 0.1)}),
    "transpose": (TRANSPOSE, lambda t, s: {"b1": t["b0"].t().contiguous()}),
}
# what is wrong -> (kernel, text to replace, replacement)
WRONG = {
    "no rounding before the weight": ("norm", "    v8: bf16 = cast v7\n    v9: f32 = cast v8\n", "    v9: f32 = mul v7, 1.0\n"),
    "a rounding too many": ("norm", "v7: f32 = mul v1, v6", "t: bf16 = cast v6\n    u: f32 = cast t\n    v7: f32 = mul v1, u"),
    "ten times the epsilon": ("norm", "1e-06", "1e-05"),
    "a wrong mean": ("norm", "div v3, 64.0", "div v3, 63.0"),
    "no mask": ("pad", "load x[i0, i1 - 3] if v3 else 0.5", "load x[i0, i1 - 3]"),
    "half a mask": ("pad", "if v3 else", "if v1 else"),
    "another value outside": ("pad", "else 0.5", "else 0.0"),
    "cache row one too far": ("rows", "v1: i64 = index i1", "v1: i64 = index i1 + 1"),
    "an integer constant": ("count", "mul v0, 3", "mul v0, 2"),
    "another factor of what is added": ("added", "mul v1, 0.1", "mul v1, 0.10001"),
    "swapped indices": ("transpose", "load x[i1, i0]", "load x[i0, i1]"),
}


def subject(text: str, eager: Eager | None, built_from: str | None = None, target_name: str = "cpu") -> Subject:
    """The kernel of a text; `built_from`: the text that is built under its digest, which is how a wrong compiler looks."""
    program = parse_program(text)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    kernel = replace(kernel, origins=(Origin("n", "model.layers.0.input_layernorm", "modeling.py:60"),))
    alone = isolate(program, kernel)
    if find_target(target_name).warp > 1:
        alone = replace(alone, program=scheduled(alone.program, find_target(target_name)))
    key = digest(alone.program)
    other = parse_program(built_from or text)
    return Subject(key, alone, kernel, build(key, other, target_name), eager)


def build(key: str, program: object, target_name: str) -> BuiltKernel:
    target = find_target(target_name)
    if target.levels:
        target = replace(target, levels=levels())
    alone = isolate(program, program.steps[0])  # type: ignore[attr-defined]
    program = scheduled(alone.program, target) if target.warp > 1 else alone.program
    (built,) = toolchain_of(target).build([(key, program)], target, 1)  # type: ignore[call-arg]
    return built


@pytest.fixture(scope="module")
def right() -> dict[str, Subject]:
    return {name: subject(text, eager) for name, (text, eager) in RIGHT.items()}


def test_right_kernels_pass_at_every_level_of_this_cpu(right: dict[str, Subject]) -> None:
    evidence = certify(list(right.values()), find_target("cpu"))
    assert evidence.executed == {f"native {level}": len(right) for level in levels()}
    for one in right.values():
        record = evidence.kernels[one.digest]
        assert (record["verdict"], record["eager"]) == ("pass", "compared")
        first, second, *_ = record["runs"]
        assert [r["inputs"]["kind"] for r in (first, second)] == ["ordinary", "ordinary, small"]
        assert first["inputs"]["seed"] != second["inputs"]["seed"]
    found = evidence.kernels[right["norm"].digest]["runs"][0]["outputs"]["b2"]
    assert found["equal_to_interpreter"] > 0.99
    assert 0 < found["rms"] <= 4 * found["rms_eager"] + 1e-6 * found["mean_magnitude"]
    assert 0.25 < found["mean_ulp"] < 1 <= found["max_ulp"] < 4
    assert evidence.kernels[right["added"].digest]["runs"][1]["outputs"]["b2"]["gate"] == "stated error"


def test_the_evidence_is_deterministic_json_that_a_certificate_carries(right: dict[str, Subject]) -> None:
    def text(evidence: Evidence) -> str:
        return json.dumps(evidence.to_dict(), sort_keys=True, allow_nan=False)

    target = find_target("cpu")
    once = certify(list(right.values()), target)
    torch.manual_seed(5)
    assert text(once) == text(certify(list(reversed(right.values())), target))
    data = Certificate("d" * 64, once.to_dict()).encode()
    assert decode(data, "d" * 64).evidence == json.loads(text(once))


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_refused_by_name(what: str) -> None:
    name, old, new = WRONG[what]
    text, eager = RIGHT[name]
    assert old in text
    wrong = subject(text, eager, text.replace(old, new))
    with pytest.raises(WrongKernel) as raised:
        certify([wrong], find_target("cpu"))
    assert f"kernel {name} ({wrong.digest[:16]})" in raised.value.where
    assert "model.layers.0.input_layernorm" in raised.value.where
    assert wrong.kernel.ops[0] in raised.value.where
    assert any(c.isdigit() for c in raised.value.why)


def test_a_kernel_that_no_eager_call_computes_says_why() -> None:
    def refuses(tensors: object, symbols: object) -> dict[str, torch.Tensor]:
        raise NoEager("none", why="it draws random numbers")

    with_reason = certify([subject(PAD, refuses)], find_target("cpu"))
    (record,) = with_reason.kernels.values()
    assert record["eager"] == "not compared: it draws random numbers"
    assert "rms_interpreter" in record["runs"][0]["outputs"]["b1"]
    without = certify([subject(PAD, None)], find_target("cpu"))
    assert next(iter(without.kernels.values()))["eager"] == "not compared: there is no captured graph"


def test_a_wrong_eager_result_is_a_wrong_kernel() -> None:
    """The interpreter agrees with the code, PyTorch with neither: a pass or a lowering changed the meaning."""
    with pytest.raises(WrongKernel, match="its meaning is another"):
        certify([subject(PAD, lambda t, s: {"b1": torch.nn.functional.pad(t["b0"], (3, 5), value=0.75)})], find_target("cpu"))


def test_what_cannot_be_executed_is_said() -> None:
    one = subject(PAD, pad)
    assert one.built is not None
    elsewhere = replace(one, built=replace(one.built, files={"kernel.cpp": b"", "aarch64-v9.o": b""}))
    evidence = certify([elsewhere], find_target("cpu"))
    (record,) = evidence.kernels.values()
    assert record["executed"] == [] and "verdict" not in record
    assert "kernel.cpp" in record["not_executed"] and levels()[0] in record["not_executed"]
    (record,) = certify([replace(one, built=None, unbuilt="no g++ here")], find_target("cpu")).kernels.values()
    assert record["not_executed"] == "no g++ here"


def test_levels_that_differ_are_an_error() -> None:
    if len(levels()) < 2:
        pytest.skip("this CPU has one level")
    one, other = subject(PAD, pad), subject(PAD, pad, PAD.replace("else 0.5", "else 0.50001"))
    assert one.built is not None and other.built is not None
    mixed = {**one.built.files, f"{levels()[-1]}.o": other.built.files[f"{levels()[-1]}.o"]}
    with pytest.raises(WrongKernel, match="give different bits"):
        certify([replace(one, built=replace(one.built, files=mixed))], find_target("cpu"))


@pytest.mark.skipif(bool(emulator.missing()), reason="the emulator does not run here")
class TestEmulated:
    def test_a_right_kernel(self) -> None:
        evidence = certify([subject(NORM, norm, target_name="metax")], find_target("metax"))
        assert evidence.executed == {"maca-ir (emulated)": 1}
        assert next(iter(evidence.kernels.values()))["verdict"] == "pass"

    def test_for_another_chip_it_says_what_ran(self) -> None:
        evidence = certify([subject(PAD, pad, target_name="metax")], find_target("cuda:sm90"))
        assert evidence.executed == {"same TTIR through MACA lowering; ptx/hsaco not executed": 1}

    @pytest.mark.parametrize("what", ["no rounding before the weight", "ten times the epsilon", "half a mask", "cache row one too far"])
    def test_a_wrong_kernel(self, what: str) -> None:
        name, old, new = WRONG[what]
        text, eager = RIGHT[name]
        with pytest.raises(WrongKernel, match=f"kernel {name}"):
            certify([subject(text, eager, text.replace(old, new), "metax")], find_target("metax"))


def test_the_compiler_is_named(right: dict[str, Subject]) -> None:
    versions = certify([right["pad"]], find_target("cpu")).versions
    assert versions["c++"] == cxx.find_compiler().version
    assert versions["torch"] == torch.__version__


def test_a_sum_over_millions_has_the_upper_end_of_one_size() -> None:
    """A count over all rows of all sequences: at the joint end of both sizes one element would take 2^24 terms."""
    text = """program isolated
  symbol n0 in 1..256 from argument
  symbol n1 in 1..65536 from argument
  buffer b0: i32[n0*n1] input
  buffer b1: i32[8] temp
  kernel kernel {i0 < 8} reduce {r0 < n0*n1} numerics(eager, contract=off, acc=f32)
    v0: i32 = load b0[r0]
    v1: i32 = index i0
    v2: b1 = le v0, v1
    v3: i32 = cast v2
    v4: i32 = sum v3 over r0
    store b1[i0] = v4
  outputs b1
"""
    program = parse_program(text)
    assert [(run.upper, dict(run.symbols)) for run in runs_of(program, SHORT) if run.upper] == [("n1", {"n0": 1, "n1": 65536})]
    short = parse_program(text.replace("1..65536", "1..4096"))
    assert [run.upper for run in runs_of(short, SHORT) if run.upper] == ["all"]
    assert {run.upper for run in runs_of(program, LONG) if run.upper} == {"all", "n0", "n1"}
