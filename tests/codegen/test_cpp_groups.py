"""C++ of a row that is reduced and then cut into groups: every shape of it against the interpreter, and against two kernels to the bit."""

from __future__ import annotations

import math
import re

import pytest
import torch

from flagtree.codegen.cpp import generate
from flagtree.errors import CodegenError
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Kernel, Program, Reduce
from flagtree.ir.text import parse_program, print_program
from flagtree.passes.canonicalize import Canonicalize
from flagtree.passes.fuse_pointwise import FusePointwise
from flagtree.passes.fusion import fuse
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets import find_target
from tests.codegen.cpp_runner import check_close, check_exact, reference, run, same_bits
from tests.codegen.test_triton_experts import lowered_function

quantise = torch.ops.flagtree.quantise
NUMERICS = "numerics(eager, contract=off, acc=f32)"
HEAD = """program p
  symbol n0 in 0..64 from dim x 0
  buffer x: {dtype}[n0, {width}] input
  buffer w: {dtype}[{width}] weight
"""
NORM = """    v0: {dtype} = load x[i0, {size}*r0 + r1]
    v1: f32 = cast v0
    v2: f32 = mul v1, v1
    v3: f32 = sum v2 over r0, r1
    v4: f32 = div v3, {width}.0
    v5: f32 = add v4, 1e-06
    v6: f32 = rsqrt v5
    v7: f32 = mul v1, v6
    v8: {dtype} = load w[{size}*r0 + r1]
    v9: f32 = cast v8
    v10: f32 = mul v7, v9
"""


def grouped(body: str, outputs: dict[str, str], dtype: str, groups: int, size: int, more: str = "") -> str:
    """A kernel of rows of `groups` groups of `size`; `outputs`: buffer to type and shape."""
    width = groups * size
    buffers = "".join(f"  buffer {name}: {kind} temp\n" for name, kind in outputs.items())
    axes = f"  kernel k {{{{i0 < n0}}}} reduce {{{{r0 < {groups}, r1 < {size}}}}} {NUMERICS}\n"
    text = f"{HEAD}{buffers}{more}{axes}{body}  outputs {', '.join(outputs)}\n"
    return text.format(dtype=dtype, width=width, size=size, groups=groups)


SCALED = NORM + """    v11: f32 = abs v10
    v12: f32 = max v11 over r1
    v13: f32 = max v12, 1e-10
    v14: f32 = div v13, 448.0
    store s[i0, r0] = v14
    v15: f32 = div v10, v14
    v16: f32 = max v15, -448.0
    v17: f32 = min v16, 448.0
    store y[i0, {size}*r0 + r1] = v17
"""  # fmt: skip
SOFTMAX = NORM + """    v11: f32 = max v10 over r1
    v12: f32 = sub v10, v11
    v13: f32 = exp v12
    v14: f32 = sum v13 over r1
    v15: f32 = div v13, v14
    store y[i0, {size}*r0 + r1] = v15
"""  # fmt: skip
# two sums of the row one after the other, a value of the row stored, something dear before, an argmax and a sum of groups
SEVERAL = """    v0: {dtype} = load x[i0, {size}*r0 + r1]
    v1: f32 = cast v0
    v2: f32 = exp v1
    v3: f32 = sum v2 over r0, r1
    v4: f32 = div v3, {width}.0
    v5: f32 = sub v2, v4
    v6: f32 = mul v5, v5
    v7: f32 = sum v6 over r0, r1
    v8: f32 = sqrt v7
    store n[i0] = v8
    v9: {dtype} = cast v5
    store c[i0, {size}*r0 + r1] = v9
    v10: i64 = index r1
    (v11: f32, v12: i64) = argmax v2, v10 over r1
    store at[i0, r0] = v12
    v13: f32 = add v5, v11
    v14: f32 = sum v13 over r1
    v15: f32 = mul v14, v8
    v16: f32 = add v13, v15
    store y[i0, {size}*r0 + r1] = v16
"""
ROW, ELEMENTS, SCALES = "f32[n0]", "f32[n0, {width}]", "f32[n0, {groups}]"
KINDS = {
    "scaled": (SCALED, {"s": SCALES, "y": ELEMENTS}),
    "softmax": (SOFTMAX, {"y": ELEMENTS}),
    "several": (SEVERAL, {"n": ROW, "c": "{dtype}[n0, {width}]", "at": "i64[n0, {groups}]", "y": ELEMENTS}),
}


def inputs(dtype: str, rows: int, width: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=g) * torch.rand(rows, 1, generator=g)
    return {"x": x.to(torch_dtype(dtype)), "w": torch.randn(width, generator=g).to(torch_dtype(dtype))}


@pytest.mark.parametrize(("kind", "dtype", "groups", "size"), [
    ("scaled", "bf16", 24, 128), ("scaled", "f32", 7, 1), ("scaled", "bf16", 2100, 2), ("scaled", "bf16", 3, 47),
    ("softmax", "bf16", 5, 32), ("softmax", "f16", 2, 33), ("several", "f32", 3, 128), ("several", "bf16", 2, 2304),
    ("several", "f32", 3, 31),
])  # fmt: skip
def test_rows_in_groups(kind: str, dtype: str, groups: int, size: int) -> None:
    """Equal at every level, nothing outside touched; rows of none, one and several, groups that are no multiple of a vector, and so many
    that their values are no array."""
    text = grouped(*KINDS[kind], dtype, groups, size)
    for rows in (0, 1, 3):
        check_close(text, inputs(dtype, rows, groups * size), {"n0": rows}, shift=1)


def test_what_is_not_finite_stays_in_its_row_or_group() -> None:
    given = inputs("f32", 6, 384)
    x = given["x"]
    x[1] = 0.0
    x[2, 5], x[3, 200], x[4, 383] = math.nan, math.inf, -math.inf
    given["w"][128:256] = 0.0
    found = check_close(grouped(*KINDS["scaled"], "f32", 3, 128), given, {"n0": 6})
    assert found["s"][2].isnan().all() and found["s"][1].tolist() == pytest.approx([1e-10 / 448] * 3)
    assert found["s"][0, 1].item() == pytest.approx(1e-10 / 448)


def test_a_state_is_read_before_it_is_written() -> None:
    """The row's buffer, the groups' and the elements' are rewritten; what was there is read after a group's maximum."""
    body = """    v0: f32 = load h[i0, r0, r1]
    v1: f32 = load x[i0, 128*r0 + r1]
    v2: f32 = add v0, v1
    v3: f32 = sum v2 over r0, r1
    v4: f32 = load before[i0, r0]
    v5: f32 = mul v2, v3
    v6: f32 = max v5 over r1
    v7: f32 = max v6, v4
    store before[i0, r0] = v7
    store h[i0, r0, r1] = v2
    v8: f32 = mul v2, v4
    v9: f32 = add v8, v7
    store y[i0, r0, r1] = v9
"""
    states = "  buffer h: f32[n0, 3, 128] state\n  buffer before: f32[n0, 3] state\n"
    text = grouped(body, {"y": "f32[n0, 3, 128]"}, "f32", 3, 128, states).replace("outputs y", "outputs y, h, before")
    given = inputs("f32", 4, 384)
    g = torch.Generator().manual_seed(3)
    given |= {"h": torch.randn(4, 3, 128, generator=g), "before": torch.randn(4, 3, generator=g)}
    given["x"][:] = given["x"].round()  # sums of small integers are exact in any order
    given["h"][:] = (given["h"] * 4).round()
    check_exact(text, {n: given[n] for n in ("x", "h", "before")}, {"n0": 4})


def test_rows_behind_one_another_in_memory() -> None:
    text = grouped(*KINDS["scaled"], "f32", 3, 32).replace("f32[n0, 96] input", "f32[n0, 96] input strides(1, n0)")
    given = inputs("f32", 5, 96)
    check_close(text, given | {"x": given["x"].T.contiguous().T}, {"n0": 5})


@pytest.mark.parametrize("body", [
    "    v0: f32 = load x[i0, 128*r0 + r1]\n    v1: f32 = max v0 over r1\n    v2: f32 = sum v0 over r0\n    store y[i0, r0] = v1\n"
    "    store z[i0, r1] = v2\n",
    "    v0: f32 = load x[i0, 128*r0 + r1]\n    v1: f32 = max v0 over r1\n    v2: f32 = sub v0, v1\n    v3: f32 = sum v2 over r0, r1\n"
    "    store y[i0, r0] = v1\n    store z[i0, r1] = v3\n",
], ids=["across", "a row of its groups"])  # fmt: skip
def test_other_nests_are_refused(body: str) -> None:
    text = grouped(body, {"y": "f32[n0, 3]", "z": "f32[n0, 128]"}, "f32", 3, 128)
    with pytest.raises(CodegenError, match="neither agree nor are a row's"):
        generate(parse_program(text), "0" * 64)


# -- joined by the pipeline --------------------------------------------------------------------------------------------
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def quantised(x, weight):
    return quantise(norm(x, weight), 128, torch.float8_e4m3fn)


def integers(x, weight):
    return quantise(norm(x, weight), 128, torch.int8)


def with_residual(x, weight):
    added = x + weight
    plain = norm(added, weight)
    return (added, plain, *quantise(plain, 128, torch.float8_e4m3fn))


def dear_before(x, weight):
    return quantised(torch.nn.functional.silu(x), weight)


def normed_twice(x, weight):
    return (norm(norm(x, weight).unflatten(-1, (-1, 128)), weight[:128]),)


def rows_of(dtype: torch.dtype, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With zeros, a group of zeros, numbers under the least scale, infinities and NaN where there are rows for them."""
    g = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=g) * torch.logspace(-8, 8, max(rows, 1))[:rows, None]
    special = [(slice(None), 0.0), (slice(128, 256), 0.0), (slice(None), 1e-20), (7, math.nan), (140, math.inf)]
    for row, (place, value) in enumerate(special[: rows - 1]):
        x[row + 1, place] = value
    return x.to(dtype), torch.randn(width, generator=g).to(dtype)


def results(program: Program, given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What the program's kernels give, one after the other, equal at every level."""
    known = dict(zip((b.name for b in program.buffers if b.role == "input"), given, strict=True))
    for step in program.steps:
        assert isinstance(step, Kernel)
        known |= run(print_program(program.with_(steps=(step,), outputs=step.writes)), {n: known[n] for n in step.reads})
    return [known[n] for n in program.outputs if n is not None]


@pytest.mark.parametrize(("function", "dtype", "rows", "width"), [
    (quantised, torch.bfloat16, 8, 3072), (integers, torch.float16, 6, 384), (with_residual, torch.bfloat16, 1, 256),
    (with_residual, torch.float32, 7, 9216), (dear_before, torch.bfloat16, 6, 3072), (normed_twice, torch.bfloat16, 8, 256),
])  # fmt: skip
def test_one_kernel_gives_the_bits_of_two(function, dtype: torch.dtype, rows: int, width: int) -> None:
    """Where the groups are added up, in a norm of theirs, within the bits of two orders of the same sum."""
    chip, given = find_target("cpu"), rows_of(dtype, rows, width)
    lowered = lowered_function(function, given)
    one, _ = run_pipeline(lowered, pipeline(chip), chip)
    apart, _ = run_pipeline(lowered, (Canonicalize(), FusePointwise()), chip)
    two, _ = fuse(apart, "apart", None, 512, lambda a, b: True, heads=True)
    assert (len(one.steps), len(two.steps)) == (1, 2)
    (kernel,) = one.steps
    assert {op.axes for op in kernel.body if isinstance(op, Reduce)} == {("r0", "r1"), ("r1",)}  # type: ignore[union-attr]
    assert set(kernel.reads) == {b.name for b in one.buffers if b.role == "input"} and set(kernel.writes) == set(one.outputs)
    for a, b in zip(results(one, given), results(two, given), strict=True):
        if function is normed_twice and dtype is not torch.float32:
            torch.testing.assert_close(a, b, rtol=2**-7, atol=0, equal_nan=True)
        else:
            assert same_bits(a, b)


def test_what_is_read_back_is_not_computed_again() -> None:
    """The row's sum with its residual is loaded from where it was stored; what is dear is kept in an array of its own type."""
    chip = find_target("cpu")
    for function, arrays in ((with_residual, ["f32"]), (dear_before, ["f32", "u16", "u16"])):  # the scales, and elements of bf16
        program, _ = run_pipeline(lowered_function(function, rows_of(torch.bfloat16, 4, 3072)), pipeline(chip), chip)
        text = generate(parse_program(print_program(program)), "0" * 64)
        assert sorted(re.findall(r"alignas\(64\) (\w+) \w+_handed", text)) == arrays
        assert text[text.index("static void rows") :].count("exp_of(") == (function is dear_before)


def test_the_interpreter_agrees() -> None:
    """Of a joined kernel as text, e4m3fn included."""
    chip, given = find_target("cpu"), rows_of(torch.bfloat16, 8, 256)
    program, _ = run_pipeline(lowered_function(quantised, given), pipeline(chip), chip)
    text, named = print_program(program), dict(zip(("given_0", "given_1"), given, strict=True))
    ours, theirs = run(text, named), reference(text, named)
    for name, value in ours.items():
        off = value.float().nan_to_num(-1.0) != theirs[name].float().nan_to_num(-1.0)
        assert off.float().mean() < 0.02, name  # a sum in another order may round otherwise
