"""Attention on the CPU: every level gives the same bits, as good as eager's, and touches nothing beyond its operands."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flagtree.codegen import cpp
from flagtree.codegen.cpp_attention import WEIGHT_ERROR
from flagtree.codegen.cpp_prelude import prelude
from flagtree.errors import CodegenError
from flagtree.ir.attention import CACHED, FULL, PACKED, Form
from flagtree.ir.canonical import Isolated, isolate
from flagtree.ir.program import Program
from flagtree.ir.text import print_program
from flagtree.runtime.cpu import levels
from flagtree.toolchain import cxx
from tests.attention_programs import Call, Case, assert_as_good_as_eager, make
from tests.codegen.cpp_runner import run, same_bits

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
    "packed, causal, odd widths": (Case(Form(PACKED, 0.1, causal=True), heads=(6, 2), widths=(41, 23)), [2, 9, 60], 60, 0),
    "prefill in bf16": (Case(Form(CACHED, 0.1), heads=(8, 2), widths=(128, 128)), [0, 90], 37, 127),
    "up to its own in bf16": (Case(Form(FULL, 0.1, causal=True), heads=(4, 2), widths=(64, 24)), [0, 0], 70, 67),
    "under a mask in bf16": (Case(Form(FULL, 0.1, mask="seen"), heads=(2, 2), widths=(64, 64)), [0, 0], 37, 70),
    "one token under a mask that is added": (Case(Form(FULL, 0.1, mask="added"), heads=(4, 2), widths=(32, 32), tokens=1), [0, 0], 1, 67),
    "under a mask that is added, in bf16": (Case(Form(FULL, 0.1, mask="added"), heads=(4, 2), widths=(32, 32)), [0, 0], 21, 67),
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


@pytest.mark.parametrize("tiles", [True, False])
def test_unusual_numbers_give_equal_bits_too(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tiles the widest level takes vectors, as narrower ones do."""
    case, *sizes = CASES["prefill in bf16"]
    if not tiles:
        without("use->there = has_tiles()", "use->there = false", monkeypatch)
    call = make(replace(case, form=replace(case.form, scale=0.12 if tiles else 0.13)), *sizes)  # a kernel of its own
    for n, name in enumerate("qkv"):
        chosen = torch.rand(call.tensors[name].shape, generator=torch.Generator().manual_seed(n))
        call.tensors[name][chosen < 0.1] *= 2.0**-130
        call.tensors[name][(chosen > 0.1) & (chosen < 0.2)] *= 2.0**-60
    call.tensors["v"][1, :, 3, 5] = torch.inf
    call.tensors["k"][1, :, 7, 9] = torch.nan
    found = execute(call)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_what_is_tiny_only_before_rounding_is_the_same_at_every_level() -> None:
    """e^-20 of -2^-126 and 2^-126: their sum, rounded once, is 2^-126; before it is rounded it lies below."""
    call = make(Case(Form(FULL, 1.0), heads=(1, 1), widths=(16, 16)), [0], 32, 32)
    for name in "qkv":
        call.tensors[name].zero_()
    call.tensors["q"][..., 0], call.tensors["k"][:, :, 1:, 0] = 1.0, -20.0
    call.tensors["v"][:, :, 0], call.tensors["v"][:, :, 2] = 2.0**-126, -(2.0**-126)
    assert (execute(call).double() / 2.0**-126).sub(1).abs().max() < 1e-2


def test_a_weight_is_as_near_as_stated(tmp_path: Path) -> None:
    """Every 64th f32 from -0 to -87.5, and what lies beyond; the same bits at every level."""
    body = "extern \"C\" __attribute__((visibility(\"default\"))) void weights(const f32 *x, f32 *r, i64 n) { " \
        "for (i64 i = 0; i < n; i += W) store(r + i, weight_of(load(x + i, W)), W); }"  # fmt: skip
    source = f"#define WIDEST_BYTES 4\n#define PARTIALS 16\n#define CLEAN_NANS 1\n{prelude(body)}{body}"
    last = int(torch.tensor(87.5).view(torch.int32))
    ends = torch.tensor([-87.0, -88.0, -1e30, -math.inf, math.nan] + [0.0] * 11)
    x = torch.cat([-torch.arange(0, last // 1024 * 1024, 64, dtype=torch.int32).view(torch.float32), ends])
    out = {}
    for level in levels():
        path = tmp_path / f"{level}.so"
        path.write_bytes(cxx.link([("0" * 64, cxx.compile_object(source, level))], level))
        out[level] = torch.zeros_like(x)
        ctypes.CDLL(str(path)).weights(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out[level].data_ptr()), ctypes.c_int64(len(x)))
        assert same_bits(out[level], out[levels()[0]])
    found, near = out[levels()[0]], x >= -87
    exact = x[near].double().exp()
    assert ((found[near].double() - exact).abs() <= WEIGHT_ERROR * exact).all()
    assert (found[x < -87] == 0).all()
    assert found[x.isnan()].isnan().all()
    assert found[0] == 1


def test_a_product_of_the_library_after_ours_is_right() -> None:
    """What a thread had set up of its tiles is there again."""
    torch.manual_seed(0)
    a, b = (torch.randn(64, 256).bfloat16() for _ in "ab")
    want, call = a @ b.T, make(*CASES["prefill in bf16"])
    for _ in range(2):
        execute(call)
        assert torch.equal(a @ b.T, want)


def without(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated code in which one text stands for another."""
    whole = cpp.generate

    def changed(program: Program, digest: str) -> str:
        text = whole(program, digest)
        assert text.count(old) == 1
        return text.replace(old, new)

    monkeypatch.setattr("tests.codegen.cpp_runner.generate", changed)


MUTATIONS = {
    "the causal mask": ("prefill", "seen_to[held] < keys ? seen_to[held] : keys", "keys"),
    "the window": ("sliding window", "seen_to[held] > 9 ? seen_to[held] - 9 : 0", "0"),
    "the rescale": ("prefill", "if (rescale[i] != 1.f)", "if (0)"),
    "the running maximum": ("decode in fp32", "highest[i] = peak;", ""),
    "the causal end": ("up to its own", "seen_to[held] = token + 1;", ";"),
    "the mask": ("under a mask", "? (score) : -__builtin_inff()", "? (score) : (score)"),
    "a rescale of pairs": ("prefill in bf16", "load(sums + e, W) * rescale", "load(sums + e, W)"),
    "a maximum of pairs": ("prefill in bf16", "*highest = most[0];", ""),
    "the upper halves": ("prefill in bf16", "high[i][n] = multiply_add(right, upper[n], high[i][n])", "high[i][n] = high[i][n]"),
    "the padding of values": ("up to its own in bf16", "j + 1 < count ? unsigned_of(load(p + v_stride, WIDTH - e))", "j ? u32v{} + 0x3f80"),
    "the bounds": ("packed", "low > 0 && low < bounds", "low > 0 && low < bounds && (low = 1, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("part", MUTATIONS)
def test_without_a_part_the_numbers_are_wrong(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = MUTATIONS[part]
    without(old, new, monkeypatch)
    case, *sizes = CASES[name]
    # a scale of its own, so that no other code of the same kernel is found again
    call = make(replace(case, form=replace(case.form, scale=0.2 + 0.001 * (1 + list(MUTATIONS).index(part)))), *sizes)
    with pytest.raises(AssertionError, match="RMS|isnan|differs"):
        assert_as_good_as_eager(call, execute(call))


@pytest.mark.skipif("amx_bf16" not in Path("/proc/cpuinfo").read_text(), reason="no matrix instructions for bf16 here")
def test_the_widest_level_takes_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    case, *sizes = CASES["prefill in bf16"]
    without("TILE_ADD(3, 5, 7)", "TILE_ADD(3, 5, 6)", monkeypatch)
    call = make(replace(case, form=replace(case.form, scale=0.14)), *sizes)
    with pytest.raises(AssertionError, match="differs from x86-64-v4"):
        execute(call)


def test_other_types_are_refused() -> None:
    alone = native(Case(Form(FULL, 0.1), "f16"))
    with pytest.raises(CodegenError, match="f32 and bf16"):
        cpp.generate(alone.program, "0" * 64)
