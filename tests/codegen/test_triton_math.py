"""The functions of templates/triton_math.py.j2: accuracy against float64, and special values, executed through the MACA lowering.

The bounds are those that the template states; the emulator's exp and exp2 are correctly rounded to within one ULP.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from flagtree.codegen.triton_math import ERRORS
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.parse import parse_program
from flagtree.toolchain.emulator import execute_built, missing
from tests.codegen.triton_kernels import METAX
from tests.scheduled import build_maca

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")

N = 16384
POINTS = {"small": (-3.0, 3.0), "wide": (-80.0, 80.0), "unit": (-1.0, 1.0), "positive": (1e-30, 1e4), "angle": (-41000.0, 41000.0)}
# op: (domain, ULP), ULP of the larger of |result| and `floor`
UNARY: dict[str, tuple[str, float, float]] = {
    "log": ("positive", 3, 0), "log2": ("positive", 4, 0), "log10": ("positive", 4, 0), "log1p": ("positive", 5, 0),
    "expm1": ("small", 5, 0),
    "tanh": ("small", 3, 0), "erf": ("small", 3, 0), "erfc": ("small", 4, 1), "sin": ("angle", 2, 0), "cos": ("angle", 2, 0),
    "tan": ("unit", 5, 0), "asin": ("unit", 4, 0), "acos": ("unit", 4, 0.01), "atan": ("wide", 4, 0), "sinh": ("small", 6, 0),
    "cosh": ("small", 4, 0), "sqrt": ("positive", 0.5, 0), "rsqrt": ("positive", 1.5, 0), "exp": ("small", 4, 0), "exp2": ("small", 2, 0),
    "round": ("wide", 0, 0), "trunc": ("wide", 0, 0), "floor": ("wide", 0, 0), "ceil": ("wide", 0, 0), "sign": ("small", 0, 0),
}  # fmt: skip
BINARY: dict[str, tuple[str, str, float]] = {
    "pow": ("positive", "small", 3), "atan2": ("wide", "small", 5), "div": ("wide", "small", 0.5), "copysign": ("wide", "small", 0),
    "min": ("wide", "small", 0), "max": ("wide", "small", 0),
}  # fmt: skip
REFERENCE: dict[str, Callable[..., torch.Tensor]] = {
    "erf": torch.special.erf,
    "erfc": torch.special.erfc,
    "min": torch.minimum,
    "max": torch.maximum,
}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-40, -1e-40, 0.5, 88.0, -88.0, 2.5, -2.5, 3.0, -3.0, 1e30, -1e30]


def _program(unary: dict[str, int], binary: dict[str, int], n: int) -> str:
    """One kernel with an output for each op; the value is the number of its input."""
    inputs = max([*unary.values(), *(2 * k + 1 for k in binary.values())]) + 1
    lines = [f"  buffer x{k}: f32[{n}] input" for k in range(inputs)]
    lines += [f"  buffer y_{op}: f32[{n}] temp" for op in (*unary, *binary)]
    lines.append(f"  kernel k {{i0 < {n}}} numerics(eager, contract=off, acc=f32)")
    lines += [f"    l{k}: f32 = load x{k}[i0]" for k in range(inputs)]
    for op, k in unary.items():
        lines += [f"    o_{op}: f32 = {op} l{k}", f"    store y_{op}[i0] = o_{op}"]
    for op, k in binary.items():
        lines += [f"    o_{op}: f32 = {op} l{2 * k}, l{2 * k + 1}", f"    store y_{op}[i0] = o_{op}"]
    return "program p\n" + "\n".join(lines) + "\n  outputs " + ", ".join(f"y_{op}" for op in (*unary, *binary)) + "\n"


def _execute(unary: dict[str, int], binary: dict[str, int], inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    n = len(inputs[0])

    parsed = parse_program(_program(unary, binary, n))
    alone = isolate(parsed, parsed.steps[0])  # type: ignore[arg-type]
    tensors = {f"x{k}": t for k, t in enumerate(inputs)} | {f"y_{op}": torch.zeros(n) for op in (*unary, *binary)}
    built = build_maca([(digest(alone.program), alone.program)], METAX)[0]
    execute_built(built, "generic", [tensors[name] for name in alone.buffers], [], orders=("forward",))
    return {op: tensors[f"y_{op}"] for op in (*unary, *binary)}


def _points(domain: str, seed: int) -> torch.Tensor:
    lo, hi = POINTS[domain]
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(N, generator=generator, dtype=torch.float64)
    if domain == "positive":
        return torch.exp(math.log(lo) + uniform * (math.log(hi) - math.log(lo))).float()
    values = lo + uniform * (hi - lo)
    values[: N // 4] *= torch.exp(-20 * torch.rand(N // 4, generator=generator, dtype=torch.float64))  # small ones too
    return values.float()


def _truth(op: str, *args: torch.Tensor) -> torch.Tensor:
    return REFERENCE.get(op, getattr(torch, op, None))(*(a.double() for a in args))  # type: ignore[misc]


def _ulps(got: torch.Tensor, truth: torch.Tensor, floor: float) -> float:
    size = truth.abs().clamp(min=max(floor, 2.0**-126)).float()
    step = torch.nextafter(size, torch.tensor(math.inf)).double() - size.double()
    return float(((got.double() - truth).abs() / step).max())


def test_accuracy() -> None:
    domains = list(POINTS)
    first = {op: domains.index(d) for op, (d, _, _) in UNARY.items()}
    inputs = [_points(d, seed=k) for k, d in enumerate(domains)]
    found = _execute(first, {}, inputs)
    measured = {op: _ulps(found[op], _truth(op, inputs[first[op]]), UNARY[op][2]) for op in UNARY}
    assert {op: u for op, u in measured.items() if u > UNARY[op][1]} == {}


def test_accuracy_of_two_arguments() -> None:
    pairs = [_points(d, seed=9 + k) for k, d in enumerate(d for a, b, _ in BINARY.values() for d in (a, b))]
    found = _execute({}, {op: k for k, op in enumerate(BINARY)}, pairs)
    measured = {op: _ulps(found[op], _truth(op, pairs[2 * k], pairs[2 * k + 1]), 0) for k, op in enumerate(BINARY)}
    assert {op: u for op, u in measured.items() if u > BINARY[op][2]} == {}


def _angles() -> torch.Tensor:
    """Of every size, and next to multiples of pi/2, the nearest of all among them."""
    generator = torch.Generator().manual_seed(1)
    exponent, share = (torch.rand(N // 2, generator=generator, dtype=torch.float64) for _ in range(2))
    anywhere = torch.exp2(exponent * 149 - 22) * (1 + share)
    multiples = torch.exp2(exponent * 100).floor() * (math.pi / 2)
    worst = torch.tensor([16367173 * 2.0**72, 2.0**20, 2.0**20 - 1 / 16, 3.4028234663852886e38, 2.0**127], dtype=torch.float64)
    values = torch.cat([anywhere, multiples, worst]).float()
    return torch.where(torch.arange(len(values)) % 2 == 0, values, -values)


def test_angles_of_every_size() -> None:
    x = _angles()
    assert bool(torch.isfinite(x).all())
    for op, got in _execute({"sin": 0, "cos": 0, "tan": 0}, {}, [x]).items():
        assert _ulps(got, _truth(op, x), 0) <= ERRORS[op].ulp and ERRORS[op].limit == math.inf, op


def test_powers_beyond_the_domain_of_the_constant_bound() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.rand(N, generator=generator) * 2.7 + 0.3), (torch.rand(N, generator=generator) - 0.5) * 140
    found = _execute({}, {"pow": 0}, [x, y])["pow"]
    truth = _truth("pow", x, y)
    kept = truth < 3e38  # smaller ones than 2^-126 are denormal and measured in steps of 2^-149
    step = torch.nextafter(truth.float(), torch.tensor(math.inf)).double() - truth.float().double()
    error = ((found.double() - truth).abs() / step)[kept]
    stated = ERRORS["pow"]
    assert float((error / (stated.ulp + stated.beyond * y[kept].abs())).max()) < 1 and float(error.max()) > stated.ulp


@pytest.mark.parametrize("kind", ["unary", "binary"])
def test_special_values(kind: str) -> None:
    x = torch.tensor(SPECIAL)
    if kind == "unary":
        args: tuple[torch.Tensor, ...] = (x,)
        found = _execute(dict.fromkeys(UNARY, 0), {}, [x])
    else:
        grid = torch.cartesian_prod(x, x)
        args = (grid[:, 0].contiguous(), grid[:, 1].contiguous())
        found = _execute({}, dict.fromkeys(BINARY, 0), list(args))
    for op, got in found.items():
        truth = _truth(op, *args).float()
        for a, g, t in zip(zip(*(list(v) for v in args), strict=True), got, truth, strict=True):
            where = f"{op}({', '.join(str(float(v)) for v in a)}) = {float(g)}, not {float(t)}"
            assert bool(g.isnan()) == bool(t.isnan()), where
            if t.isinf() or t == 0:
                assert g == t or abs(float(g)) < 1e-37, where
            elif not t.isnan():
                assert abs(float(g) - float(t)) <= 2e-5 * abs(float(t)) + (2e-7 if op == "erfc" else 1e-37), where
