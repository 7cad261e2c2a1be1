"""Attention at the upper end of its ranges and its stated error: right kernels pass at true sizes and addresses, wrong ones do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch

from flagtree.check.attention_rows import enclose_attention
from flagtree.check.certify import LONG, examine
from flagtree.check.eager import eager_of
from flagtree.check.inputs import make_operands, sample_symbols, upper_ends
from flagtree.check.points import all_points, kernel_of
from flagtree.check.recipe import run_recipe
from flagtree.check.sparse import Strays
from flagtree.check.stated import stated_gpu, stated_native
from flagtree.check.upper import run_blocks
from flagtree.codegen.triton import generate
from flagtree.errors import KernelFault
from flagtree.ir.attention import CACHED, FULL, PACKED, Form
from flagtree.ir.canonical import digest
from flagtree.ir.sample import stores_at
from flagtree.targets import find_target
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.emulator import missing
from tests.attention_programs import Case
from tests.check.test_attention_evidence import subject
from tests.scheduled import build_maca

emulated = pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")
METAX = find_target("metax")
FORMS = {
    "one token": Case(Form(CACHED, 0.2), heads=(4, 2), widths=(32, 32), tokens=1),
    "window": Case(Form(CACHED, 0.2, window=9), "f32", heads=(2, 1), widths=(24, 16)),
    "some keys": Case(Form(FULL, 0.3, limited=True), "f32", heads=(2, 2), widths=(16, 32)),
    "causal": Case(Form(FULL, 0.3, causal=True), heads=(2, 1), widths=(16, 16)),
    "packed": Case(Form(PACKED, 0.3, causal=True), "f32", heads=(2, 1), widths=(32, 16)),
    "packed in fours": Case(Form(PACKED, 0.3), heads=(2, 2), widths=(16, 16), step=4),
    "masked": Case(Form(FULL, 0.3, mask="seen"), "f32", heads=(2, 1), widths=(16, 16)),
    "added mask": Case(Form(FULL, 0.3, mask="added"), "f32", heads=(2, 1), widths=(16, 16)),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_stated_error_lies_around_what_the_text_means(name: str) -> None:
    """The interpreter in float64 and in the kernel's types is enclosed; twice the scale, or a value moved by one key, is not."""
    alone = FORMS[name].isolated()
    program, form, kernel = alone.program, FORMS[name].form, kernel_of(alone.program)
    for symbols in sample_symbols(program)[1:]:
        tensors = {n: o.tensor for n, o in make_operands(program, symbols, 5).items()}
        points = all_points(kernel, symbols)
        stated = stated_native(True) if form.mask else stated_gpu(kernel, 256)
        (found,) = enclose_attention(program, form, tensors, symbols, points, stated).values()
        width = (found.high.double() - found.low.double()).abs()
        sizes = {"bf16": 0.1, "f32": 5e-4}
        assert float(width.max()) < sizes[FORMS[name].dtype], "so wide that nothing is said"
        for precise in (True, False):
            (stored,) = stores_at(program, kernel, tensors, symbols, points, precise).values()
            assert torch.equal(stored.offsets, found.offsets)
            value = stored.values.to(found.low.dtype).double()
            assert bool(((value >= found.low.double()) & (value <= found.high.double())).all())
        (other,) = enclose_attention(program, replace(form, scale=2 * form.scale), tensors, symbols, points, stated).values()
        outside = (value < other.low.double()) | (value > other.high.double())
        assert float(outside[value != 0].double().mean()) > 0.3


def test_nothing_is_stated_beside_infinity_and_rows_without_keys_are_zero() -> None:
    case = FORMS["some keys"]
    program = case.isolated().program
    symbols = sample_symbols(program)[1]
    operands = make_operands(program, symbols, 5)
    tensors = {n: o.tensor for n, o in operands.items()}
    tensors["b0"].copy_(torch.tensor([0, 5]))
    tensors["b3"][1, 0, 3, 0] = float("inf")
    kernel = kernel_of(program)
    points = all_points(kernel, symbols)
    (found,) = enclose_attention(program, case.form, tensors, symbols, points, stated_gpu(kernel, 256)).values()
    first, touched = points["i0"] == 0, (points["i0"] == 1) & (points["i2"] == 0)
    assert bool((found.low[first] == 0).all() and (found.high[first] == 0).all())
    assert bool((found.low[touched] == -torch.inf).all()) and bool(torch.isfinite(found.low[~first & ~touched]).all())


# -- on this CPU -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [
    "one token", "masked", "packed in fours", *(pytest.param(n, marks=pytest.mark.full) for n in ("window", "some keys", "packed"))
])
def test_the_long_form_on_the_cpu(name: str) -> None:
    """Every kind of input within the stated error, and the upper end of each symbol where a core computes it in a second."""
    (record,) = examine([subject(FORMS[name], FORMS[name])], find_target("cpu"), form=LONG).kernels.values()
    assert record["verdict"] == "pass", record["faults"]
    runs: list[Mapping[str, Mapping]] = record["runs"]  # type: ignore[assignment]
    assert all(out["gate"] == "stated error" for run in runs for out in run.get("outputs", {}).values())
    upper = {run["inputs"]["upper_end"]: run for run in runs if "upper_end" in run["inputs"]}
    assert len(upper) > 1
    left_out = {end for end, run in upper.items() if "not_run" in run}
    assert left_out == {"one token": set(), "packed": set()}.get(name, left_out) and left_out < set(upper)
    (end,) = (upper["all"] if "all" not in left_out else next(r for e, r in upper.items() if e not in left_out))["outputs"].values()
    assert end["elements_with_eager"] and end["max_ulp"] is not None


# -- in the emulator ---------------------------------------------------------------------------------------------------------
def built(case: Case, *changes: tuple[str, str], monkeypatch: pytest.MonkeyPatch | None = None) -> BuiltKernel:
    program = case.isolated().program
    if changes:
        text = generate(program, digest(program), METAX)
        for old, new in changes:
            assert text.text.count(old) >= 1
            text = replace(text, text=text.text.replace(old, new))
        assert monkeypatch is not None
        monkeypatch.setattr("flagtree.toolchain.maca.generate", lambda *_: text)
    return build_maca([(digest(program), program)], METAX, jobs=1)[0]


SMALL = Case(Form(CACHED, 0.2), heads=(2, 1), widths=(16, 16))


@emulated
@pytest.mark.parametrize("end", [0, 1, 2, 3])
def test_blocks_of_the_true_grid(end: int) -> None:
    alone = SMALL.isolated()
    eager = partial(run_recipe, eager_of(None, alone.program, alone.kernel, alone, {}))  # type: ignore[arg-type]
    name, symbols = upper_ends(alone.program)[end]
    found = run_blocks(alone.program, built(SMALL), symbols, 1, 3, eager=eager)  # type: ignore[arg-type]
    assert found.ways == ("aligned", "generic") and "blocks 0" in found.what, name
    assert not found.beside.why and len(found.beside.places["b4"])
    (enclosed,) = found.enclosed.values()
    assert bool((found.own["b4"] >= enclosed.low).all() and (found.own["b4"] <= enclosed.high).all())


WRONG = {
    "the running maximum": ("        highest = higher\n", ""),
    "the rescale of the sums": ("sums * rescale[:, None]", "sums"),
    "the end of the cache": ("end = first + last + 1", "end = first + last - 1000"),
    "64-bit offsets of keys": ("v_row = key.to(tl.int64) * (", "v_row = key * 3 // 3 * (1 + key // 40000) * ("),
    "the row": ("mask=row_inside[:, None] & e_inside", "mask=(row_inside | (token >= 0))[:, None] & e_inside"),
}


@emulated
@pytest.mark.parametrize("part", WRONG)
def test_a_kernel_that_is_wrong_at_its_upper_end_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = SMALL.isolated().program
    wrong = built(SMALL, WRONG[part], monkeypatch=monkeypatch)
    case = 0 if part != "the row" else next(n for n, (_, s) in enumerate(upper_ends(program)) if s["n1"] == 1 and s["n0"] == 64)
    with pytest.raises((Strays, KernelFault)):
        run_blocks(program, wrong, upper_ends(program)[case][1], 1, 3)
