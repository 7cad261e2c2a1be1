"""Programs of one kernel, each for bf16 and f32, with the same computation in PyTorch eager: what test_maca_kernels executes.

A case gives the IR text of a dtype and, for a size, its inputs by buffer name and what eager makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

N = "numerics(eager, contract=off, acc=f32)"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """`sizes`: values of the symbols in order.  `given(dtype, sizes)`: the caller's tensors, contents seeded; `eager(given)`: the outputs,
    in double when given doubles.  `exact`: eager's bits are expected."""

    text: str
    sizes: Sequence[tuple[int, ...]]
    given: Callable[[torch.dtype, tuple[int, ...]], Tensors]
    eager: Callable[[Tensors], Mapping[str, torch.Tensor]]
    exact: bool = False


def _randn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def _rms(x: torch.Tensor, w: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
    f = x if x.dtype == torch.float64 else x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def _norm_body(dtype: str, width: int) -> str:
    return f"""    a1: f32 = cast a0
    a2: f32 = mul a1, a1
    a3: f32 = sum a2 over r0
    a4: f32 = div a3, {width}.0
    a5: f32 = add a4, 1e-06
    a6: f32 = rsqrt a5
    a7: f32 = mul a1, a6
    a8: {dtype} = cast a7
    w0: {dtype} = load w[r0]
    a9: {dtype} = mul a8, w0
"""


def _rms_text(width: int) -> str:
    return f"""program rms_norm
  symbol s0 in 0..100000 from dim x 0
  buffer x: D[s0, {width}] input
  buffer w: D[{width}] weight
  buffer y: D[s0, {width}] temp
  kernel k {{i0 < s0}} reduce {{r0 < {width}}} {N}
    a0: D = load x[i0, r0]
{_norm_body("D", width)}    store y[i0, r0] = a9
  outputs y
"""


def _rms_case(width: int) -> Case:
    return Case(_rms_text(width), [(0,), (1,), (5,)],
                lambda d, s: {"x": _randn(d, s[0], width), "w": _randn(d, width)}, lambda g: {"y": _rms(g["x"], g["w"])})  # fmt: skip


CASES: dict[str, Case] = {"rms_norm": _rms_case(4096), "rms_norm_odd": _rms_case(333), "rms_norm_one": _rms_case(1)}

CASES["residual_norm"] = Case(f"""program residual_norm
  symbol s0 in 1..64 from dim x 0
  buffer x: D[s0, 1024] input
  buffer r: D[s0, 1024] state
  buffer w: D[1024] weight
  buffer y: D[s0, 1024] temp
  kernel k {{i0 < s0}} reduce {{r0 < 1024}} {N}
    x0: D = load x[i0, r0]
    h0: D = load r[i0, r0]
    a0: D = add x0, h0
    store r[i0, r0] = a0
{_norm_body("D", 1024)}    store y[i0, r0] = a9
  outputs r, y
""", [(1,), (3,), (64,)], lambda d, s: {"x": _randn(d, s[0], 1024), "r": _randn(d, s[0], 1024), "w": _randn(d, 1024)},
    lambda g: {"r": g["x"] + g["r"], "y": _rms(g["x"] + g["r"], g["w"])})  # fmt: skip

CASES["rotary_norm"] = Case(f"""program rotary_norm
  symbol s0 in 1..40960 from dim x 0
  buffer x: D[s0, 4, 128] input
  buffer w: D[128] weight
  buffer cos: D[s0, 128] input
  buffer sin: D[s0, 128] input
  buffer y: D[4, s0, 128] temp
  kernel k {{i0 < 4, i1 < s0}} reduce {{r0 < 128}} {N}
    a0: D = load x[i1, i0, r0]
{_norm_body("D", 128)}    b0: D = load x[i1, i0, (r0 + 64) % 128]
    b1: f32 = cast b0
    b2: f32 = mul b1, a6
    b3: D = cast b2
    u0: D = load w[(r0 + 64) % 128]
    b4: D = mul b3, u0
    p0: i64 = index r0
    p1: b1 = lt p0, 64
    n0: D = neg b4
    n1: D = where p1, n0, b4
    c0: D = load cos[i1, r0]
    s2: D = load sin[i1, r0]
    t0: D = mul a9, c0
    t1: D = mul n1, s2
    t2: D = add t0, t1
    store y[i0, i1, r0] = t2
  outputs y
""", [(1,), (2,), (7,)],
    lambda d, s: {"x": _randn(d, s[0], 4, 128), "w": _randn(d, 128), "cos": _randn(d, s[0], 128), "sin": _randn(d, s[0], 128)},
    lambda g: {"y": _rotary(_rms(g["x"], g["w"]).transpose(0, 1), g["cos"], g["sin"])})  # fmt: skip


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat([-x[..., 64:], x[..., :64]], -1) * sin


CASES["silu_mul"] = Case(f"""program silu_mul
  symbol s0 in 0..64 from dim x 0
  symbol s1 in 1..12288 from dim y 1
  buffer x: D[s0, 2*s1] input
  buffer y: D[s0, s1] temp
  kernel k {{i0 < s0, i1 < s1}} {N}
    a0: D = load x[i0, i1]
    a1: f32 = cast a0
    a2: f32 = neg a1
    a3: f32 = exp a2
    a4: f32 = add a3, 1.0
    a5: f32 = div a1, a4
    a6: D = cast a5
    b0: D = load x[i0, i1 + s1]
    b1: D = mul a6, b0
    store y[i0, i1] = b1
  outputs y
""", [(0, 5), (1, 1), (3, 333), (2, 12288)], lambda d, s: {"x": _randn(d, s[0], 2 * s[1])},
    lambda g: {"y": torch.nn.functional.silu(g["x"].chunk(2, -1)[0]) * g["x"].chunk(2, -1)[1]})  # fmt: skip

CASES["softmax"] = Case(
    f"""program softmax
  symbol s0 in 0..64 from dim x 0
  symbol s1 in 1..40960 from dim x 1
  buffer x: D[s0, s1] input
  buffer y: D[s0, s1] temp
  kernel k {{i0 < s0}} reduce {{r0 < s1}} {N}
    a0: D = load x[i0, r0]
    a1: f32 = cast a0
    a2: f32 = max a1 over r0
    a3: f32 = sub a1, a2
    a4: f32 = exp a3
    a5: f32 = sum a4 over r0
    a6: f32 = div a4, a5
    a7: D = cast a6
    store y[i0, r0] = a7
  outputs y
""",
    [(0, 3), (1, 1), (3, 77), (2, 5001)],
    lambda d, s: {"x": _randn(d, *s) * 4},
    lambda g: {"y": g["x"].softmax(-1)},
)

CASES["layer_norm"] = Case(f"""program layer_norm
  symbol s0 in 1..4096 from dim x 0
  buffer x: D[s0, 500] input
  buffer w: D[500] weight
  buffer b: D[500] weight
  buffer y: D[s0, 500] temp
  kernel k {{i0 < s0}} reduce {{r0 < 500}} {N}
    a0: D = load x[i0, r0]
    a1: f32 = cast a0
    a2: f32 = sum a1 over r0
    a3: f32 = div a2, 500.0
    a4: f32 = sub a1, a3
    a5: f32 = mul a4, a4
    a6: f32 = sum a5 over r0
    a7: f32 = div a6, 500.0
    a8: f32 = add a7, 1e-05
    a9: f32 = rsqrt a8
    c0: f32 = mul a4, a9
    w0: D = load w[r0]
    w1: f32 = cast w0
    c1: f32 = mul c0, w1
    b0: D = load b[r0]
    b1: f32 = cast b0
    c2: f32 = add c1, b1
    c3: D = cast c2
    store y[i0, r0] = c3
  outputs y
""", [(1,), (4,)], lambda d, s: {"x": _randn(d, s[0], 500) + 3, "w": _randn(d, 500), "b": _randn(d, 500)},
    lambda g: {"y": torch.nn.functional.layer_norm(g["x"], (500,), g["w"], g["b"], 1e-5)})  # fmt: skip

CASES["concatenate"] = Case(f"""program concatenate
  symbol s0 in 0..64 from dim x 0
  symbol s1 in 0..4096 from dim x 1
  symbol s2 in 0..4096 from dim z 1
  buffer x: D[s0, s1] input
  buffer z: D[s0, s2] input
  buffer y: D[s0, s1 + s2] temp
  kernel k {{i0 < s0, i1 < s1 + s2}} {N}
    p0: i64 = index i1
    p1: i64 = index s1
    m0: b1 = lt p0, p1
    m1: b1 = not m0
    a0: D = load x[i0, i1] if m0 else 0.0
    a1: D = load z[i0, i1 - s1] if m1 else 0.0
    a2: D = where m0, a0, a1
    store y[i0, i1] = a2
  outputs y
""", [(1, 1, 1), (3, 0, 5), (2, 7, 0), (5, 130, 67), (2, 1024, 1500)],
    lambda d, s: {"x": _randn(d, s[0], s[1]), "z": _randn(d, s[0], s[2])},
    lambda g: {"y": torch.cat([g["x"], g["z"]], 1)}, exact=True)  # fmt: skip

CASES["gather"] = Case(
    f"""program gather
  symbol s0 in 0..4096 from dim t 0
  buffer t: i64[s0] input
  buffer x: D[300, 96] weight
  buffer y: D[s0, 96] temp
  kernel k {{i0 < s0, i1 < 96}} {N}
    t0: i64 = load t[i0]
    a0: D = load x[t0, i1]
    store y[i0, i1] = a0
  outputs y
""",
    [(0,), (1,), (37,)],
    lambda d, s: {"t": torch.randint(0, 300, s), "x": _randn(d, 300, 96)},
    lambda g: {"y": g["x"][g["t"]]},
    exact=True,
)

CASES["argmax"] = Case(
    f"""program argmax
  symbol s0 in 1..64 from dim x 0
  symbol s1 in 1..40960 from dim x 1
  buffer x: D[s0, s1] input
  buffer y: i64[s0] temp
  buffer v: D[s0] temp
  kernel k {{i0 < s0}} reduce {{r0 < s1}} {N}
    a0: D = load x[i0, r0]
    p: i64 = index r0
    (m: D, j: i64) = argmax a0, p over r0
    store y[i0] = j
    store v[i0] = m
  outputs y, v
""",
    [(1, 1), (4, 100), (2, 3001)],
    lambda d, s: {"x": _randn(d, *s).round()},
    lambda g: {"y": g["x"].argmax(1), "v": g["x"].amax(1)},
    exact=True,
)

CASES["cumulative_sum"] = Case(
    f"""program cumulative_sum
  symbol s0 in 1..64 from dim x 0
  buffer x: D[s0, 300] input
  buffer y: f32[s0, 300] temp
  kernel k {{i0 < s0}} reduce {{r0 < 300}} {N}
    a0: D = load x[i0, r0]
    a1: f32 = cast a0
    a2: f32 = scan.sum a1 over r0
    store y[i0, r0] = a2
  outputs y
""",
    [(1,), (5,)],
    lambda d, s: {"x": _randn(d, s[0], 300)},
    lambda g: {"y": (g["x"] if g["x"].dtype == torch.float64 else g["x"].float()).cumsum(1)},
)

CASES["cache_write"] = Case(f"""program cache_write
  symbol s0 in 1..40960 from dim x 0
  symbol s1 in 1..40960 from dim c 1
  buffer x: D[s0, 4, 64] input
  buffer p: i64[s0] input
  buffer c: D[4, s1, 64] state
  kernel k {{i0 < s0, i1 < 4, i2 < 64}} {N}
    p0: i64 = load p[i0]
    a0: D = load x[i0, i1, i2]
    store c[i1, p0, i2] = a0
  outputs c
""", [(1, 1), (3, 9), (8, 200)],
    lambda d, s: {"x": _randn(d, s[0], 4, 64), "p": torch.randperm(s[1])[: s[0]], "c": _randn(d, 4, s[1], 64)},
    lambda g: {"c": g["c"].index_copy(1, g["p"], g["x"].transpose(0, 1))}, exact=True)  # fmt: skip

CASES["column_sum"] = Case(
    f"""program column_sum
  symbol s0 in 1..40960 from dim x 0
  buffer x: D[s0, 200] input
  buffer y: f32[200] temp
  kernel k {{i0 < 200}} reduce {{r0 < s0}} {N}
    a0: D = load x[r0, i0]
    a1: f32 = cast a0
    a2: f32 = sum a1 over r0
    store y[i0] = a2
  outputs y
""",
    [(1,), (300,)],
    lambda d, s: {"x": _randn(d, s[0], 200)},
    lambda g: {"y": (g["x"] if g["x"].dtype == torch.float64 else g["x"].float()).sum(0)},
)

# the flat offset can pass 2^31: the generator computes it in 64 bits; rows are far apart, so that a 32-bit offset would wrap
CASES["far_rows"] = Case(
    f"""program far_rows
  symbol s0 in 1..100000 from dim x 0
  buffer x: D[s0, 100000] input
  buffer y: D[s0] temp
  kernel k {{i0 < s0}} {N}
    a0: D = load x[i0, 99999]
    a1: D = neg a0
    store y[i0] = a1
  outputs y
""",
    [(1,), (6,)],
    lambda d, s: {"x": _randn(d, s[0], 1).expand(s[0], 100000).contiguous()},
    lambda g: {"y": -g["x"][:, -1]},
    exact=True,
)
