"""Triton text: golden sources, grids and widths, refusals with reasons, and what a deleted guard does to a run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flagtree.codegen.triton import TritonSource, helper_functions, with_callees
from flagtree.errors import CodegenError, ToolchainError
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Kernel, Schedule
from flagtree.passes.tiling import default_schedule
from flagtree.toolchain import maca
from flagtree.toolchain.emulator import execute_built, missing
from flagtree.toolchain.triton_aot import Workers, workers
from tests.codegen.triton_kernels import METAX, NUMERICS, SM90, TEXTS, buffers, isolated, keyed, reference
from tests.scheduled import generate

GOLDEN = Path(__file__).parents[1] / "golden" / "triton"
GOLDEN_NAMES = ("residual", "rotary", "silu_mul", "softmax", "layernorm", "cross_entropy", "argmax", "scatter_add")
emulated = pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")


def source(name: str, schedule: Schedule | None = None) -> TritonSource:
    digest, program = keyed(name)
    if schedule is not None:
        program = program.with_(steps=(replace(program.steps[0], schedule=schedule),))  # type: ignore[arg-type]
    return generate(program, digest, SM90)


def generate_text(body: str, head: str = "  symbol s0 in 1..64 from dim x 0\n", target=SM90) -> TritonSource:  # type: ignore[no-untyped-def]
    return generate(parse_program("program p\n" + head + re.sub(r"(  kernel .*)", rf"\1 {NUMERICS}", body)), "0" * 64, target)


# -- text ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_source(name: str) -> None:
    path = GOLDEN / f"{name}.py"
    assert path.is_file(), f"no golden source; write it with: python -m tests.codegen.test_triton {name}"
    assert source(name).text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(TEXTS))
def test_only_the_portable_subset(name: str) -> None:
    text = source(name).text
    functions = "arange full load store where sum reduce associative_scan program_id broadcast_to debug_barrier"
    functions += " div_rn sqrt_rn sqrt exp exp2 abs floor ceil"
    types = "int1 int8 int16 int32 int64 uint8 float16 bfloat16 float32 float64"
    allowed = {*functions.split(), *types.split(), "atomic_add", "atomic_max"}
    used = set(re.findall(r"\btl\.(\w+)", text))
    assert used <= allowed
    compile(text, name, "exec")


def test_no_triton_is_imported() -> None:
    code = "import sys, flagtree.codegen.triton, flagtree.toolchain.triton_aot; sys.exit('triton' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_function_brings_what_it_calls() -> None:
    assert with_callees({"erfc"}) == ["erf", "erfc", "erfc_tail"]
    assert all("def " + name + "(" in text for name, text in helper_functions().items())


def test_the_signature_is_pointers_then_symbols() -> None:
    made = source("cross_entropy")
    assert made.signature == (("b0", "*bf16"), ("b1", "*i64"), ("b2", "*fp32"), ("n0", "i32"))
    assert made.function == "ft_" + keyed("cross_entropy")[0][:16]
    assert made.aligned == ("b0", "b1", "b2")  # never the token count


# -- grids and widths ------------------------------------------------------------------------------------------------
def test_narrow_rows_share_an_instance() -> None:
    made = source("rotary")
    assert dict(made.tiles) == {"i0": 1, "i1": 1, "i2": 8, "r0": 128}
    assert made.grid == (["*", 4, "n0", "n1"], 1, 1)


def test_offsets_are_64_bits_only_where_they_may_pass_2_to_31() -> None:
    assert ".to(tl.int64) * 4096" in source("rmsnorm").text
    assert "int64" not in _code(source("softmax"))  # 64 * 40960 elements
    assert "(i1.to(tl.int64) * 24576 + 12288) + i2)" in source("silu_mul").text
    flat = (
        _ROW.format(t="f32", op="neg a0")
        .replace("[s0, 40]", "[s0, s1, 40]")
        .replace("i0 < s0", "i0 < s0, i2 < s1")
        .replace("[i0, i1]", "[i0, i2, i1]")
    )
    many = generate_text(flat, "  symbol s0 in 1..64 from dim x 0\n  symbol s1 in 1..40000000 from dim x 1\n")
    assert "i1_start = x.to(tl.int64) * 1024" in many.text and "m_i1 = i1 < (s0.to(tl.int64) * s1 * 40)" in many.text


def test_a_huge_grid_uses_y_and_z() -> None:
    text = """  symbol s1 in 1..65000 from dim x 1
  symbol s2 in 1..4000000000 from dim x 2
  buffer x: f32[s0, s1, s2] input
  buffer y: f32[s1, s0, s2] temp
  kernel k {i0 < s0, i1 < s1, i2 < s2}
    a0: f32 = load x[i0, i1, i2]
    store y[i1, i0, i2] = a0
  outputs y
"""
    made = generate_text(text)
    assert made.grid[1:] != (1, 1)
    assert dict(made.signature)["s2"] == "i64" and dict(made.signature)["s0"] == "i32"
    with pytest.raises(CodegenError, match="too many program instances"):
        generate_text(text.replace("1..65000", "1..4000000000"))


def test_a_multiple_that_a_symbol_promises_needs_no_mask() -> None:
    text = "  symbol s1 in 1024..40960 multiple 1024 from dim x 1\n  buffer x: f32[s0, s1] input\n  buffer y: f32[s1, s0] temp\n" \
           "  kernel k {i0 < s0, i1 < s1}\n    a0: f32 = load x[i0, i1]\n    store y[i1, i0] = a0\n  outputs y\n"  # fmt: skip
    made = generate_text(text)
    assert "m_i1" not in made.text and "s1" in made.aligned
    assert "m_i1" in generate_text(text.replace(" multiple 1024", "")).text


def test_the_schedule_is_kept_and_the_default_is_a_function_of_the_text() -> None:
    asked = Schedule("r0", (("r0", 4096),), (), 16, 1)
    assert source("rmsnorm", asked).warps == 16
    assert (
        default_schedule(isolated("rmsnorm"), SM90)
        == default_schedule(isolated("rmsnorm"), SM90)
        == Schedule("r0", (("r0", 4096),), (), 8, 1)
    )
    assert default_schedule(isolated("rmsnorm_long"), SM90).loop == ("r0",)
    assert default_schedule(isolated("columns"), SM90).lane == "i0"
    assert default_schedule(isolated("rmsnorm"), METAX).warps * METAX.warp <= METAX.max_threads


def test_axes_that_never_meet_share_a_dimension() -> None:
    text = """  buffer x: f32[s0, 128] input
  buffer y: f32[s0, 128] temp
  kernel k {i0 < s0, i1 < 128} reduce {r0 < 128}
    a0: f32 = load x[i0, r0]
    a1: f32 = sum a0 over r0
    b0: f32 = load x[i0, i1]
    b1: f32 = sub b0, a1
    store y[i0, i1] = b1
  outputs y
"""
    assert "[None, None" not in generate_text(text).text


# -- refusals --------------------------------------------------------------------------------------------------------
_ROW = """  buffer x: {t}[s0, 40] input
  buffer y: {t}[s0, 40] temp
  kernel k {{i0 < s0, i1 < 40}}
    a0: {t} = load x[i0, i1]
    a1: {t} = {op}
    store y[i0, i1] = a1
  outputs y
"""
_SCATTER = """  buffer x: bf16[s0, 40] input
  buffer j: i64[s0] input
  buffer y: bf16[9, 40] state
  kernel k {i0 < s0, i1 < 40}
    a0: bf16 = load x[i0, i1]
    j0: i64 = load j[i0]
    store.add y[j0, i1] = a0
  outputs y
"""
_SHARED = """  buffer x: f32[s0, 5000] input
  buffer y: f32[s0] state
  buffer z: f32[s0, 5000] temp
  kernel k {i0 < s0, i1 < 5000}
    a0: f32 = load x[i0, i1]
    c: f32 = load y[i0]
    a1: f32 = add a0, c
    d: f32 = add c, 1.0
    store z[i0, i1] = a1
    store y[i0] = d
  outputs z, y
"""
_NESTED = """  symbol s1 in 1..9000000 from dim x 1
  buffer x: f32[s0, s1] input
  buffer y: f32[s0] temp
  kernel k {} reduce {r0 < s0, r1 < s1}
    a0: f32 = load x[r0, r1]
    a1: f32 = sum a0 over r1
    store y[r0] = a1
    a2: f32 = max a1 over r0
    store y[0] = a2
  outputs y
"""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: generate_text(_ROW.format(t="f32", op="fmod a0, 2.0")), "fmod on f32 has no portable spelling"),
        (lambda: generate_text(_ROW.format(t="f64", op="tanh a0")), "tanh on f64 has no portable spelling"),
        (lambda: generate_text(_ROW.format(t="f8e5m2", op="max a0, 0.0"), target=METAX), "metax has no type f8e5m2"),
        (lambda: source("rmsnorm", Schedule("r0", (("r0", 2048),))), "covers 2048 elements of the reduced axis r0"),
        (lambda: source("rmsnorm", Schedule("r0", (("r0", 3000),), ("r0",))), "not a power of two"),
        (lambda: source("rmsnorm", Schedule("r0", (("r0", 4096),), (), 64)), "64 warps of 32 threads"),
        (lambda: source("rmsnorm", Schedule("r0", (("r0", 4096), ("i1", 1024)))), "Triton's limit"),
        (lambda: generate_text(_SCATTER), "no portable atomic add on bf16"),
        (lambda: generate_text(_SHARED), "updated in place by program instances that share"),
        (lambda: generate_text(_NESTED), "nested in the loop"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_with_a_reason(make: Callable[[], object], said: str) -> None:
    with pytest.raises(CodegenError) as caught:
        make()
    assert said in str(caught.value)
    assert caught.value.where


# -- a deleted guard turns a run red ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pool() -> Iterator[Workers]:
    with workers(1) as pool:
        yield pool


def _run(pool: Workers, name: str, size: dict[str, int], change: Callable[[str], str]) -> bool:
    """Whether the kernel with changed text still gives the interpreter's results in the emulator."""
    digest, program = keyed(name)
    made = generate(program, digest, METAX)
    changed = change(made.text)
    assert changed != made.text or change is _nothing
    symbols = {s.name: v for s, v in zip(program.symbols, size.values(), strict=False)}
    tensors = buffers(program, symbols, seed=3)
    if name == "cross_entropy":
        tensors[1][0] = -100  # ignored, and nothing to read at that index
    expected = reference(program, tensors, symbols)
    built = maca.build_sources([(digest, replace(made, text=changed))], METAX, pool)[0]
    try:
        execute_built(built, "generic", tensors, list(symbols.values()))
    except ToolchainError:
        return False
    return all(_same(t, e) for t, e in zip(tensors, expected, strict=True))


def _same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """bf16 almost always to the bit, f32 to rounding."""
    if got.dtype == torch.bfloat16:
        return (got != expected).double().mean().item() < 0.02
    return torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-6)


def _nothing(text: str) -> str:
    return text


@emulated
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rmsnorm_odd", lambda t: t.replace(", mask=m_r0, other=0.0)", ")")),
        ("rmsnorm_odd", lambda t: t.replace(", mask=m_r0)", ")")),
        ("cumsum", lambda t: t.replace("mask=m_i0 & m_r0)", "mask=m_i0)")),
        ("softmax", lambda t: re.sub(r"tl\.where\(m_r0, (\w+), 0\.0\)", r"\1", t)),
        ("row_state", lambda t: t.replace("    tl.debug_barrier()  # every thread has read what is overwritten\n", "")),
        ("residual", lambda t: t.replace("v6 = v5.to(tl.float32)", "v6 = v4")),
        ("silu_mul", lambda t: t.replace("v7 = v6.to(tl.float32)", "v7 = v5")),
        ("cross_entropy", lambda t: re.sub(r"mask=(?:m_i0 & )?v\d+, other=0.0", "mask=None", t)),
    ],
)  # fmt: skip
def test_a_deleted_guard_is_noticed(pool: Workers, name: str, change: Callable[[str], str]) -> None:
    size = {"s0": 3, "s1": 2}
    assert _run(pool, name, size, _nothing)
    assert not _run(pool, name, size, change)


def _code(made: TritonSource) -> str:
    return "\n".join(line for line in made.text.splitlines() if not line.startswith("#"))


def test_every_golden_name_is_a_kernel() -> None:
    assert all(isinstance(isolated(name).steps[0], Kernel) for name in GOLDEN_NAMES)
    assert {p.stem for p in GOLDEN.glob("*.py")} == set(GOLDEN_NAMES)


if __name__ == "__main__":
    for name in sys.argv[1:] or GOLDEN_NAMES:
        (GOLDEN / f"{name}.py").write_text(source(name).text, encoding="utf-8")
