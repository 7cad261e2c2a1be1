"""Inputs stay where a kernel may be run: sizes in their ranges, indices in bounds, what it writes starts as nothing."""

from __future__ import annotations

import pytest
import torch

from flagtree.check.inputs import GUARD, make_operands, sample_symbols
from flagtree.check.regimes import KINDS
from flagtree.ir.canonical import isolate
from flagtree.ir.program import Program
from flagtree.ir.text import parse_program
from flagtree.ir.walk import run_kernel

N = "numerics(eager, contract=off, acc=f32)"
CACHE = f"""program p
  symbol s0 in 2..64 from dim k 0
  symbol s1 in 2..64 multiple 4 from dim k 1
  symbol s2 in 2..40960 from dim cache 1
  buffer start: i64[s0] input
  buffer k: bf16[s0, s1, 8] input
  buffer cache: bf16[s0, s2, 8] state
  kernel k {{i0 < s0, i1 < s1, i2 < 8}} {N}
    v0: i64 = load start[i0]
    v1: i64 = index i1
    v2: i64 = add v0, v1
    v3: bf16 = load k[i0, i1, i2]
    store cache[i0, v2, i2] = v3
  outputs cache
"""
LABELS = f"""program p
  symbol s0 in 1..64 from dim x 0
  buffer x: f32[s0, 50] input
  buffer labels: i32[s0] input
  buffer y: f32[s0] temp
  kernel k {{i0 < s0}} {N}
    v0: i32 = load labels[i0]
    v1: i64 = cast v0
    v2: b1 = lt v1, 0
    v3: i64 = add v1, 50
    v4: i64 = where v2, v3, v1
    v5: f32 = load x[i0, v4]
    v6: f32 = log v5
    store y[i0] = v6
  outputs y
"""
DIVISION = f"""program p
  buffer a: i64[99] input
  buffer b: i64[99] input
  buffer y: i64[99] temp
  kernel k {{i0 < 99}} {N}
    v0: i64 = load a[i0]
    v1: i64 = load b[i0]
    v2: i64 = floordiv v0, v1
    store y[i0] = v2
  outputs y
"""
ALL = {"cache": CACHE, "labels": LABELS, "division": DIVISION}


def alone(text: str) -> Program:
    program = parse_program(text)
    return isolate(program, program.steps[0]).program  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(5))
def test_the_interpreter_accepts_them(name: str, seed: int) -> None:
    program = alone(ALL[name])
    for symbols in sample_symbols(program):
        operands = make_operands(program, symbols, seed)
        run_kernel(program, program.steps[0], {n: o.tensor for n, o in operands.items()}, symbols)  # type: ignore[arg-type]
        for buffer in program.buffers:
            if buffer.role == "temp" and name != "cache":
                value = operands[buffer.name].tensor
                assert bool(torch.isfinite(value).all()), "every element is written, with a real result"


def test_sizes_lie_in_their_ranges_and_differ() -> None:
    program = alone(CACHE)
    low, odd = sample_symbols(program)
    assert low == {"n0": 2, "n1": 4, "n2": 4}
    assert odd == {"n0": 3, "n1": 4, "n2": 7}
    for settings in (low, odd):
        assert all(s.lo <= settings[s.name] <= s.hi and settings[s.name] % s.multiple == 0 for s in program.symbols)


def test_positions_use_the_whole_range_that_fits() -> None:
    program = alone(CACHE)
    symbols = {"n0": 64, "n1": 4, "n2": 9}
    start = make_operands(program, symbols, 1)["b0"].tensor
    assert (int(start.min()), int(start.max())) == (0, 5)
    labels = make_operands(alone(LABELS), {"n0": 64}, 1)["b0"].tensor
    assert int(labels.min()) >= 0 and 40 < int(labels.max()) < 50


def test_equal_seed_equal_bits() -> None:
    program = alone(LABELS)
    first, again, other = (make_operands(program, {"n0": 5}, seed) for seed in (7, 7, 8))
    for name in first:
        assert torch.equal(first[name].memory.view(torch.uint8), again[name].memory.view(torch.uint8))
    assert not torch.equal(first["b1"].memory, other["b1"].memory)


def test_only_written_memory_starts_as_nan_between_guards() -> None:
    operand = make_operands(alone(LABELS), {"n0": 5}, 7)["b2"]
    assert bool(torch.isnan(operand.tensor).all())
    outside = torch.cat([operand.memory[:GUARD], operand.memory[GUARD + 5 :]])
    assert outside.numel() == 2 * GUARD and not bool(torch.isnan(outside).any())
    assert operand.tensor.data_ptr() % 64 == 0
    shifted = make_operands(alone(LABELS), {"n0": 5}, 7, shift=1)
    assert all(o.tensor.data_ptr() % 64 == o.memory.element_size() for o in shifted.values())


def test_scale() -> None:
    program = alone(LABELS.replace("log", "abs"))
    x = make_operands(program, {"n0": 64}, 7, "ordinary, small")["b1"].tensor
    assert float(x.std()) == pytest.approx(2.0**-10, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_what_it_says(kind: str) -> None:
    program = alone(LABELS.replace("log", "abs"))
    for seed in range(20):
        x = make_operands(program, {"n0": 1}, seed, kind, shift=seed % 2)["b1"].tensor
        nan, infinite, tiny, zero = (int(v.sum()) for v in (x.isnan(), x.isinf(), (x.abs() < 2.0**-126) & (x != 0), x == 0))
        expected = {"NaN": nan > 0, "inf": infinite > 0, "denormal": tiny > 40, "zero": zero > 40,
                    "cancelling": bool(((x.abs() - 64).abs() < 1).all()) and 0 < int((x > 0).sum()) < 50,
                    "wide range": float(x.abs().max() / x.abs().min()) > 1e20}  # fmt: skip
        assert expected.get(kind, True)
        assert bool(nan) == (kind == "NaN") and bool(infinite) == (kind == "inf") and (kind in ("zero", "denormal") or not tiny)
