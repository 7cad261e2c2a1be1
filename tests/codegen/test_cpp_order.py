"""What has the bits of eager on the CPU: sums of f32 along a row, whatever the length, the bound on it, the element type and the level;
norms made of them; functions of bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flagtree.codegen import cpp_order
from flagtree.runtime.compile import backend
from tests.codegen.cpp_runner import run, same_bits

LENGTHS = (0, 1, 3, 4, 5, 6, 7, 8, 9, 15, 16, 23, 31, 32, 33, 63, 64, 100, 128, 511, 512, 513, 1000, 1027, 4096, 8191)
LONG = (cpp_order.BLOCK * 16, cpp_order.BLOCK * 17 - 1, cpp_order.BLOCK * 17, cpp_order.BLOCK * 257 + 5, 300_001)


def kernel(dtype: str, longest: int, length: int | None = None, body: str = "v2: f32 = ordered.sum v1 over r0") -> str:
    """Rows of `length` elements, of at most `longest` where it is left open."""
    symbol = f"  symbol n1 in 0..{longest} from dim x 1\n" if length is None else ""
    size = "n1" if length is None else length
    return f"""program p
  symbol n0 in 0..4096 from dim x 0
{symbol}  buffer x: {dtype}[n0, {size}] input
  buffer y: f32[n0] temp
  kernel k {{i0 < n0}} reduce {{r0 < {size}}} numerics(eager, contract=off, acc=f32)
    v0: {dtype} = load x[i0, r0]
    v1: f32 = cast v0
    {body}
    store y[i0] = v2
  outputs y
"""


def sums(x: torch.Tensor, longest: int, static: bool = False) -> torch.Tensor:
    """Ours."""
    rows, length = x.shape
    text = kernel({torch.float32: "f32", torch.bfloat16: "bf16"}[x.dtype], longest, length if static else None)
    return run(text, {"x": x}, {"n0": rows} if static else {"n0": rows, "n1": length})["y"]


def drawn(rows: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(length)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("longest", [512, 8703, 100_000, 1 << 40])
def test_rows_of_any_length(dtype: torch.dtype, longest: int) -> None:
    for length in (n for n in (*LENGTHS, *LONG) if n <= longest):
        x = drawn(3, length, dtype)
        assert same_bits(sums(x, longest), x.float().sum(-1)), length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("length", [5, 8, 40, 64, 96, 128, 544, 1024, 3072, 4096, 8704, 8736, 131_584])
def test_rows_of_a_known_length(dtype: torch.dtype, length: int) -> None:
    x = drawn(5, length, dtype)
    assert same_bits(sums(x, 0, static=True), x.float().sum(-1))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), length=st.integers(0, 20_000), scale=st.sampled_from([1e-30, 1.0, 1e30]), pairs=st.booleans())
def test_any_rows(rows: int, length: int, scale: float, pairs: bool) -> None:
    x = (drawn(rows, length, torch.float32) * scale).to(torch.bfloat16 if pairs else torch.float32)
    assert same_bits(sums(x, 1 << 40), x.float().sum(-1))


def test_a_sum_without_an_order_has_other_bits() -> None:
    """Else these tests would prove nothing."""
    x = drawn(64, 1000, torch.float32)
    plain = run(kernel("f32", 8191, body="v2: f32 = sum v1 over r0"), {"x": x}, {"n0": 64, "n1": 1000})["y"]
    assert not torch.equal(plain, x.sum(-1))


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, -0.0])
def test_special_values(special: float) -> None:
    for length, where in ((41, 40), (41, 3), (7, 6), (1025, 1024), (600, 511)):
        x = torch.full((2, length), -0.0) if special == 0 else drawn(2, length, torch.float32)
        x[0, where] = special
        assert same_bits(sums(x, 8191), x.sum(-1)), (length, where)


@pytest.mark.parametrize("length", [20, 64, 1000, 1027, 9001])
def test_beside_other_reductions(length: int) -> None:
    """One walk feeds the states of all; what is left of a row reaches each."""
    body = """v3: f32 = max v1 over r0
    v4: f32 = ordered.sum v1 over r0
    v5: f32 = sum v1 over r0
    v6: f32 = mul v5, 0.0
    v7: f32 = add v4, v6
    v2: f32 = add v7, v3"""
    x = drawn(3, length, torch.float32)
    got = run(kernel("f32", 1 << 40, body=body), {"x": x}, {"n0": 3, "n1": length})["y"]
    assert same_bits(got, x.sum(-1) + x.amax(-1))


def test_rows_of_several_axes() -> None:
    """Where a row is no single walk the order is ours; every element counts once."""
    text = """program p
  symbol n0 in 0..64 from dim x 0
  symbol n1 in 0..64 from dim x 1
  symbol n2 in 0..4096 from dim x 2
  buffer x: f32[n0, n1, n2] input strides (n1*n2*2, n2*2, 1)
  buffer y: f32[n0] temp
  kernel k {i0 < n0} reduce {r0 < n1, r1 < n2} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, r0, r1]
    v1: f32 = ordered.sum v0 over r0, r1
    store y[i0] = v1
  outputs y
"""
    for heads, length in ((1, 100), (3, 33), (7, 700), (2, 1024)):
        x = torch.randn(4, heads, 2 * length, generator=torch.Generator().manual_seed(length))[..., :length]
        got = run(text, {"x": x}, {"n0": 4, "n1": heads, "n2": length})["y"]
        torch.testing.assert_close(got.double(), x.double().sum((1, 2)), rtol=0, atol=1e-4)


def _by_hand(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, w.shape, w, 1e-6)


def _shares(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """As a router weighs the experts that it chose."""
    positive = x.float().abs()
    return positive / positive.sum(-1, keepdim=True)


def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend)


@pytest.mark.parametrize("norm", [_by_hand, _rms_norm, _shares])
@pytest.mark.parametrize("width", [6, 80, 128, 1027, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_compiled_norms_have_the_bits_of_eager(norm: Callable[..., torch.Tensor], width: int, dtype: torch.dtype) -> None:
    x, w = drawn(64, width, dtype), 1 + 0.1 * drawn(1, width, dtype)[0]
    assert same_bits(compiled(norm)(x, w), norm(x, w))


FUNCTIONS: tuple[Callable[..., torch.Tensor], ...] = (
    torch.exp, torch.exp2, torch.expm1, torch.log, torch.log1p, torch.log2, torch.tanh, torch.sin, torch.cos, torch.sigmoid,
    torch.nn.functional.silu, torch.nn.functional.softplus, torch.nn.functional.mish, torch.nn.functional.elu,
)  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_bf16_has_the_bits_of_eager(function: Callable[..., torch.Tensor]) -> None:
    """Our functions of f32 are not eager's, but none is so far off that one of the 65 536 results would round to another bf16."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert same_bits(compiled(function)(x), function(x))
