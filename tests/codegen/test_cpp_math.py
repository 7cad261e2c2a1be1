"""The accuracy that flagtree/codegen/cpp_math.py states for each function, measured against float64."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

from flagtree.codegen.cpp_math import ULP
from flagtree.codegen.cpp_ops import CALLS
from flagtree.codegen.cpp_prelude import prelude
from flagtree.ir.ops import OPS
from flagtree.runtime.cpu import levels
from flagtree.toolchain import cxx
from tests.codegen.cpp_runner import run, same_bits
from tests.codegen.test_cpp_ops import elementwise

VISIBLE = '__attribute__((visibility("default"))) void'


def sample(step: int) -> torch.Tensor:
    """Every `step`-th f32 bit pattern, and dense stretches where functions bend."""
    patterns = torch.arange(0, 2**32, step, dtype=torch.int64).to(torch.int32).view(torch.float32)
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(40000, generator=g), *(torch.linspace(a, b, 40009) for a, b in ((-110, 110), (-2, 2), (0.4, 2.1)))]
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, 88.72283, 88.72284, -103.97,
                          -103.98, -87.34, 1.0, -1.0])  # fmt: skip
    return torch.cat([patterns, *dense, edges])


def error(x: torch.Tensor, got: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Largest error in last places and its argument; inf and NaN demanded where f32 has them."""
    rounded = truth.float()
    finite = rounded.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7.0), rounded[~finite].nan_to_num(7.0))
    size = rounded[finite].abs()
    place = (torch.nextafter(size, torch.tensor(math.inf)) - size).double()
    place = torch.where(place.isfinite(), place, torch.tensor(2.0**104, dtype=torch.float64))
    off = ((got[finite].double() - truth[finite]) / place).abs()
    assert bool(off.isfinite().all())
    if not len(off):
        return 0.0, 0.0  # a piece where the truth has no finite value
    worst = int(off.argmax())
    return float(off[worst]), float(x[finite][worst])


def test_every_approximate_function_has_a_bound() -> None:
    inexact = {op.name for op in OPS.values() if not op.exact}
    assert inexact == set(ULP)
    assert inexact <= set(CALLS)


@pytest.mark.parametrize("name", [n for n in ULP if OPS[n].arity == 1])
def test_bound(name: str) -> None:
    x = sample(65537 if ULP[name] < 0.52 else 16411)
    got = run(elementwise(name, "f32", 1, "f32"), {"a": x}, {"n0": len(x)})["y"]
    worst, where = error(x, got, getattr(torch, name)(x.double()))
    assert worst <= ULP[name], f"{worst} at {where!r}"


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in ULP if OPS[n].arity == 1])
def test_bound_densely(name: str) -> None:
    for part in range(4):
        x = sample(257 + 2 * part)
        for piece in x.split(100000):
            got = run(elementwise(name, "f32", 1, "f32"), {"a": piece}, {"n0": len(piece)})["y"]
            assert error(piece, got, getattr(torch, name)(piece.double()))[0] <= ULP[name]


@pytest.mark.parametrize("name", ["pow", "atan2"])
def test_bound_of_two_arguments(name: str) -> None:
    x = sample(1048583)[:60000]
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    got = run(elementwise(name, "f32", 2, "f32"), {"a": x, "b": y}, {"n0": len(x)})["y"]
    assert error(x, got, getattr(torch, name)(x.double(), y.double()))[0] <= ULP[name]


@pytest.mark.skipif("x86-64-v3" not in levels(), reason="no instruction to compare with")
def test_fused_multiply_add_rounds_once_at_every_level(tmp_path: Path) -> None:
    """Products with sums just off a tie between two f32, tiny and huge ones, and special values."""
    body = "extern \"C\" void each(const f32 *a, const f32 *b, const f32 *c, f32 *r, i64 n) { for (i64 i = 0; i + W <= n; i += W) " \
        "store(r + i, fused(load(a + i, W), load(b + i, W), load(c + i, W)), W); }"  # fmt: skip
    source = f"#define WIDEST_BYTES 4\n#define PARTIALS 32\n{prelude('fused load store to_f64 to_f32')}{body.replace('void', VISIBLE)}"
    g = torch.Generator().manual_seed(5)
    a, b = (2 * torch.randint(1 << low, 2 << low, (4096,), generator=g) + 1.0 for low in (10, 12))  # many products end on a tie
    z = torch.tensor([2.0**-40, -(2.0**-40), 0.5, 1e9, 0.0])[:, None]
    scales = torch.tensor([1.0, 2.0**-130, 2.0**90])[:, None, None]
    x, y, z = (t.reshape(-1) for t in torch.broadcast_tensors(a * scales, b.expand(1, 1, -1), z * scales))
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38, 1.0])
    p, q, s = (t.reshape(-1).repeat(16) for t in torch.meshgrid(odd, odd, odd, indexing="ij"))
    inputs = [torch.cat(pair).contiguous() for pair in ((x, p), (y, q), (z, s))]
    out = {}
    for level in ("x86-64-v2", "x86-64-v3"):
        path = tmp_path / f"{level}.so"
        path.write_bytes(cxx.link([("0" * 64, cxx.compile_object(source, level))], level))
        out[level] = torch.zeros_like(inputs[0])
        ctypes.CDLL(str(path)).each(*(ctypes.c_void_p(t.data_ptr()) for t in (*inputs, out[level])), ctypes.c_int64(len(inputs[0])))
    assert same_bits(out["x86-64-v2"], out["x86-64-v3"])
    whole = (inputs[0].double() * inputs[1].double() + inputs[2].double()).float()
    assert int((whole != out["x86-64-v3"]).logical_and(whole == whole).sum()) > 1000  # rounding twice would have been seen
