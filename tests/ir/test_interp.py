"""The interpreter against torch eager: kernels, whole programs, externs, aliases, repeats, float64 truth, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.errors import IRError
from flagtree.ir.evaluate import compute
from flagtree.ir.interp import run, run_kernel
from flagtree.ir.ops import OPS
from flagtree.ir.program import Kernel
from flagtree.ir.text import parse_program

torch.set_num_threads(1)

NORM = """program norm
  symbol s0 in 0..64 from dim x 0
  symbol s1 in 1..40 from dim x 1
  buffer x: bf16[s0, s1, 96] input
  buffer w: bf16[96] weight
  buffer y: bf16[s0, s1, 96] temp
  kernel k0 {i0 < s0, i1 < s1} reduce {r0 < 96} numerics(eager, contract=off, acc=f32)
    v0: bf16 = load x[i0, i1, r0]
    v1: f32 = cast v0
    v2: f32 = mul v1, v1
    v3: f32 = sum v2 over r0
    v4: f32 = mul v3, 0.010416666666666666
    v5: f32 = add v4, 1e-06
    v6: f32 = rsqrt v5
    v7: f32 = mul v1, v6
    v8: bf16 = cast v7
    v9: bf16 = load w[r0]
    v10: bf16 = mul v9, v8
    store y[i0, i1, r0] = v10
  outputs y
"""


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    f = x.float()
    return w * (f * (1 / torch.sqrt((f * f).sum(-1, keepdim=True) * (1 / 96) + 1e-6))).to(x.dtype)


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (0, 3)])
def test_norm_is_eager(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(*shape, 96).bfloat16(), torch.randn(96).bfloat16()
    y = run(parse_program(NORM), {"x": x, "w": w})["y"]
    torch.testing.assert_close(y, norm(x, w), rtol=0, atol=0)


def test_float64_truth_rounds_nowhere() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 96).bfloat16(), torch.randn(96).bfloat16()
    y = run(parse_program(NORM), {"x": x, "w": w}, dtype_override="f64")["y"]
    f = x.double()
    want = w.double() * f / torch.sqrt((f * f).mean(-1, keepdim=True) + 1e-6)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, want, rtol=1e-14, atol=0)


def body(
    lines: str, head: str = "{i < n} reduce {r < 7}", buffers: str = "", outputs: str = "y", out: str = "f32[n]", x: str = "f32[n, 7]"
) -> str:
    inner = "".join(f"    {line.strip()}\n" for line in lines.strip().splitlines())
    extra = "".join(f"  buffer {b}\n" for b in buffers.split(";") if b)
    return (
        f"program p\n  symbol n in 0..100 from dim x 0\n  buffer x: {x} input\n{extra}  buffer y: {out} temp\n"
        f"  kernel k {head} numerics(eager, contract=off, acc=f32)\n{inner}  outputs {outputs}\n"
    )


X = torch.tensor([[1.0, -2.0, 5.0, 5.0, 0.5, -7.0, 3.0], [math.nan, 1.0, 2.0, math.nan, 0.0, 1.0, 1.0], [0.0] * 7])


@pytest.mark.parametrize(
    ("combiner", "want"),
    [
        ("sum", X.sum(1)),
        ("prod", X.prod(1)),
        ("min", X.amin(1)),
        ("max", X.amax(1)),
    ],
)
def test_reductions(combiner: str, want: torch.Tensor) -> None:
    text = body(f"a: f32 = load x[i, r]\nb: f32 = {combiner} a over r\nstore y[i] = b")
    torch.testing.assert_close(run(parse_program(text), {"x": X})["y"], want, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("combiner", ["argmin", "argmax"])
def test_arg_reductions_take_the_first_and_the_first_nan(combiner: str) -> None:
    text = body(f"a: f32 = load x[i, r]\np: i64 = index r\n(b: f32, q: i64) = {combiner} a, p over r\nstore y[i] = q", out="i64[n]")
    want = getattr(torch, combiner)(X, 1)
    assert torch.equal(run(parse_program(text), {"x": X})["y"], want)
    assert want.tolist() == ([5, 0, 0] if combiner == "argmin" else [2, 0, 0])


def test_any_and_all() -> None:
    text = body(
        "a: f32 = load x[i, r]\np: b1 = gt a, 0.0\nq: b1 = any p over r\ns: b1 = all p over r\nz: b1 = xor q, s\nstore y[i] = z",
        out="b1[n]",
    )
    assert torch.equal(run(parse_program(text), {"x": X})["y"], (X > 0).any(1) ^ (X > 0).all(1))


def test_welford_and_online_softmax() -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    text = body(
        """a: f32 = load x[i, r]
        z: f32 = mul a, 0.0
        o: f32 = add z, 1.0
        (m: f32, s: f32, c: f32) = welford a, z, o over r
        v: f32 = div s, c
        store y[i] = v"""
    )
    torch.testing.assert_close(run(parse_program(text), {"x": x})["y"], x.var(1, correction=0), rtol=1e-5, atol=1e-6)
    text = body(
        """a: f32 = load x[i, r]
        z: f32 = mul a, 0.0
        o: f32 = add z, 1.0
        (m: f32, s: f32) = online_softmax a, o over r
        d: f32 = sub a, m
        e: f32 = exp d
        p: f32 = div e, s
        store y[i, r] = p""",
        out="f32[n, 7]",
    )
    torch.testing.assert_close(run(parse_program(text), {"x": x})["y"], x.softmax(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("combiner", "want"), [("sum", X.cumsum(1)), ("prod", X.cumprod(1)), ("max", X.cummax(1)[0]), ("min", X.cummin(1)[0])]
)
def test_scans(combiner: str, want: torch.Tensor) -> None:
    text = body(f"a: f32 = load x[i, r]\nb: f32 = scan.{combiner} a over r\nstore y[i, r] = b", out="f32[n, 7]")
    torch.testing.assert_close(run(parse_program(text), {"x": X})["y"], want, equal_nan=True, rtol=1e-6, atol=0)


def test_a_value_that_does_not_depend_on_the_axis_counts_at_each_point() -> None:
    text = body("a: f32 = load x[i, 0]\nb: f32 = sum a over r\nstore y[i] = b")
    x = torch.ones(2, 7)
    assert run(parse_program(text), {"x": x})["y"].tolist() == [7.0, 7.0]


def test_masked_window_gather_and_scatter() -> None:
    text = body(
        """p: i64 = index i - 1
        m: b1 = ge p, 0
        a: f32 = load x[i - 1, 3] if m else -1.0
        t: i64 = load t[i]
        b: f32 = load x[t, 2]
        c: f32 = add a, b
        store y[i] = c
        store.add h[t] = c
        store.max g[t] = c if m""",
        head="{i < n}",
        buffers="t: i64[n] input;h: f32[4] state;g: f32[4] state",
    )
    x, t = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 2, 1, 0])
    h, g = torch.zeros(4), torch.full((4,), -9.0)
    out = run(parse_program(text), {"x": x, "t": t, "h": h, "g": g})
    want = torch.cat([torch.tensor([-1.0]), x[:4, 3]]) + x[t, 2]
    assert torch.equal(out["y"], want)
    torch.testing.assert_close(h, torch.zeros(4).index_add(0, t, want))
    torch.testing.assert_close(g, torch.full((4,), -9.0).scatter_reduce(0, t[1:], want[1:], "amax"))
    assert out["h"] is h  # the caller's tensor, written in place


def test_half_arithmetic_rounds_once() -> None:
    text = body("a: f16 = load x[i]\nb: f16 = mul a, a\nc: f16 = add b, 0.1\nstore y[i] = c", head="{i < n}", x="f16[n]", out="f16[n]")
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(run(parse_program(text), {"x": x})["y"], x * x + torch.tensor(0.1).half())


def test_every_operation_has_a_meaning() -> None:
    made = {
        "f": ("f32", torch.tensor([1.5, -0.3, 0.7])),
        "i": ("i64", torch.tensor([5, -3, 0])),
        "b": ("b1", torch.tensor([True, False, True])),
    }
    for op in OPS.values():
        for kind in op.kinds:
            dtype, x = made[kind]
            args = ", ".join(["c"] * (op.name == "where") + ["a"] * (op.arity - (op.name == "where")))
            result = {"same": dtype, "b1": "b1", "given": dtype}[op.result]
            lines = f"c: b1 = load c[i]\na: {dtype} = load x[i]\nv: {result} = {op.name} {args}\nstore y[i] = v"
            text = body(lines, head="{i < n}", x=f"{dtype}[n]", out=f"{result}[n]", buffers="c: b1[n] input")
            y = run(parse_program(text), {"x": x, "c": torch.tensor([True, False, True])})["y"]
            assert y.shape == x.shape


def test_integer_division_by_zero_and_minus_one_does_not_trap() -> None:
    lines = "a: i64 = load x[i]\nb: i64 = load b[i]\nc: i64 = floordiv a, b\nd: i64 = mod a, b\ne: i64 = add c, d\nstore y[i] = e"
    text = body(lines, head="{i < n}", x="i64[n]", out="i64[n]", buffers="b: i64[n] input")
    low = -(2**63)
    y = run(parse_program(text), {"x": torch.tensor([7, low, -7, 5]), "b": torch.tensor([2, -1, 2, 0])})["y"]
    assert y[0] == 4
    assert y[1] == low
    assert y[2] == -3


def test_bitcast_and_float_casts() -> None:
    text = body("a: f32 = load x[i]\nb: i32 = bitcast a\nstore y[i] = b", head="{i < n}", x="f32[n]", out="i32[n]")
    x = torch.tensor([1.0, -0.0, math.inf])
    assert torch.equal(run(parse_program(text), {"x": x})["y"], x.view(torch.int32))


PROGRAM = """program whole
  symbol n in 1..32 multiple 2 from dim x 0
  symbol k in 0..5 from scalar start
  buffer start: i64[] scalar
  buffer x: f32[n, 4] input
  buffer w: f32[4, 4] weight
  buffer u: f32[4, 4] weight
  buffer wf: f32[4, 4] weight
  buffer cache: f32[10, 4] state
  buffer place: f32[n, 4] state alias cache + 4*k
  buffer xt: f32[4, n] input strides(1, 4) alias x + 0
  buffer h: f32[n, 4] temp
  buffer g: f32[n, 4] temp
  buffer hf: f32[n, 4] temp
  buffer gf: f32[n, 4] temp
  buffer t: f32[4, n] temp
  kernel copy {i < n, j < 4} numerics(eager, contract=off, acc=f32)
    a: f32 = load xt[j, i]
    store place[i, j] = a
    store h[i, j] = a
  repeat layers 2 bind wf = (w, u), hf = (h, g), gf = (g, h)
    template t0: (gf) = gemm(hf, wf) numerics(eager, contract=off, acc=f32)
      epilogue
        o: f32 = load x[i0, i1]
        b: f32 = add acc, o
        store gf[i0, i1] = b
  extern e: (t) = aten.t_copy.default(h)
  extern a: () = aten.add_.Scalar(cache, 1.0) mutates(cache)
  outputs t, x
"""


def test_whole_program() -> None:
    torch.manual_seed(0)
    x, w, u, cache = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4), torch.zeros(10, 4)
    out = run(parse_program(PROGRAM.replace("f32[4, n] temp", "f32[4, n] temp")), {"x": x, "w": w, "u": u, "cache": cache, "start": 3})
    assert torch.equal(out["x"], x)
    torch.testing.assert_close(out["t"], ((x @ w.T + x) @ u.T + x).T)
    want = torch.zeros(10, 4)
    want[3:7] = x
    assert torch.equal(cache, want + 1)


@pytest.mark.parametrize(
    ("change", "inputs", "message"),
    [
        (("1..32 multiple 2", "1..3"), {}, "must lie in 1..3"),
        (("1..32", "1..33"), {"x": torch.zeros(3, 4)}, "multiple of 2"),
        (("", ""), {"x": torch.zeros(4, 5)}, "has shape [4, 5]"),
        (("", ""), {"x": torch.zeros(4, 4, dtype=torch.float64)}, "dtype"),
        (("", ""), {"x": torch.zeros(4, 4).T.contiguous().T}, "strides"),
        (("", ""), {"zz": torch.zeros(1)}, "takes no input 'zz'"),
        (("", ""), {"h": torch.zeros(4, 4)}, "takes no input 'h'"),
        (("store h[i, j]", "store h[i + 1, j]"), {}, "index 0 runs over 1..4"),
        (("store h[i, j] = a", "store g[i, j] = a"), {}, "'h' is read before it is written"),
        (("aten.t_copy", "aten.no_such"), {}, "no operator"),
        (("(t) =", "(t, _) ="), {}, "returned"),
        (("f32[4, n] temp", "f32[n, 4, 1] temp"), {}, "has shape"),
    ],
)
def test_refusals(change: tuple[str, str], inputs: dict[str, torch.Tensor], message: str) -> None:
    text = PROGRAM.replace(*change)
    base = {"x": torch.zeros(4, 4), "w": torch.zeros(4, 4), "u": torch.zeros(4, 4), "cache": torch.zeros(10, 4), "start": 0}
    with pytest.raises(IRError) as caught:
        run(parse_program(text), {**base, **inputs})
    assert message in str(caught.value)


def test_an_unmasked_gather_out_of_range_raises() -> None:
    text = body("t: i64 = load t[i]\nb: f32 = load x[t, 2]\nstore y[i] = b", head="{i < n}", buffers="t: i64[n] input")
    with pytest.raises(IRError, match="out of range"):
        run(parse_program(text), {"x": torch.zeros(2, 7), "t": torch.tensor([0, 2])})


def test_run_kernel_on_tensors_of_the_caller() -> None:
    program = parse_program(NORM)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    x, w, y = torch.randn(2, 3, 96).bfloat16(), torch.randn(96).bfloat16(), torch.zeros(2, 3, 96, dtype=torch.float64)
    run_kernel(program, kernel, {"x": x, "w": w, "y": y}, {"s0": 2, "s1": 3}, precise=True)
    torch.testing.assert_close(y.bfloat16().float(), norm(x, w).float(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.rand(3072, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.2
    # f64 has more than twice the bits of f32, so that a root of f32 is rounded once there as well
    root = torch.tensor([math.sqrt(v) for v in x.double().tolist()], dtype=torch.float64).to(dtype)
    assert torch.equal(compute("sqrt", [x], dtype), root)
    assert torch.equal(compute("rsqrt", [x], dtype), 1 / root)
    special = torch.tensor([0.0, -0.0, math.inf, -1.0, math.nan], dtype=dtype)
    torch.testing.assert_close(compute("sqrt", [special], dtype), torch.sqrt(special), rtol=0, atol=0, equal_nan=True)
    assert compute("sqrt", [torch.tensor(4.0, dtype=dtype)], dtype).shape == ()
