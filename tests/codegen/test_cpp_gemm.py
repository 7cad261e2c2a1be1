"""The product of a few rows: every level gives the same bits, near to float64, and touches nothing beyond its operands."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.check.gate import OF_MAGNITUDE, TIMES_EAGER
from flagtree.codegen.cpp import generate
from flagtree.errors import CodegenError
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.gemm import DEPTH, product
from flagtree.ir.text import parse_program, print_program
from flagtree.ir.verify import verify
from tests.codegen.cpp_runner import reference, run
from tests.runtime.equal_to_eager import compare

TYPES = ("f32", "bf16", "f16")
SIZES = ((16, 32), (17, 65), (23, 95), (70, 1000), (64, 4096), (130, 127))
ROWS = (1, 2, 3, 4, 5, 7, 67)  # more than a block of rows


def ours(dtype: str, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, shift: int = 0) -> torch.Tensor:
    symbols = {"n0": x.shape[0], "n1": w.shape[0], "n2": w.shape[1], "n3": x.stride(0)}
    text = print_program(product(dtype, 80, bias is not None))
    return run(text, {"b0": x, "b1": w} | ({} if bias is None else {"b2": bias}), symbols, shift)["b2" if bias is None else "b3"]


def near(x: torch.Tensor, w: torch.Tensor, have: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    exact = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    compare(torch.nn.functional.linear(x, w, bias), have, exact, f"{tuple(x.shape)} {tuple(w.shape)}")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_every_shape_of_tile_and_tail(dtype: str, rows: int) -> None:
    torch.manual_seed(rows)
    kind = torch_dtype(dtype)
    for k, (columns, depth) in enumerate(SIZES):
        x = torch.randn(rows, depth + k, dtype=kind)[:, :depth]  # rows further apart than they are long
        w = torch.randn(columns, depth, dtype=kind)
        bias = torch.randn(columns, dtype=kind) if k % 2 else None
        near(x, w, ours(dtype, x, w, bias, shift=k % 3), bias)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("kind", ["wide", "tiny", "cancelling", "zero"])
def test_levels_agree_where_rounding_is_hard(dtype: str, kind: str) -> None:
    torch.manual_seed(5)
    x, w = torch.randn(3, 200), torch.randn(20, 200)
    if kind == "wide":
        x, w = x * 10.0 ** torch.randint(-18, 18, x.shape), w * 10.0 ** torch.randint(-18, 18, w.shape)
    if kind == "tiny":  # products below the smallest normal number
        x, w = x * 1e-21, w * 1e-20
    if kind == "cancelling":
        x[:, 1::2], w[:, 1::2] = x[:, ::2], -w[:, ::2]
    if kind == "zero":
        x[:, 50:] = -0.0
    found = ours(dtype, x.to(torch_dtype(dtype)), w.to(torch_dtype(dtype)))  # `run` compares the levels bit by bit
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_and_infinity_reach_what_depends_on_them_only(dtype: str) -> None:
    kind = torch_dtype(dtype)
    x, w = torch.ones(4, 67, dtype=kind), torch.ones(18, 67, dtype=kind)
    x[1, 66], w[3, 65] = math.inf, math.nan
    found = ours(dtype, x, w)
    assert torch.isinf(found[1, [j for j in range(18) if j != 3]]).all() and torch.isnan(found[:, 3]).all()
    assert (found[[0, 2, 3]][:, [0, 1, 2, *range(4, 18)]] == 67).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_kernel_is_a_program_like_others(dtype: str, bias: bool) -> None:
    alone = product(dtype, 4, bias)
    verify(alone)
    assert parse_program(print_program(alone)) == alone
    assert digest(isolate(alone, alone.steps[0]).program) == digest(alone)  # type: ignore[arg-type]
    assert digest(product(dtype, 5)) != digest(alone)
    x, w = torch.randn(2, 65, dtype=torch_dtype(dtype)), torch.randn(17, 65, dtype=torch_dtype(dtype))
    symbols = {"n0": 2, "n1": 17, "n2": 65, "n3": 65}
    added = torch.randn(17, dtype=torch_dtype(dtype)) if bias else None
    given = {"b0": x, "b1": w} | ({} if added is None else {"b2": added})
    near(x, w, reference(print_program(alone), given, symbols)[alone.outputs[0]], added)


def test_the_deepest_product_is_as_exact_as_verify_asks() -> None:
    """Running sums of f32 lose more with the depth than the interpreter's pairwise ones: where they lose too much, no product is ours."""
    random = torch.Generator().manual_seed(9)
    x, w = torch.randn(4, DEPTH[1], generator=random), torch.randn(48, DEPTH[1], generator=random)
    exact = x.double() @ w.double().T
    off = lambda y: float((y - exact).square().mean().sqrt())
    pairwise = torch.stack([(row * w).sum(1) for row in x])
    assert off(ours("f32", x, w)) <= TIMES_EAGER * off(pairwise) + OF_MAGNITUDE * float(exact.abs().mean())


def test_only_a_product_may_be_contracted() -> None:
    text = print_program(product("f32", 4)).replace("mul v0, v1", "add v0, v1")
    with pytest.raises(CodegenError, match="matrix products only"):
        generate(parse_program(text), "0" * 64)
