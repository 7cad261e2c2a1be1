"""Reductions and scans in C++: every combiner, every place of the reduced axes, sizes around the vector widths, special values."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.codegen.cpp import generate
from flagtree.errors import CodegenError
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.text import parse_program
from tests.codegen.cpp_runner import check_close, check_exact, reference, run
from tests.codegen.test_cpp_ops import values

SIZES = (1, 2, 15, 16, 17, 33, 127, 128, 1000, 4097)
FLOAT_COMBINERS = ("sum", "prod", "min", "max")


def row_kernel(combiner: str, dtype: str, accumulator: str = "f32") -> str:
    wide = dtype if dtype in ("f64", "i64", "i32", "b1") else "f32" if dtype.startswith(("f", "bf")) else "i64"
    return f"""program p
  symbol n0 in 0..4096 from dim x 0
  symbol n1 in 0..8192 from dim x 1
  buffer x: {dtype}[n0, n1] input
  buffer y: {wide}[n0] temp
  kernel k {{i0 < n0}} reduce {{r0 < n1}} numerics(eager, contract=off, acc={accumulator})
    v0: {dtype} = load x[i0, r0]
    v1: {wide} = cast v0
    v2: {wide} = {combiner} v1 over r0
    store y[i0] = v2
  outputs y
"""


@pytest.mark.parametrize("combiner", FLOAT_COMBINERS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_rows_of_floats(combiner: str, dtype: str) -> None:
    g = torch.Generator().manual_seed(1)
    for size in SIZES:
        x = (torch.rand(3, size, generator=g) + 0.5 if combiner == "prod" else torch.randn(3, size, generator=g)).to(torch_dtype(dtype))
        if combiner == "prod" and size > 1000:
            x = x.clamp(0.99, 1.01)
        (check_exact if combiner in ("min", "max") else check_close)(row_kernel(combiner, dtype), {"x": x}, {"n0": 3, "n1": size})


@pytest.mark.parametrize("combiner", ["sum", "prod", "min", "max"])
@pytest.mark.parametrize("dtype", ["i64", "i32", "i16", "u8", "i8"])
def test_rows_of_integers(combiner: str, dtype: str) -> None:
    for size in (1, 16, 33, 1000):
        check_exact(row_kernel(combiner, dtype), {"x": values(dtype, 2 * size, 3).view(2, size)}, {"n0": 2, "n1": size})


@pytest.mark.parametrize("combiner", ["any", "all", "min", "max"])
def test_rows_of_bools(combiner: str) -> None:
    for size in (1, 16, 17, 100):
        for share in (0.0, 0.02, 0.98, 1.0):
            x = torch.rand(5, size, generator=torch.Generator().manual_seed(size)) < share
            check_exact(row_kernel(combiner, "b1"), {"x": x}, {"n0": 5, "n1": size})


@pytest.mark.parametrize("combiner", ["sum", "prod", "any", "all"])
def test_empty_row_gives_the_identity(combiner: str) -> None:
    dtype = "b1" if combiner in ("any", "all") else "f32"
    x = torch.empty(3, 0, dtype=torch_dtype(dtype))
    got = run(row_kernel(combiner, dtype), {"x": x}, {"n0": 3, "n1": 0})["y"]
    assert got.tolist() == [{"sum": 0.0, "prod": 1.0, "any": False, "all": True}[combiner]] * 3
    assert run(row_kernel(combiner, dtype), {"x": x[:0]}, {"n0": 0, "n1": 0})["y"].shape == (0,)


@pytest.mark.parametrize("combiner", ["min", "max", "sum"])
def test_nan_and_infinities(combiner: str) -> None:
    for where in (0, 15, 16, 40):
        for special in (math.nan, math.inf, -math.inf):
            x = torch.randn(2, 41, generator=torch.Generator().manual_seed(where))
            x[0, where] = special
            (check_close if combiner == "sum" else check_exact)(row_kernel(combiner, "f32"), {"x": x}, {"n0": 2, "n1": 41})


def column_kernel(combiner: str, dtype: str, strides: str = "") -> str:
    return f"""program p
  symbol n0 in 0..4096 from dim x 0
  symbol n1 in 0..8192 from dim x 1
  buffer x: {dtype}[n0, n1] input{strides}
  buffer y: f32[n1] temp
  kernel k {{i0 < n1}} reduce {{r0 < n0}} numerics(eager, contract=off, acc=f32)
    v0: {dtype} = load x[r0, i0]
    v1: f32 = cast v0
    v2: f32 = {combiner} v1 over r0
    store y[i0] = v2
  outputs y
"""


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("combiner", ["sum", "max"])
def test_columns(combiner: str, dtype: str) -> None:
    for rows, columns in ((1, 1), (7, 15), (33, 16), (100, 17), (5, 300), (64, 600)):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch_dtype(dtype))
        check_close(column_kernel(combiner, dtype), {"x": x}, {"n0": rows, "n1": columns})


def test_long_sums_stay_accurate() -> None:
    """Positive terms, where a plain running sum drifts: partial sums per column are joined in blocks."""
    x = torch.rand(4096, 70, generator=torch.Generator().manual_seed(0))
    check_close(column_kernel("sum", "f32"), {"x": x}, {"n0": 4096, "n1": 70})
    check_close(row_kernel("sum", "f32"), {"x": x.view(35, 8192)}, {"n0": 35, "n1": 8192})


def test_softmax_of_a_row_too_long_for_the_stack() -> None:
    text = softmax_kernel("f32").replace("..8192", "..500000")
    assert "_row[" in generate(parse_program(softmax_kernel("f32")), "0" * 64)
    assert "_row[" not in generate(parse_program(text), "0" * 64)
    x = 5 * torch.randn(24, 50001, generator=torch.Generator().manual_seed(0))
    check_close(text, {"x": x}, {"n0": 24, "n1": 50001})


def test_transposed_input_reduces_along_its_contiguous_axis() -> None:
    x = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).t()
    check_close(column_kernel("sum", "f32", " strides(1, n0)"), {"x": x}, {"n0": 70, "n1": 50})


BATCH_NORM = """program p
  symbol n0 in 1..64 from dim x 0
  symbol n1 in 1..64 from dim x 1
  symbol n2 in 1..4096 from dim x 2
  buffer x: f32[n0, n1, n2] input
  buffer mean: f32[n1] temp
  buffer top: f32[n1] temp
  kernel k {i0 < n1} reduce {r0 < n0, r1 < n2} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[r0, i0, r1]
    v1: f32 = sum v0 over r0, r1
    v2: f32 = max v0 over r0, r1
    store mean[i0] = v1
    store top[i0] = v2
  outputs mean, top
"""


def test_several_reduced_axes_that_do_not_join() -> None:
    for shape in ((2, 3, 5), (4, 5, 49), (3, 2, 16), (1, 1, 1)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        check_close(BATCH_NORM, {"x": x}, dict(zip(("n0", "n1", "n2"), shape, strict=True)))


def test_sum_of_everything() -> None:
    text = """program p
  symbol n0 in 1..64 from dim x 0
  symbol n1 in 1..4096 from dim x 1
  buffer x: f32[n0, n1] input
  buffer y: f32[] temp
  kernel k {} reduce {r0 < n0, r1 < n1} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[r0, r1]
    v1: f32 = sum v0 over r0, r1
    store y[] = v1
  outputs y
"""
    check_close(text, {"x": torch.randn(9, 123, generator=torch.Generator().manual_seed(0))}, {"n0": 9, "n1": 123})


def pair_kernel(combiner: str, dtype: str = "f32") -> str:
    return f"""program p
  symbol n0 in 0..4096 from dim x 0
  symbol n1 in 1..8192 from dim x 1
  buffer x: {dtype}[n0, n1] input
  buffer y: {dtype}[n0] temp
  buffer z: i64[n0] temp
  kernel k {{i0 < n0}} reduce {{r0 < n1}} numerics(eager, contract=off, acc=f32)
    v0: {dtype} = load x[i0, r0]
    v1: i64 = index r0
    (v2: {dtype}, v3: i64) = {combiner} v0, v1 over r0
    store y[i0] = v2
    store z[i0] = v3
  outputs y, z
"""


@pytest.mark.parametrize("combiner", ["argmax", "argmin"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i64", "i32", "f64"])
def test_arg_reductions_take_the_first(combiner: str, dtype: str) -> None:
    for size in (1, 15, 16, 17, 500):
        x = torch.randint(-3, 4, (6, size), generator=torch.Generator().manual_seed(size)).to(torch_dtype(dtype))
        if dtype in ("f32", "bf16", "f64"):
            x[1, size // 2] = math.nan
            x[1, size - 1] = math.nan
            x[2] = -math.inf
            x[3] = math.inf
        got = run(pair_kernel(combiner, dtype), {"x": x}, {"n0": 6, "n1": size})
        truth = getattr(torch, combiner)(x.float() if dtype == "bf16" else x, -1)
        wins = [(row != row) if bool((row != row).any()) else row == row[best] for row, best in zip(x, truth, strict=True)]
        first = [int(w.nonzero()[0]) for w in wins]
        assert got["z"].tolist() == first
        assert torch.equal(got["y"].nan_to_num(99), x[torch.arange(6), torch.tensor(first)].nan_to_num(99))


LAYER_NORM = """program p
  symbol n0 in 0..4096 from dim x 0
  symbol n1 in 1..8192 from dim x 1
  buffer x: f32[n0, n1] input
  buffer w: f32[n1] weight
  buffer y: f32[n0, n1] temp
  buffer m: f32[n0] temp
  kernel k {i0 < n0} reduce {r0 < n1} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, r0]
    v1: f32 = cast 0.0
    v2: f32 = cast 1.0
    (v3: f32, v4: f32, v5: f32) = welford v0, v1, v2 over r0
    v6: f32 = div v4, v5
    v7: f32 = add v6, 1e-05
    v8: f32 = rsqrt v7
    v9: f32 = sub v0, v3
    v10: f32 = mul v9, v8
    v11: f32 = load w[r0]
    v12: f32 = mul v10, v11
    store y[i0, r0] = v12
    store m[i0] = v3
  outputs y, m
"""


def test_welford_layer_norm() -> None:
    for size in SIZES:
        g = torch.Generator().manual_seed(size)
        x, w = torch.randn(4, size, generator=g) + 3, torch.randn(size, generator=g)
        got = run(LAYER_NORM, {"x": x, "w": w}, {"n0": 4, "n1": size})
        truth = torch.nn.functional.layer_norm(x.double(), (size,), w.double())
        torch.testing.assert_close(got["y"].double(), truth, rtol=2e-5, atol=2e-5 if size > 1 else 1e-2)
        check_close(LAYER_NORM, {"x": x, "w": w}, {"n0": 4, "n1": size}) if size > 2 else None


def softmax_kernel(dtype: str) -> str:
    return f"""program p
  symbol n0 in 0..4096 from dim x 0
  symbol n1 in 1..8192 from dim x 1
  buffer x: {dtype}[n0, n1] input
  buffer y: {dtype}[n0, n1] temp
  kernel k {{i0 < n0}} reduce {{r0 < n1}} numerics(eager, contract=off, acc=f32)
    v0: {dtype} = load x[i0, r0]
    v1: f32 = cast v0
    v2: f32 = max v1 over r0
    v3: f32 = sub v1, v2
    v4: f32 = exp v3
    v5: f32 = sum v4 over r0
    v6: f32 = div v4, v5
    v7: {dtype} = cast v6
    store y[i0, r0] = v7
  outputs y
"""


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_softmax(dtype: str) -> None:
    for size in SIZES:
        x = (5 * torch.randn(60, size, generator=torch.Generator().manual_seed(size))).to(torch_dtype(dtype))
        if size > 1:
            x[1, size // 2] = -math.inf
        check_close(softmax_kernel(dtype), {"x": x}, {"n0": 60, "n1": size})


def test_softmax_in_place_reads_old_values() -> None:
    text = softmax_kernel("f32").replace("  buffer y: f32[n0, n1] temp\n", "")
    text = text.replace("store y", "store x").replace("outputs y", "outputs x")
    for size in (5, 16, 100):
        x = torch.randn(60, size, generator=torch.Generator().manual_seed(size))
        got = check_close(text, {"x": x}, {"n0": 60, "n1": size})["x"]
        torch.testing.assert_close(got, torch.softmax(x, -1), rtol=1e-5, atol=1e-7)


def test_residual_updated_in_place_before_the_norm_reads_it_again() -> None:
    text = """program p
  symbol n0 in 0..4096 from dim x 0
  symbol n1 in 1..8192 from dim x 1
  buffer x: bf16[n0, n1] input
  buffer h: bf16[n0, n1] state
  buffer y: bf16[n0, n1] temp
  kernel k {i0 < n0} reduce {r0 < n1} numerics(eager, contract=off, acc=f32)
    v0: bf16 = load x[i0, r0]
    v1: bf16 = load h[i0, r0]
    v2: f32 = cast v0
    v3: f32 = cast v1
    v4: f32 = add v2, v3
    v5: bf16 = cast v4
    store h[i0, r0] = v5
    v6: f32 = cast v5
    v7: f32 = mul v6, v6
    v8: f32 = sum v7 over r0
    v9: f32 = rsqrt v8
    v10: f32 = mul v6, v9
    v11: bf16 = cast v10
    store y[i0, r0] = v11
  outputs y
"""
    for size in (1, 16, 31, 200):
        g = torch.Generator().manual_seed(size)
        inputs = {n: torch.randn(4, size, generator=g).bfloat16() for n in "xh"}
        got = check_close(text, inputs, {"n0": 4, "n1": size})
        assert torch.equal(got["h"], inputs["x"] + inputs["h"])


def test_online_softmax_state() -> None:
    text = """program p
  symbol n0 in 0..4096 from dim x 0
  symbol n1 in 1..8192 from dim x 1
  buffer x: f32[n0, n1] input
  buffer y: f32[n0] temp
  kernel k {i0 < n0} reduce {r0 < n1} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, r0]
    v1: f32 = cast 1.0
    (v2: f32, v3: f32) = online_softmax v0, v1 over r0
    v4: f32 = log v3
    v5: f32 = add v2, v4
    store y[i0] = v5
  outputs y
"""
    for size in (1, 16, 100, 5000):
        x = 10 * torch.randn(4, size, generator=torch.Generator().manual_seed(size))
        x[1, 0] = -math.inf
        x[2, size // 2] = math.inf
        x[3, :] = -math.inf
        got = run(text, {"x": x}, {"n0": 4, "n1": size})["y"]
        theirs = reference(text, {"x": x}, {"n0": 4, "n1": size})["y"]
        torch.testing.assert_close(got, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(got[:2], torch.logsumexp(x[:2], -1), rtol=1e-6, atol=1e-6)


def scan_kernel(combiner: str, dtype: str, axis: int, source: str) -> str:
    index = "i0, r0" if axis == 1 else "r0, i0"
    parallel, reduced = ("n0", "n1") if axis == 1 else ("n1", "n0")
    return f"""program p
  symbol n0 in 0..4096 from dim x 0
  symbol n1 in 0..8192 from dim x 1
  buffer x: {source}[n0, n1] input
  buffer y: {dtype}[n0, n1] temp
  kernel k {{i0 < {parallel}}} reduce {{r0 < {reduced}}} numerics(eager, contract=off, acc=f32)
    v0: {source} = load x[{index}]
    v1: {dtype} = cast v0
    v2: {dtype} = scan.{combiner} v1 over r0
    store y[{index}] = v2
  outputs y
"""


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("combiner", "dtype", "source"), [
    ("sum", "f32", "f32"), ("sum", "f32", "bf16"), ("sum", "i64", "i64"), ("sum", "i64", "b1"),
    ("prod", "f32", "f32"), ("max", "f32", "f32"), ("min", "i32", "i32"), ("any", "b1", "b1"),
])  # fmt: skip
def test_scan(combiner: str, dtype: str, source: str, axis: int) -> None:
    for shape in ((3, 1), (2, 17), (19, 40), (0, 3), (3, 0)):
        x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).to(torch_dtype(source))
        if dtype == "f32":
            x = (torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(torch_dtype(source))
        check = check_close if dtype == "f32" and combiner in ("sum", "prod") else check_exact
        check(scan_kernel(combiner, dtype, axis, source), {"x": x}, {"n0": shape[0], "n1": shape[1]})


def test_running_sums_of_long_rows() -> None:
    """Blocks of a fixed tree: rows of many blocks and a part of one, infinities and NaN in them, a sum in f64 that goes one by one."""
    x = torch.randn((5, 1003), generator=torch.Generator().manual_seed(3))
    text = scan_kernel("sum", "f32", 1, "f32")
    check_close(text, {"x": x}, {"n0": 5, "n1": 1003})
    x[1, 700], x[2, 9], x[2, 10], x[3, 501] = math.inf, math.inf, -math.inf, math.nan
    x[4] = 3e38
    check_close(text, {"x": x}, {"n0": 5, "n1": 1003})
    check_exact(scan_kernel("sum", "f64", 1, "f64"), {"x": x.double() * 1e200}, {"n0": 5, "n1": 1003})


def test_division_by_a_rows_value_gives_the_quotients_bits() -> None:
    """Every kind of divisor against dividends of every size: what the reciprocal may do and what it must leave to the instruction."""
    text = """program p
  buffer x: f32[96, 4096] input
  buffer d: f32[96] input
  buffer y: f32[96, 4096] temp
  kernel k {i0 < 96, i1 < 4096} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1]
    v1: f32 = load d[i0]
    v2: f32 = div v0, v1
    store y[i0, i1] = v2
  outputs y
"""
    g = torch.Generator().manual_seed(11)
    x = torch.randn((96, 4096), generator=g)
    x[:, :1024] = torch.randint(0, 2**31, (96, 1024), generator=g).to(torch.int32).view(torch.float32)  # any bits
    x[:, 1024:2048] *= torch.exp2(torch.randint(-90, 90, (96, 1), generator=g).float())
    x[::7, ::3] = 0.0
    d = torch.randn(96, generator=g) * torch.exp2(torch.randint(-26, 27, (96,), generator=g).float())
    mantissas = torch.tensor([0x3FFFFFFF, 0x3F800001, 0x3F800000, 0x40000000, 0x33000000, 0x4B800000, 0x7F7FFFFF, 0x00000001])
    special = mantissas.to(torch.int32).view(torch.float32)
    d[:12] = torch.cat([special, torch.tensor([0.0, -0.0, math.inf, math.nan])])
    check_exact(text, {"x": x, "d": d})


def test_reductions_over_different_axes_are_refused() -> None:
    text = """program p
  symbol n0 in 1..8 from dim x 0
  buffer x: f32[n0, 5] input
  buffer y: f32[] temp
  kernel k {} reduce {r0 < n0, r1 < 5} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[r0, r1]
    v1: f32 = max v0 over r1
    v2: f32 = sum v1 over r0
    store y[] = v2
  outputs y
"""
    with pytest.raises(CodegenError, match="neither agree nor are a row's"):
        generate(parse_program(text), "0" * 64)
