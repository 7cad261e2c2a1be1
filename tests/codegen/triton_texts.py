"""Kernels in IR text that stand for everything the Triton generator must express."""

from __future__ import annotations

_HEAD = "program p\n  symbol s0 in 1..64 from dim x 0\n  symbol s1 in 1..40960 from dim x 1\n"
NUMERICS = "numerics(eager, contract=off, acc=f32)"

_RMSNORM = f"""
  buffer x: bf16[s0, s1, {{n}}] input
  buffer w: bf16[{{n}}] weight
  buffer y: bf16[s0, s1, {{n}}] temp
  kernel k {{{{i0 < s0, i1 < s1}}}} reduce {{{{r0 < {{n}}}}}} {NUMERICS}
    a0: bf16 = load x[i0, i1, r0]
    a1: f32 = cast a0
    a2: f32 = mul a1, a1
    a3: f32 = sum a2 over r0
    a4: f32 = div a3, {{n}}.0
    a5: f32 = add a4, 1e-06
    a6: f32 = rsqrt a5
    a7: f32 = mul a1, a6
    a8: bf16 = cast a7
    a9: f32 = cast a8
    w0: bf16 = load w[r0]
    w1: f32 = cast w0
    w2: f32 = mul a9, w1
    w3: bf16 = cast w2
    store y[i0, i1, r0] = w3
  outputs y
"""
_RESIDUAL = f"""
  buffer x: bf16[s0, s1, {{n}}] input
  buffer r: bf16[s0, s1, {{n}}] state
  buffer y: bf16[s0, s1, {{n}}] temp
  kernel k {{{{i0 < s0, i1 < s1}}}} reduce {{{{r0 < {{n}}}}}} {NUMERICS}
    a0: bf16 = load x[i0, i1, r0]
    a1: f32 = cast a0
    b0: bf16 = load r[i0, i1, r0]
    b1: f32 = cast b0
    h0: f32 = add a1, b1
    h1: bf16 = cast h0
    store r[i0, i1, r0] = h1
    h2: f32 = cast h1
    a2: f32 = mul h2, h2
    a3: f32 = sum a2 over r0
    a4: f32 = div a3, {{n}}.0
    a6: f32 = rsqrt a4
    a7: f32 = mul h2, a6
    a8: bf16 = cast a7
    store y[i0, i1, r0] = a8
  outputs r, y
"""

TEXTS: dict[str, str] = {
    "rmsnorm": _RMSNORM.format(n=4096),
    "rmsnorm_odd": _RMSNORM.format(n=1000),
    "rmsnorm_long": _RMSNORM.format(n=20000),
    "residual": _RESIDUAL.format(n=4096),
    "residual_long": _RESIDUAL.format(n=20000),
    "rotary": f"""
  buffer x: bf16[s0, s1, 32, 128] input
  buffer w: bf16[128] weight
  buffer cos: bf16[s0, s1, 128] input
  buffer sin: bf16[s0, s1, 128] input
  buffer y: bf16[s0, 32, s1, 128] temp
  kernel k {{i0 < s0, i1 < s1, i2 < 32}} reduce {{r0 < 128}} {NUMERICS}
    a0: bf16 = load x[i0, i1, i2, r0]
    a1: f32 = cast a0
    a2: f32 = mul a1, a1
    a3: f32 = sum a2 over r0
    a4: f32 = mul a3, 0.0078125
    a5: f32 = add a4, 1e-06
    a6: f32 = rsqrt a5
    a7: f32 = mul a1, a6
    a8: bf16 = cast a7
    a9: f32 = cast a8
    w0: bf16 = load w[r0]
    w1: f32 = cast w0
    w2: f32 = mul a9, w1
    w3: bf16 = cast w2
    w4: f32 = cast w3
    b0: bf16 = load x[i0, i1, i2, (r0 + 64) % 128]
    b1: f32 = cast b0
    b2: f32 = mul b1, a6
    b3: bf16 = cast b2
    b4: f32 = cast b3
    u0: bf16 = load w[(r0 + 64) % 128]
    u1: f32 = cast u0
    u2: f32 = mul b4, u1
    u3: bf16 = cast u2
    u4: f32 = cast u3
    p0: i64 = index r0
    p1: b1 = lt p0, 64
    u5: f32 = neg u4
    u6: f32 = where p1, u5, u4
    c0: bf16 = load cos[i0, i1, r0]
    c1: f32 = cast c0
    c2: f32 = mul w4, c1
    c3: bf16 = cast c2
    c4: f32 = cast c3
    s2: bf16 = load sin[i0, i1, r0]
    s3: f32 = cast s2
    s4: f32 = mul u6, s3
    s5: bf16 = cast s4
    s6: f32 = cast s5
    d0: f32 = add c4, s6
    d1: bf16 = cast d0
    store y[i0, i2, i1, r0] = d1
  outputs y
""",
    "silu_mul": f"""
  buffer x: bf16[s0, s1, 24576] input
  buffer y: bf16[s0, s1, 12288] temp
  kernel k {{i0 < s0, i1 < s1, i2 < 12288}} {NUMERICS}
    a0: bf16 = load x[i0, i1, i2]
    a1: f32 = cast a0
    a2: f32 = neg a1
    a3: f32 = exp a2
    a4: f32 = add a3, 1.0
    a5: f32 = div a1, a4
    a6: bf16 = cast a5
    a7: f32 = cast a6
    b0: bf16 = load x[i0, i1, i2 + 12288]
    b1: f32 = cast b0
    b2: f32 = mul a7, b1
    b3: bf16 = cast b2
    store y[i0, i1, i2] = b3
  outputs y
""",
    "softmax": f"""
  buffer x: f32[s0, s1] input
  buffer y: f32[s0, s1] temp
  kernel k {{i0 < s0}} reduce {{r0 < s1}} {NUMERICS}
    a0: f32 = load x[i0, r0]
    a1: f32 = max a0 over r0
    a2: f32 = sub a0, a1
    a3: f32 = exp a2
    a4: f32 = sum a3 over r0
    a5: f32 = div a3, a4
    store y[i0, r0] = a5
  outputs y
""",
    "layernorm": f"""
  buffer x: f16[s0, s1, 768] input
  buffer w: f16[768] weight
  buffer b: f16[768] weight
  buffer y: f16[s0, s1, 768] temp
  buffer m: f32[s0, s1] temp
  kernel k {{i0 < s0, i1 < s1}} reduce {{r0 < 768}} {NUMERICS}
    a0: f16 = load x[i0, i1, r0]
    a1: f32 = cast a0
    z: f32 = mul a1, 0.0
    o: f32 = add z, 1.0
    (mean: f32, m2: f32, n: f32) = welford a1, z, o over r0
    var: f32 = div m2, n
    v1: f32 = add var, 1e-05
    v2: f32 = rsqrt v1
    v3: f32 = sub a1, mean
    v4: f32 = mul v3, v2
    w0: f16 = load w[r0]
    w1: f32 = cast w0
    b0: f16 = load b[r0]
    b1: f32 = cast b0
    v5: f32 = mul v4, w1
    v6: f32 = add v5, b1
    v7: f16 = cast v6
    store y[i0, i1, r0] = v7
    store m[i0, i1] = mean
  outputs y, m
""",
    "cross_entropy": f"""
  buffer x: bf16[s0, 5000] input
  buffer t: i64[s0] input
  buffer y: f32[s0] temp
  kernel k {{i0 < s0}} reduce {{r0 < 5000}} {NUMERICS}
    a0: bf16 = load x[i0, r0]
    a1: f32 = cast a0
    a2: f32 = max a1 over r0
    a3: f32 = sub a1, a2
    a4: f32 = exp a3
    a5: f32 = sum a4 over r0
    a6: f32 = log a5
    a7: f32 = add a6, a2
    t0: i64 = load t[i0]
    ok: b1 = ge t0, 0
    g0: bf16 = load x[i0, t0] if ok else 0.0
    g1: f32 = cast g0
    l0: f32 = sub a7, g1
    l1: f32 = where ok, l0, 0.0
    store y[i0] = l1
  outputs y
""",
    "argmax": f"""
  buffer x: bf16[s0, s1] input
  buffer y: i64[s0] temp
  buffer v: bf16[s0] temp
  buffer z: i64[s0] temp
  kernel k {{i0 < s0}} reduce {{r0 < s1}} {NUMERICS}
    a0: bf16 = load x[i0, r0]
    p: i64 = index r0
    (m: bf16, j: i64) = argmax a0, p over r0
    (l: bf16, i: i64) = argmin a0, p over r0
    store y[i0] = j
    store v[i0] = m
    store z[i0] = i
  outputs y, v, z
""",
    "cumsum": f"""
  buffer x: f32[s0, 300] input
  buffer y: f32[s0, 300] temp
  kernel k {{i0 < s0}} reduce {{r0 < 300}} {NUMERICS}
    a0: f32 = load x[i0, r0]
    a1: f32 = scan.sum a0 over r0
    store y[i0, r0] = a1
  outputs y
""",
    "cumulative_loop": f"""
  buffer x: i64[s0, s1] input
  buffer y: i64[s0, s1] temp
  buffer z: i64[s0, s1] temp
  kernel k {{i0 < s0}} reduce {{r0 < s1}} {NUMERICS}
    a0: i64 = load x[i0, r0]
    a1: i64 = scan.sum a0 over r0
    a2: i64 = scan.max a0 over r0
    a3: i64 = sum a0 over r0
    a4: i64 = sub a1, a3
    store y[i0, r0] = a4
    store z[i0, r0] = a2
  outputs y, z
""",
    "columns": f"""
  buffer x: bf16[s1, 200] input
  buffer g: f32[s1] input
  buffer y: f32[200] temp
  kernel k {{i0 < 200}} reduce {{r0 < s1}} {NUMERICS}
    a0: bf16 = load x[r0, i0]
    a1: f32 = cast a0
    g0: f32 = load g[r0]
    a2: f32 = mul a1, g0
    a3: f32 = sum a2 over r0
    store y[i0] = a3
  outputs y
""",
    "batch_statistics": f"""
  buffer x: f32[s0, 5, s1] input
  buffer mean: f32[5] temp
  buffer y: f32[s0, 5, s1] temp
  kernel k {{i0 < 5}} reduce {{r0 < s0, r1 < s1}} {NUMERICS}
    a0: f32 = load x[r0, i0, r1]
    a1: f32 = sum a0 over r0, r1
    c0: i64 = index s0*s1
    c1: f32 = cast c0
    a2: f32 = div a1, c1
    a3: f32 = sub a0, a2
    store mean[i0] = a2
    store y[r0, i0, r1] = a3
  outputs mean, y
""",
    "transpose": f"""
  buffer x: i16[s0, 7, 33] input
  buffer y: i16[33, s0, 7] temp
  kernel k {{i0 < s0, i1 < 7, i2 < 33}} {NUMERICS}
    a0: i16 = load x[i0, i1, i2]
    a1: i16 = add a0, 32767
    store y[i2, i0, i1] = a1
  outputs y
""",
    "integers": f"""
  buffer x: i32[s0, 40] input
  buffer d: i32[s0, 40] input
  buffer u: u8[s0, 40] input
  buffer f: b1[s0, 40] input
  buffer q: i32[s0, 40] temp
  buffer r: i32[s0, 40] temp
  buffer t: i32[s0, 40] temp
  buffer m: i32[s0, 40] temp
  buffer v: u8[s0, 40] temp
  buffer g: b1[s0, 40] temp
  buffer c: b1[s0] temp
  buffer a: b1[s0] temp
  kernel k {{i0 < s0}} reduce {{r0 < 40}} {NUMERICS}
    x0: i32 = load x[i0, r0]
    d0: i32 = load d[i0, r0]
    u0: u8 = load u[i0, r0]
    f0: b1 = load f[i0, r0]
    q0: i32 = floordiv x0, d0
    r1: i32 = mod x0, d0
    t0: i32 = truncdiv x0, d0
    m0: i32 = fmod x0, d0
    v0: u8 = add u0, 200
    v1: u8 = shr v0, 1
    g0: b1 = not f0
    g1: b1 = lt x0, d0
    g2: b1 = xor g0, g1
    c0: b1 = any g2 over r0
    c1: b1 = all f0 over r0
    store q[i0, r0] = q0
    store r[i0, r0] = r1
    store t[i0, r0] = t0
    store m[i0, r0] = m0
    store v[i0, r0] = v1
    store g[i0, r0] = g2
    store c[i0] = c0
    store a[i0] = c1
  outputs q, r, t, m, v, g, c, a
""",
    "scatter_add": f"""
  buffer x: f32[s0, 64] input
  buffer j: i64[s0] input
  buffer y: f32[10, 64] state
  buffer z: i32[10] state
  kernel k {{i0 < s0, i1 < 64}} {NUMERICS}
    a0: f32 = load x[i0, i1]
    j0: i64 = load j[i0]
    one: i32 = cast j0
    store.add y[j0, i1] = a0
    store.max z[j0] = one
  outputs y, z
""",
    "accumulate": f"""
  buffer x: bf16[s0, 64] input
  buffer y: bf16[s0, 64] state
  buffer z: f32[s0] state
  kernel k {{i0 < s0}} reduce {{r0 < 64}} {NUMERICS}
    a0: bf16 = load x[i0, r0]
    a1: f32 = cast a0
    a2: f32 = sum a1 over r0
    store.add y[i0, r0] = a0
    store.max z[i0] = a2
  outputs y, z
""",
    "embedding": f"""
  buffer t: i64[s0, s1] input
  buffer x: bf16[151936, 96] weight
  buffer y: bf16[s0, s1, 96] temp
  kernel k {{i0 < s0, i1 < s1, i2 < 96}} {NUMERICS}
    t0: i64 = load t[i0, i1]
    a0: bf16 = load x[t0, i2]
    store y[i0, i1, i2] = a0
  outputs y
""",
    "online": f"""
  buffer x: f32[s0, s1] input
  buffer y: f32[s0] temp
  kernel k {{i0 < s0}} reduce {{r0 < s1}} {NUMERICS}
    a0: f32 = load x[i0, r0]
    z: f32 = mul a0, 0.0
    o: f32 = add z, 1.0
    (m: f32, t: f32) = online_softmax a0, o over r0
    l: f32 = log t
    e: f32 = add l, m
    store y[i0] = e
  outputs y
""",
    "row_state": f"""
  buffer x: f32[s0, 512] input
  buffer c: f32[s0] state
  buffer y: f32[s0, 512] temp
  kernel k {{i0 < s0, i1 < 512}} {NUMERICS}
    schedule lane=i1 tiles(i1=512) loop() warps=4 stages=1
    a0: f32 = load x[i0, i1]
    c0: f32 = load c[i0]
    a1: f32 = sub a0, c0
    c1: f32 = add c0, 1.0
    store y[i0, i1] = a1
    store c[i0] = c1
  outputs y, c
""",
    "scalar": f"""
  buffer x: f32[] input
  buffer y: f32[] temp
  kernel k {{}} {NUMERICS}
    a0: f32 = load x[]
    a1: f32 = sqrt a0
    store y[] = a1
  outputs y
""",
}
TEXTS = {name: f"{_HEAD}{text.lstrip(chr(10))}" for name, text in TEXTS.items()}
