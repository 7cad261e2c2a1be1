"""Attention in a certificate: executed on sizes and integers that fit together, compared with its operator; a wrong one is found."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from flagtree.check.certify import Subject, examine
from flagtree.check.eager import eager_of
from flagtree.check.inputs import make_operands, sample_symbols
from flagtree.check.recipe import run_recipe
from flagtree.ir.attention import CACHED, FULL, PACKED, Form
from flagtree.ir.canonical import digest, isolate
from flagtree.targets import find_target
from flagtree.toolchain import cxx
from tests.attention_programs import Case

CASES = {
    "cached": Case(Form(CACHED, 0.3, window=5), "f32", widths=(32, 16)),
    "some keys": Case(Form(FULL, 0.3, limited=True), "f32", widths=(32, 16)),
    "all keys": Case(Form(FULL, 0.3), "f32", widths=(32, 16)),
    "packed": Case(Form(PACKED, 0.3, causal=True), "f32", widths=(32, 16)),
}


def subject(case: Case, claimed: Case) -> Subject:
    """The kernel of `case`, compared with what eager computes for `claimed`."""
    alone, other = ([isolate(p := c.program(), replace(p.steps[0], schedule=None)) for c in (case, claimed)])  # type: ignore[arg-type, type-var]
    key = digest(alone.program)
    (built,) = cxx.build([(key, alone.program)], find_target("cpu"), 1)
    return Subject(key, alone, alone.kernel, built, partial(run_recipe, eager_of(None, other.program, other.kernel, other, {})))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_executed_and_compared(name: str) -> None:
    checked = subject(CASES[name], CASES[name])
    (record,) = examine([checked], find_target("cpu")).kernels.values()
    assert record["verdict"] == "pass", record
    assert record["eager"] == "compared"
    assert record["executed"]
    assert all("rms_eager" in run["outputs"][buffer] for run in record["runs"] for buffer in run["outputs"])  # type: ignore[attr-defined]


def test_another_scale_is_a_wrong_kernel() -> None:
    case = CASES["packed"]
    (record,) = examine([subject(case, replace(case, form=replace(case.form, scale=0.2)))], find_target("cpu")).kernels.values()
    assert record["verdict"] == "fail"


def test_starts_leave_room_and_bounds_ascend() -> None:
    for name, ascending in (("cached", False), ("packed", True)):
        program = CASES[name].isolated().program
        for symbols in sample_symbols(program):
            told = make_operands(program, symbols, seed=3)["b0"].tensor
            q, k = (make_operands(program, symbols, seed=3)[b].tensor.shape for b in ("b1", "b2"))
            assert int(told.min()) >= 0
            if ascending:
                assert told.tolist() == sorted(told.tolist())
                assert int(told.max()) <= k[0]
            else:
                assert int(told.max()) + q[2] <= k[2]
