"""Generated Triton kernels, executed through their MACA IR in the emulator, against the interpreter: both variants, equal bits."""

from __future__ import annotations

import pytest
import torch

from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.emulator import execute_built, missing
from tests.codegen.triton_kernels import METAX, TEXTS, assert_close, buffers, isolated, keyed, reference
from tests.scheduled import build_maca

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")

SIZES = {
    "softmax": [(1, 1), (3, 2047), (2, 5000)],
    "argmax": [(1, 1), (3, 3000)],
    "cumulative_loop": [(1, 1), (2, 4500)],
    "columns": [(1, 1), (1, 700)],
    "batch_statistics": [(1, 1), (3, 70)],
    "online": [(2, 1), (2, 2500)],
    "scatter_add": [(1, 1), (30, 1)],
    "embedding": [(2, 5)],
    "rmsnorm_long": [(1, 2)],
    "residual_long": [(1, 2)],
    "scalar": [(1, 1)],
}


@pytest.fixture(scope="module")
def built() -> dict[str, BuiltKernel]:
    return dict(zip(TEXTS, build_maca([keyed(n) for n in TEXTS], METAX, jobs=2), strict=True))


@pytest.mark.parametrize(("name", "size"), [(n, s) for n in TEXTS for s in SIZES.get(n, [(1, 1), (2, 3)])])
def test_both_variants_equal_the_interpreter(built: dict[str, BuiltKernel], name: str, size: tuple[int, int]) -> None:
    program = isolated(name)
    named = dict(zip(("s0", "s1"), size, strict=True))
    symbols = {s.name: named[_original(name, k)] for k, s in enumerate(program.symbols)}
    given = buffers(program, symbols, seed=len(name))
    if name == "scatter_add":  # atomics come in any order: keep sums exact
        given = [t.round() if t.dtype.is_floating_point else t for t in given]
    eager, truth = reference(program, given, symbols), reference(program, given, symbols, "f64")
    results = []
    for variant in sorted(built[name].launch["variants"]):  # type: ignore[call-overload]
        tensors = [t.clone() for t in given]
        execute_built(built[name], variant, tensors, list(symbols.values()))
        for b, got, e, t in zip(program.buffers, tensors, eager, truth, strict=True):
            assert_close(f"{name}.{variant}.{b.name}", got, e, t)
        results.append(tensors)
    for tensors in results[1:]:
        assert all(_bits(a) == _bits(b) for a, b in zip(results[0], tensors, strict=True)), "the variants differ"


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def _original(name: str, k: int) -> str:
    """Which of s0, s1 the k-th canonical symbol is."""
    only_second = ("columns",)
    return "s1" if name in only_second else ("s0", "s1")[k]


def test_nan_and_ties(built: dict[str, BuiltKernel]) -> None:
    x = torch.zeros(4, 3000, dtype=torch.bfloat16)
    x[0, 1500] = x[0, 2900] = 3
    x[1, [700, 2500]] = float("nan")
    x[2] = float("-inf")
    y, z, v = torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.bfloat16)
    program = isolated("argmax")
    order = {b.name: t for b, t in zip(program.buffers, (x, y, v, z), strict=True)}
    execute_built(built["argmax"], "generic", list(order.values()), [4, 3000])
    assert torch.equal(y, x.float().argmax(1)) and torch.equal(z, x.float().argmin(1))
    assert torch.equal(v.isnan(), torch.tensor([False, True, False, False])) and v[2] == float("-inf")
    s = torch.randn(2, 2500)
    s[0, 2400] = float("nan")
    out = torch.zeros_like(s)
    execute_built(built["softmax"], "generic", [s, out], [2, 2500])
    assert out[0].isnan().all() and not out[1].isnan().any()
