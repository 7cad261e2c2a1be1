"""Intervals hold what any computation within the stated errors gives, and are one number where everything is exactly rounded."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.check.enclosure import Enclosed, enclose
from flagtree.check.gate import judge
from flagtree.check.inputs import make_operands
from flagtree.check.points import all_points
from flagtree.check.regimes import KINDS
from flagtree.check.stated import Stated, gamma, stated_native
from flagtree.codegen.triton_math import Error
from flagtree.ir.canonical import isolate
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Kernel, Program
from flagtree.ir.sample import stores_at
from flagtree.ir.text import parse_program

EXACT = Stated({}, 0, {})
WIDE = Stated({"exp": Error(2**16), "sin": Error(2**16, floor=1)}, 0, {})


def program(body: str, dtype: str = "f32", inputs: int = 2, size: int = 64) -> tuple[Program, Kernel]:
    buffers = "".join(f"  buffer x{k}: {dtype}[4, {size}] input\n" for k in range(inputs))
    loads = "".join(f"    l{k}: {dtype} = load x{k}[i0, r0]\n" for k in range(inputs))
    text = (f"program p\n{buffers}  buffer y: {body.split(' ', 1)[0]}[4, {size}] temp\n  kernel k {{i0 < 4}} reduce {{r0 < {size}}} "
            f"numerics(eager, contract=off, acc=f32)\n{loads}" + "".join(f"    {line}\n" for line in body.split(" ", 1)[1].split("; "))
            + "    store y[i0, r0] = out\n  outputs y\n")  # fmt: skip
    parsed = parse_program(text)
    kernel = parsed.steps[0]
    assert isinstance(kernel, Kernel)
    alone = isolate(parsed, kernel)
    return alone.program, alone.kernel


def run(body: str, stated: Stated, dtype: str = "f32", kind: str = "ordinary", **more: int) -> tuple[Enclosed, torch.Tensor, torch.Tensor]:
    """(the interval, the interpreter, float64) of the stored buffer."""
    alone, kernel = program(body, dtype, **more)
    tensors = {n: o.tensor for n, o in make_operands(alone, {}, 3, kind).items()}
    points = all_points(kernel, {})
    (name,) = kernel.writes
    own, truth = (stores_at(alone, kernel, tensors, {}, points, precise)[name].values for precise in (False, True))
    return enclose(alone, kernel, tensors, {}, points, stated)[name], own, truth


def inside(found: Enclosed, values: torch.Tensor) -> bool:
    return not judge("f32", values, values, values.double(), None, found, ordinary=False).faults


EXACT_BODIES = [
    "f32 t: f32 = mul l0, l1; u: f32 = sub t, l0; v: f32 = div u, l1; out: f32 = sqrt v",
    "bf16 t: bf16 = cast l0; u: bf16 = neg t; v: f32 = cast u; w: f32 = max v, l1; out: bf16 = cast w",
    "f32 c: b1 = lt l0, l1; t: f32 = where c, l0, 2.0; u: f32 = abs t; out: f32 = floor u",
    "f32 m: f32 = max l0 over r0; out: f32 = sub l1, m",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", EXACT_BODIES)
def test_exactly_rounded_operations_are_one_number(body: str, kind: str) -> None:
    found, own, _ = run(body, EXACT, kind=kind)
    assert found.exact and torch.equal(torch.nan_to_num(found.low, 7.0), torch.nan_to_num(own, 7.0)) and found.high is not None
    assert inside(found, own)
    finite = torch.isfinite(own) & (own != 0)
    if bool(finite.any()):
        k = int(finite.nonzero()[0])
        other = own.clone()
        other[k] = other[k] * 2
        assert not inside(found, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [
    "f32 e: f32 = exp l0; t: f32 = mul e, l1; u: f32 = add t, 1.0; out: f32 = div l0, u",
    "f32 e: f32 = sin l0; t: f32 = abs e; u: f32 = sub l1, t; out: f32 = max u, -0.5",
    "f32 e: f32 = exp l0; c: b1 = lt e, l1; t: f32 = where c, e, l1; out: f32 = neg t",
    "f32 e: f32 = sin l0; s: f32 = sum e over r0; out: f32 = mul s, l1",
    "bf16 e: f32 = sin l0; t: bf16 = cast e; u: f32 = cast t; v: f32 = mul u, l1; out: bf16 = cast v",
    "f32 e: f32 = exp l0; m: f32 = max e over r0; d: f32 = sub e, m; out: f32 = mul d, d",
])  # fmt: skip
def test_whatever_the_functions_give_within_their_error_lies_inside(body: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter itself, and one whose exp and sin err by half of what is stated, in random directions."""
    found, own, _ = run(body, WIDE, kind=kind)
    assert not found.exact and inside(found, own)
    from flagtree.ir import evaluate

    for name in ("exp", "sin"):
        exact = evaluate.FUNCTIONS[name]

        def wrong(x: torch.Tensor, exact: object = exact, name: str = name) -> torch.Tensor:
            value = exact(x)  # type: ignore[operator]
            size = value.abs().clamp(min=1.0 if name == "sin" else 2.0**-126)
            noise = (torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1) * 2.0**-8
            return torch.where(torch.isfinite(value), value + size * noise, value)

        monkeypatch.setitem(evaluate.FUNCTIONS, name, wrong)
    alone, kernel = program(body)
    tensors = {n: o.tensor for n, o in make_operands(alone, {}, 3, kind).items()}
    assert inside(found, stores_at(alone, kernel, tensors, {}, all_points(kernel, {}))[kernel.writes[0]].values)


@pytest.mark.parametrize("kind", ["ordinary", "cancelling", "wide range", "inf", "NaN"])
def test_a_sum_in_any_order_lies_inside(kind: str) -> None:
    body = "f32 s: f32 = sum l0 over r0; out: f32 = add s, 0.0"
    size = 4096
    found, own, truth = run(body, stated_native(), kind=kind, inputs=1, size=size)
    assert inside(found, own) and inside(found, truth.float()) and not found.exact
    alone, _ = program(body, inputs=1, size=size)
    x = make_operands(alone, {}, 3, kind)["b0"].tensor
    assert stated_native().height({"r0": size}) >= 128
    for order in (torch.arange(size), torch.randperm(size), x[0].argsort()):
        parts = x[:, order].reshape(4, 64, 64)  # 64 running sums of 64 terms, joined one after the other: height 128
        total = torch.zeros(4, 64)
        for k in range(64):
            total = total + parts[:, :, k]
        joined = torch.zeros(4)
        for k in range(64):
            joined = joined + total[:, k]
        assert inside(found, joined[:, None].expand(4, size).reshape(-1))
    if kind == "ordinary":  # one term left out is outside
        assert not inside(found, (x.sum(1) - x[:, 5])[:, None].expand(4, size).reshape(-1))


def test_the_bound_of_a_sum() -> None:
    assert gamma(10, "f32") == pytest.approx(10 * 2.0**-24, rel=1e-5) and gamma(10, "f64") == pytest.approx(20 * 2.0**-53, rel=1e-9)
    native = stated_native()
    assert native.height({"r0": 1}) == 1 and native.height({"r0": 32}) <= 32
    assert 128 <= native.height({"r0": 4096}) < 400 and native.height({"r0": 40960}) < 1500
    gpu = Stated({}, 512, {"r0": 4096})
    assert 12 < gpu.height({"r0": 4096}) < 40
    one = torch.ones(1, dtype=torch.float64)
    assert math.isinf(float(gpu.error("gamma", "f32", one, one)))


def test_a_missing_rounding_lies_outside() -> None:
    """bf16 between two products: leaving it out is more accurate, and wrong."""
    body = "bf16 e: f32 = exp l0; t: bf16 = cast e; u: f32 = cast t; v: f32 = mul u, l1; out: bf16 = cast v"
    found, own, _ = run(body, stated_native())
    _, without, _ = run("bf16 e: f32 = exp l0; v: f32 = mul e, l1; out: bf16 = cast v", stated_native())
    assert inside(found, own) and not inside(found, without)


ADDED = """program added
  buffer at: i64[200] input
  buffer x: D[200, 4] input
  buffer y: D[20, 4] state
  buffer z: D[200, 4] temp
  kernel k {i0 < 200, i1 < 4} numerics(eager, contract=off, acc=f32)
    v0: i64 = load at[i0]
    v1: D = load x[i0, i1]
    store.MODE y[v0, i1] = v1
    store z[i0, i1] = v1
  outputs y, z
"""


@pytest.mark.parametrize(("dtype", "mode"), [("f32", "add"), ("bf16", "add"), ("f64", "add"), ("i64", "add"), ("f32", "max")])
def test_stores_that_accumulate_in_any_order(dtype: str, mode: str) -> None:
    """Each order of adding, rounded after each step, lies within; values that are lost or added twice do not."""
    parsed = parse_program(ADDED.replace(": D", f": {dtype}").replace("MODE", mode))
    alone = isolate(parsed, parsed.steps[0])  # type: ignore[arg-type]
    torch.manual_seed(4)
    kind = torch_dtype(dtype)
    at, start = torch.randint(0, 20, (200,)), torch.randn(20, 4).mul(8).to(kind)
    at[:3] = 7  # one row is hit several times for sure
    x = (torch.randn(200, 4).abs() * 8 + 1).to(kind)
    given = {"b0": at, "b1": x, "b2": start.clone(), "b3": torch.zeros(200, 4, dtype=kind)}
    found = enclose(alone.program, alone.kernel, given, {}, all_points(alone.kernel, {}), EXACT)

    def stored(order: torch.Tensor) -> torch.Tensor:
        y = start.clone()
        for i in order.tolist():
            y[at[i]] = y[at[i]] + x[i] if mode == "add" else torch.maximum(y[at[i]], x[i])
        return y.flatten()

    def faults(values: torch.Tensor) -> tuple[str, ...]:
        return judge(dtype, values, values, values.double(), None, found["b2"], ordinary=False).faults

    assert torch.equal(start, given["b2"])
    orders = [torch.arange(200), torch.arange(200).flip(0), torch.randperm(200)]
    assert not any(faults(stored(order)) for order in orders)
    assert found["b2"].exact == (mode == "max" or dtype == "i64") and found["b3"].exact
    assert torch.equal(found["b3"].low, x.flatten()) and torch.equal(found["b2"].offsets, torch.arange(80))
    if mode == "add":
        assert faults(stored(orders[0][3:])) and faults(stored(torch.cat([orders[0], orders[0][:3]])))
    else:
        assert faults(stored(orders[0]) - 1)
