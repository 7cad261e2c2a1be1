"""Generated attention, executed through its MACA IR in the emulator, against eager and float64; and that each part of it matters."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from flagtree.check.sparse import elements
from flagtree.codegen.triton import TritonSource, generate
from flagtree.ir.attention import CACHED, FULL, PACKED, Form, form_of
from flagtree.ir.canonical import digest
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.interp import run_kernel
from flagtree.targets import find_target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.emulator import execute_built, execute_in, grid_of, missing
from flagtree.toolchain.emulator_sparse import SparseMemory
from tests.attention_programs import Call, Case, assert_as_good_as_eager, make
from tests.scheduled import build_maca, build_triton

emulated = pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")
METAX = find_target("metax")

CASES = {
    "decode": (Case(Form(CACHED, 0.09), heads=(8, 2), widths=(128, 128), tokens=1), [0, 69], 1, 70),
    "prefill": (Case(Form(CACHED, 0.1), heads=(4, 2), widths=(64, 64)), [0, 90], 37, 127),
    "prefill in fp32": (Case(Form(CACHED, 0.1), "f32", heads=(4, 2), widths=(64, 48)), [33, 0], 20, 60),
    "sliding window": (Case(Form(CACHED, 0.1, window=9), heads=(2, 1), widths=(64, 64)), [0, 70], 40, 110),
    "some keys, 72 wide": (Case(Form(FULL, 0.1, limited=True), heads=(2, 2), widths=(72, 72)), [70, 0], 18, 80),
    "all keys, fp32": (Case(Form(FULL, 0.1), "f32", heads=(2, 2), widths=(112, 112)), [0], 9, 50),
    "up to its own": (Case(Form(FULL, 0.1, causal=True), heads=(4, 2), widths=(64, 64)), [0, 0], 70, 67),
    "packed": (Case(Form(PACKED, 0.11), heads=(2, 2), widths=(80, 80)), [0, 5, 5, 60, 70], 71, 0),
    "packed, causal, fp32": (Case(Form(PACKED, 0.1, causal=True), "f32", heads=(4, 2), widths=(16, 32)), [2, 9, 40], 40, 0),
    "shared key head, 256 wide": (Case(Form(CACHED, 0.06), heads=(64, 1), widths=(256, 256), tokens=1), [40], 1, 41),
}


def source(case: Case) -> TritonSource:
    program = case.isolated().program
    return generate(program, digest(program), METAX)


def built_of(*cases: Case) -> list[BuiltKernel]:
    programs = [c.isolated().program for c in cases]
    return build_maca([(digest(p), p) for p in programs], METAX, jobs=1)


@pytest.fixture(scope="module")
def built() -> dict[str, BuiltKernel]:
    return dict(zip(CASES, built_of(*(case for case, *_ in CASES.values())), strict=True))


def execute(built: BuiltKernel, variant: str, call: Call) -> torch.Tensor:
    buffers, symbols = call.operands(call.case.isolated())
    copies = [t.clone() for t in buffers]
    execute_built(built, variant, copies, symbols, orders=("forward", "reverse"))
    return next(c for c, t in zip(copies, buffers, strict=True) if t is call.tensors["out"])


@emulated
@pytest.mark.parametrize("name", CASES)
def test_emulated_attention_is_as_good_as_eager(name: str, built: dict[str, BuiltKernel]) -> None:
    call = make(*CASES[name])
    found = [execute(built[name], variant, call) for variant in ("aligned", "generic")]
    assert_as_good_as_eager(call, found[0])
    assert torch.equal(*found)


@emulated
def test_a_position_outside_of_the_cache_gives_nan(built: dict[str, BuiltKernel]) -> None:
    """Eager refuses the call: nothing beyond the cache is read, rows within it are as ever, the others cannot be mistaken for numbers."""
    call = make(CASES["prefill"][0], [3, 0], 4, 7)
    call.tensors["where"].copy_(torch.tensor([5, -2]))
    found = execute(built["prefill"], "generic", call)
    q, k, v = (call.tensors[n][:1] for n in "qkv")
    want = torch.ops.flagtree.attend(q[:, :, :2], k, v, torch.tensor([5]), call.case.form.scale)
    torch.testing.assert_close(found[:1, :2], want, rtol=2e-2, atol=2e-2)
    assert found[0, 2:].isnan().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_the_text_means_what_eager_computes(name: str) -> None:
    call = make(*CASES[name])
    program = call.case.program()
    sizes = dict(zip(map(str, (alone := call.case.isolated()).symbols), call.operands(alone)[1], strict=True))
    wide = {n: t.double() if t.is_floating_point() else t for n, t in call.tensors.items()}
    run_kernel(program, program.steps[0], wide, sizes, True)  # type: ignore[arg-type]
    torch.testing.assert_close(wide["out"], call.truth, rtol=1e-9, atol=1e-9)
    assert form_of(alone.program) == call.case.form
    (step,) = alone.program.steps
    other = replace(step, body=(*step.body[:2], *step.body[3:]))  # type: ignore[union-attr]
    assert form_of(alone.program.with_(steps=(other,))) is None


@pytest.mark.parametrize("name", CASES)
def test_only_the_portable_subset(name: str) -> None:
    allowed = set(re.findall(r"\w+", "program_id arange full load store where sum exp2 div_rn dot max min maximum minimum"))
    text = source(CASES[name][0]).text
    assert set(re.findall(r"\btl\.(\w+)", text)) <= allowed | {"int32", "int64", "float32", "bfloat16"}
    compile(text, name, "exec")


@pytest.mark.parametrize(("target", "binary"), [("cuda:sm90", "cubin"), ("cuda:sm80", "cubin"), ("rocm:gfx942", "hsaco")])
def test_it_compiles_to_binaries(target: str, binary: str) -> None:
    program = CASES["decode"][0].isolated().program
    (found,) = build_triton([(digest(program), program)], find_target(target), jobs=1)
    assert found.tier == "binary"
    assert found.files[f"aligned.{binary}"] and found.files[f"generic.{binary}"]
    assert not found.facts.get("spills")


@emulated
@pytest.mark.parametrize("variant", ["aligned", "generic"])
def test_the_last_sequence_of_the_largest_call(variant: str) -> None:
    """64 caches of 40 960 rows: the last ones lie beyond 2**31 elements, and only their first rows are there."""
    case = Case(Form(CACHED, 0.09), heads=(8, 8), widths=(128, 128), tokens=1)
    (whole,) = built_of(case)
    call, alone = make(case, [30], 1, 31), case.isolated()
    sizes = {"batch": 64, "context": 40960}
    symbols = {f"n{k}": sizes[str(s)] for k, s in enumerate(alone.symbols)}
    spans = [(elements(b, symbols), torch_dtype(b.dtype)) for b in alone.program.buffers]
    assert max(count for count, _ in spans) > 1 << 31
    with SparseMemory(spans, shift=0 if variant == "aligned" else 1) as memory:
        flat = dict(zip(alone.buffers, memory.tensors, strict=True))
        for name, rows in (("q", 1), ("k", 40960), ("v", 40960)):
            flat[name][63 * 8 * rows * 128 :].view(8, rows, 128)[:, :31] = call.tensors[name][0]
        flat["where"][63] = 30
        grid = grid_of(whole, list(symbols.values()))
        assert grid == [64 * 8, 1, 1]
        execute_in(whole, variant, memory, list(symbols.values()), [(63 * 8 + head, 0, 0) for head in range(8)])
        assert_as_good_as_eager(call, flat["out"][63 * 8 * 128 :].view(1, 1, 8, 128).clone())


@pytest.mark.full
@emulated
def test_the_longest_cache() -> None:
    case = Case(Form(CACHED, 0.09), heads=(4, 1), widths=(128, 128), tokens=1)
    (whole,) = built_of(case)
    call = make(case, [40959], 1, 40960)
    assert_as_good_as_eager(call, execute(whole, "aligned", call))


MUTATIONS = {
    "the causal mask": ("prefill", " & (key[None, :] <= position[:, None])", " & row_inside[:, None]"),
    "the window": ("sliding window", "        seen = seen & (key[None, :] > position[:, None] - 9)\n", ""),
    "the rescale of the sums": ("prefill", "sums * rescale[:, None]", "sums"),
    "the rescale of the total": ("prefill", "total * rescale", "total"),
    "the running maximum": ("prefill", "        highest = higher\n", ""),
    "the causal end": ("up to its own", " & (key[None, :] <= token[:, None])", ""),
    "the bounds": ("packed", " & (key[None, :] < row_end[:, None])", ""),
    "the lengths": ("some keys, 72 wide", "end = tl.where(end < keys, end, keys)", "end = keys"),
    "the padding of a head": ("all keys, fp32", "mask=key_inside[None, :] & d_inside[:, None]", "mask=key_inside[None, :]"),
}  # fmt: skip


@emulated
@pytest.mark.parametrize("part", MUTATIONS)
def test_without_a_part_the_numbers_are_wrong(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = MUTATIONS[part]
    call = make(*CASES[name])
    text = source(call.case)
    assert text.text.count(old) == 1
    monkeypatch.setattr("flagtree.toolchain.maca.generate", lambda *_: replace(text, text=text.text.replace(old, new)))
    (wrong,) = built_of(call.case)
    with pytest.raises(Exception, match="RMS|isnan|access outside|past the end|before argument|bits"):
        assert_as_good_as_eager(call, execute(wrong, "generic", call))


@emulated
def test_without_a_barrier_the_bits_depend_on_the_order(built: dict[str, BuiltKernel]) -> None:
    """Of the barriers between shared memory's writers and readers at least one shows in these orders when it is deleted."""
    call = make(*CASES["prefill"])
    whole = built["prefill"]
    text = whole.files["generic.llir"].decode()
    barriers = [line for line in text.splitlines() if "call void @llvm.mxc.barrier" in line]
    assert barriers
    kept = "\n".join(line for line in text.splitlines() if line not in barriers)
    without = replace(whole, files={**whole.files, "generic.llir": kept.encode()})
    with pytest.raises(Exception, match="RMS|isnan|bits"):
        assert_as_good_as_eager(call, execute(without, "generic", call))
