"""Attention on the CPU: every level gives the same bits, as good as eager's, and touches nothing beyond its operands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flagtree.codegen import cpp
from flagtree.errors import CodegenError
from flagtree.ir.attention import CACHED, FULL, PACKED, Form
from flagtree.ir.canonical import Isolated, isolate
from flagtree.ir.text import print_program
from tests.attention_programs import Call, Case, assert_as_good_as_eager, make
from tests.codegen.cpp_runner import run

CASES = {
    "decode": (Case(Form(CACHED, 0.09), heads=(8, 2), widths=(128, 128), tokens=1), [0, 133], 1, 134),
    "decode in fp32": (Case(Form(CACHED, 0.09), "f32", heads=(6, 2), widths=(64, 96), tokens=1), [70, 2], 1, 71),
    "shared key head, 256 wide": (Case(Form(CACHED, 0.06), heads=(64, 1), widths=(256, 256), tokens=1), [40], 1, 41),
    "prefill": (Case(Form(CACHED, 0.1), "f32", heads=(4, 2), widths=(64, 64)), [0, 90], 37, 127),
    "sliding window": (Case(Form(CACHED, 0.1, window=9), heads=(2, 1), widths=(64, 64)), [0, 70], 40, 110),
    "some keys, 72 wide": (Case(Form(FULL, 0.1, limited=True), "f32", heads=(2, 2), widths=(72, 72)), [70, 0], 18, 80),
    "some keys, 72 wide, bf16": (Case(Form(FULL, 0.1, limited=True), heads=(2, 2), widths=(72, 40)), [70, 0], 18, 80),
    "all keys": (Case(Form(FULL, 0.1), "f32", heads=(2, 2), widths=(112, 112)), [0], 9, 50),
    "up to its own": (Case(Form(FULL, 0.1, causal=True), "f32", heads=(4, 2), widths=(8, 24)), [0, 0], 70, 67),
    "under a mask": (Case(Form(FULL, 0.1, mask="seen"), "f32", heads=(2, 2), widths=(64, 64)), [0, 0], 37, 70),
    "under a mask that is added": (Case(Form(FULL, 0.1, mask="added"), "f32", heads=(4, 2), widths=(32, 32)), [0, 0], 21, 67),
    "packed": (Case(Form(PACKED, 0.11), heads=(2, 2), widths=(80, 80)), [0, 5, 5, 60, 70], 71, 0),
    "packed, causal, fp32": (Case(Form(PACKED, 0.1, causal=True), "f32", heads=(4, 2), widths=(16, 32)), [2, 9, 40], 40, 0),
}


def native(case: Case) -> Isolated:
    """As the pass leaves it for the CPU: without tiles."""
    program = case.program()
    (step,) = program.steps
    return isolate(program, replace(step, schedule=None))  # type: ignore[type-var, arg-type]


def execute(call: Call, shift: int = 0) -> torch.Tensor:
    alone = native(call.case)
    buffers, symbols = call.operands(alone)
    named = {b.name: t for b, t in zip(alone.program.buffers, buffers, strict=True) if b.role != "temp"}
    sizes = {s.name: n for s, n in zip(alone.program.symbols, symbols, strict=True)}
    return run(print_program(alone.program), named, sizes, shift)["b4" if len(buffers) == 5 else "b3"]


@pytest.mark.parametrize("name", CASES)
def test_attention_is_as_good_as_eager_at_every_level(name: str) -> None:
    call = make(*CASES[name])
    assert_as_good_as_eager(call, execute(call, shift=len(name) % 3))


def test_a_position_outside_of_the_cache_gives_nan() -> None:
    """Eager refuses the call: nothing beyond the cache is read, rows within it are as ever, the others cannot be mistaken for numbers."""
    call = make(CASES["prefill"][0], [3, 0], 4, 7)
    call.tensors["where"].copy_(torch.tensor([5, -2]))
    found = execute(call)
    q, k, v = (call.tensors[n][:1] for n in "qkv")
    want = torch.ops.flagtree.attend(q[:, :, :2], k, v, torch.tensor([5]), call.case.form.scale)
    torch.testing.assert_close(found[:1, :2], want, rtol=2e-2, atol=2e-2)
    assert found[0, 2:].isnan().all()
    assert found[1].isnan().all()


MUTATIONS = {
    "the causal mask": ("prefill", "seen_to[held] < keys ? seen_to[held] : keys", "keys"),
    "the window": ("sliding window", "seen_to[held] > 9 ? seen_to[held] - 9 : 0", "0"),
    "the rescale": ("prefill", "if (rescale[i] != 1.f)", "if (0)"),
    "the running maximum": ("decode in fp32", "highest[i] = peak;", ""),
    "the causal end": ("up to its own", "seen_to[held] = token + 1;", ";"),
    "the mask": ("under a mask", "? (score) : -__builtin_inff()", "? (score) : (score)"),
    "the bounds": ("packed", "low > 0 && low < bounds", "low > 0 && low < bounds && (low = 1, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("part", MUTATIONS)
def test_without_a_part_the_numbers_are_wrong(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = MUTATIONS[part]
    whole = cpp.generate

    def without(program, digest):
        text = whole(program, digest)
        assert text.count(old) == 1
        return text.replace(old, new)

    monkeypatch.setattr("tests.codegen.cpp_runner.generate", without)
    case, *sizes = CASES[name]
    # another scale, so that no correct code of the same kernel is found again
    call = make(replace(case, form=replace(case.form, scale=case.form.scale + 0.01)), *sizes)
    with pytest.raises(AssertionError, match="RMS|isnan"):
        assert_as_good_as_eager(call, execute(call))


def test_other_types_are_refused() -> None:
    alone = native(Case(Form(FULL, 0.1), "f16"))
    with pytest.raises(CodegenError, match="f32 and bf16"):
        cpp.generate(alone.program, "0" * 64)
