"""The executor against torch eager: kernels, externs, repeats, views, late sizes, numbers, mutation, several threads."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from flagtree.errors import BindError, BundleError, CodegenError
from flagtree.runtime import frame
from flagtree.runtime.cpu import load_library
from flagtree.runtime.launch import Executable
from flagtree.runtime.prepare import Call
from tests.work import calls

Build = Callable[..., tuple[dict, bytes]]
COPY = "float *x = b[0], *y = b[1]; for (int64_t i = 0; i < {n}; i++) y[i] = {f};"


def executable(built: tuple[dict, bytes], **options: Any) -> Executable:
    launch, library = built
    return Executable(json.loads(json.dumps(launch)), load_library(library), **options)


CHAIN = """
program chain
  symbol s0 in 1..64 multiple 1 from dim x 0
  buffer x: f32[s0, 16] input
  buffer w: f32[16, 16] weight
  buffer t0: f32[s0, 16] temp
  buffer t1: f32[s0, 16] temp
  buffer t2: f32[s0, 16] temp
  buffer t3: f32[s0, 16] temp
  kernel k0 {i0 < s0, i1 < 16}
    v0: f32 = load x[i0, i1]
    v1: f32 = add v0, 1.0
    store t0[i0, i1] = v1
  extern e0: (t1) = aten.linear.default(t0, w, none) reason "gemm"
  kernel k1 {i0 < s0, i1 < 16}
    v0: f32 = load t1[i0, i1]
    v1: f32 = mul v0, v0
    store t2[i0, i1] = v1
  extern e1: (t3) = aten.softmax.int(t2, -1) {dtype = none} reason "test"
  outputs t3, t2, x
"""
CHAIN_BODIES = {"k0": COPY.format(n="n[0] * 16", f="x[i] + 1"), "k1": COPY.format(n="n[0] * 16", f="x[i] * x[i]")}


def chain(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = torch.nn.functional.linear(x + 1, w) ** 2
    return square.softmax(-1), square


def test_kernels_and_externs_over_several_sizes(build: Build) -> None:
    run = executable(build(CHAIN, CHAIN_BODIES))
    assert [b.name for b in run.inputs] == ["x", "w"]
    w = torch.randn(16, 16)
    kept = []
    for size in (1, 5, 64, 5, 1):
        x = torch.randn(size, 16)
        out, square, same = run.call([x, w])
        torch.testing.assert_close((out, square), chain(x, w))
        assert same is x
        kept.append((out, x))
    for out, x in kept:  # later calls do not write into what earlier ones returned
        torch.testing.assert_close(out, chain(x, w)[0])


def test_an_empty_tensor_and_the_ends_of_a_range(build: Build) -> None:
    run = executable(build(CHAIN.replace("in 1..64", "in 0..64"), CHAIN_BODIES))
    out, square, _ = run.call([torch.empty(0, 16), torch.randn(16, 16)])
    assert out.shape == square.shape == (0, 16)
    with pytest.raises(BindError, match="s0 = 65 is out of range"):
        run.call([torch.empty(65, 16), torch.randn(16, 16)])


def test_the_promise_of_a_multiple_is_checked(build: Build) -> None:
    run = executable(build(CHAIN.replace("multiple 1", "multiple 4"), CHAIN_BODIES))
    run.call([torch.randn(8, 16), torch.randn(16, 16)])
    with pytest.raises(BindError, match="s0 = 6 is not a multiple of 4"):
        run.call([torch.randn(6, 16), torch.randn(16, 16)])


def test_bound_weights(build: Build) -> None:
    run = executable(build(CHAIN, CHAIN_BODIES))
    w = torch.randn(16, 16)
    session = run.bind({"w": w})
    assert [b.name for b in session.inputs] == ["x"]
    x = torch.randn(3, 16)
    torch.testing.assert_close(session([x])[:2], chain(x, w))
    with pytest.raises(BindError, match="takes 1 inputs, 2 were given"):
        session([x, w])


def test_constants_are_not_asked_for(build: Build) -> None:
    w = torch.randn(16, 16)
    run = executable(build(CHAIN.replace("] weight", "] constant"), CHAIN_BODIES), constants={"w": w, "unused": w})
    assert [b.name for b in run.inputs] == ["x"]
    x = torch.randn(2, 16)
    torch.testing.assert_close(run.call([x])[:2], chain(x, w))


def test_several_threads_at_once(build: Build) -> None:
    run = executable(build(CHAIN, CHAIN_BODIES))
    w = torch.randn(16, 16)

    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        right = True
        for _ in range(100):
            x = torch.randn(7, 16, generator=generator)
            right &= torch.allclose(run.call([x, w])[0], chain(x, w)[0], atol=1e-6)
        return right

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # switch between any two steps
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_the_caller_s_modes_change_nothing(build: Build) -> None:
    w = torch.randn(16, 16)
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode()):
        run = executable(build(CHAIN, CHAIN_BODIES))  # a new one: also what is allocated once
        x = torch.randn(3, 16)
        expected = chain(x, w)
        with mode:
            out = run.call([x, w])[:2]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(run.call([x, w])[:2], expected)
        assert not run._session._frames[(3,)].arena.is_inference()


def test_nothing_of_the_caller_is_kept(build: Build) -> None:
    import weakref

    run = executable(build(CHAIN, CHAIN_BODIES))
    x, w = torch.randn(3, 16), torch.randn(16, 16)
    outputs = run.call([x, w])
    seen = [weakref.ref(t) for t in (x, w, *outputs)]
    del x, w, outputs
    assert [r() for r in seen] == [None] * 5


def test_frames_are_kept_within_bounds(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from flagtree.runtime import launch

    monkeypatch.setattr(launch, "KEPT_FRAMES", 3)
    run = executable(build(CHAIN, CHAIN_BODIES))
    w = torch.randn(16, 16)
    for size in range(1, 9):
        run.call([torch.randn(size, 16), w])
    assert list(run._session._frames) == [(6,), (7,), (8,)]
    monkeypatch.setattr(launch, "KEPT_BYTES", 10)
    run.call([torch.randn(9, 16), w])
    assert (9,) not in run._session._frames


REPEAT = """
program deep
  symbol s0 in 1..64 from dim x 0
  buffer x: f32[s0, 8] input
  buffer h: f32[s0, 8] temp
  buffer w: f32[8, 8] weight
  buffer w.0: f32[8, 8] weight
  buffer w.1: f32[8, 8] weight
  buffer w.2: f32[8, 8] weight
  buffer c: f32[s0, 8] state
  buffer c.0: f32[s0, 8] state
  buffer c.1: f32[s0, 8] state
  buffer c.2: f32[s0, 8] state
  buffer wt: f32[8, 8] weight strides(1, 8) alias w + 0
  buffer half: f32[s0, 4] temp strides(8, 1) alias t + 4
  buffer t: f32[s0, 8] temp
  buffer u: f32[s0, 8] temp
  buffer g: f32[s0, 4] temp
  kernel first {i0 < s0, i1 < 8}
    v0: f32 = load x[i0, i1]
    store h[i0, i1] = v0
  repeat layers 3 bind w = (w.0, w.1, w.2), c = (c.0, c.1, c.2)
    extern mm: (t) = aten.mm.default(h, wt) reason "gemm"
    extern half_: (g) = aten.relu.default(half) reason "test"
    kernel mix {i0 < s0, i1 < 8}
      v0: f32 = load t[i0, i1]
      v1: f32 = load g[i0, i1 % 4]
      v2: f32 = add v0, v1
      store u[i0, i1] = v2
      store c[i0, i1] = v2
    kernel residual {i0 < s0, i1 < 8}
      v0: f32 = load h[i0, i1]
      v1: f32 = load u[i0, i1]
      v2: f32 = add v0, v1
      store h[i0, i1] = v2
  extern last: (y) = aten.clone.default(h) reason "test"
  buffer y: f32[s0, 8] temp
  outputs y
"""
REPEAT_BODIES = {
    "first": COPY.format(n="n[0] * 8", f="x[i]"),
    "mix": "float *t = b[0], *g = b[1], *u = b[2], *c = b[3];"
    " for (int64_t i = 0; i < n[0] * 8; i++) u[i] = c[i] = t[i] + g[i / 8 * 4 + i % 4];",
    "residual": "float *h = b[0], *u = b[1]; for (int64_t i = 0; i < n[0] * 8; i++) h[i] += u[i];",
}


def deep(x: torch.Tensor, weights: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    h, states = x.clone(), []
    for w in weights:
        t = h @ w.t()
        states.append(t + t[:, 4:].relu().repeat(1, 2))
        h = h + states[-1]
    return h, states


def test_a_repeat_binds_every_layer(build: Build) -> None:
    launch, library = build(REPEAT, REPEAT_BODIES)
    run = executable((launch, library))
    assert [b.name for b in run.inputs] == ["x", "w.0", "w.1", "w.2", "c.0", "c.1", "c.2"]
    weights = [torch.randn(8, 8) for _ in range(3)]
    session = run.bind({f"w.{i}": w for i, w in enumerate(weights)})
    for size in (1, 6, 64):
        x, states = torch.randn(size, 8), [torch.zeros(size, 8) for _ in range(3)]
        (y,) = session([x, *states])
        expected, caches = deep(x, weights)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(states, caches)


def test_layers_share_memory_when_their_lives_do_not_meet(build: Build) -> None:
    launch, library = build(REPEAT, REPEAT_BODIES)
    deeper = json.loads(json.dumps(launch).replace('"repeat": 3', '"repeat": 24'))
    step = next(s for s in deeper["steps"] if "repeat" in s)
    for formal, prefix in (("w", "w."), ("c", "c.")):
        step["bindings"][formal] = [f"{prefix}{i % 3}" for i in range(24)]
    arenas = []
    for one in (launch, deeper):
        run = executable((one, library))
        run.call([torch.randn(16, 8), *(torch.randn(8, 8) for _ in range(3)), *(torch.zeros(16, 8) for _ in range(3))])
        arenas.append(next(iter(run._session._frames.values())).arena_bytes)
    assert arenas[0] == arenas[1]


TWICE = """
program twice
  buffer x: f32[4] input
  buffer w: f32[4] weight
  buffer a: f32[4] weight
  buffer b: f32[4] weight
  buffer tail: f32[2] weight alias w + 2
  buffer h: f32[4] temp
  kernel first {i0 < 4}
    v0: f32 = load x[i0]
    store h[i0] = v0
  repeat one 1 bind w = (a)
    kernel k1 {i0 < 4}
      v0: f32 = load h[i0]
      v1: f32 = load tail[i0 % 2]
      v2: f32 = add v0, v1
      store h[i0] = v2
  repeat two 1 bind w = (b)
    kernel k2 {i0 < 4}
      v0: f32 = load h[i0]
      v1: f32 = load tail[i0 % 2]
      v2: f32 = mul v0, v1
      store h[i0] = v2
  extern last: (y) = aten.clone.default(h) reason "test"
  buffer y: f32[4] temp
  outputs y
"""


def test_two_repeats_may_bind_the_same_formal(build: Build) -> None:
    body = "float *h = b[0], *t = b[1]; for (int i = 0; i < 4; i++) h[i] = h[i] {} t[i % 2];"
    run = executable(build(TWICE, {"first": COPY.format(n="4", f="x[i]"), "k1": body.format("+"), "k2": body.format("*")}))
    x, a, b = torch.randn(3, 4)
    torch.testing.assert_close(run.call([x, a, b])[0], (x + a[2:].repeat(2)) * b[2:].repeat(2))


CHAINED = """
program chained
  buffer x: f32[64] input
  buffer h: f32[64] temp
  buffer a: f32[64] temp
  buffer c: f32[64] temp
  buffer d: f32[64] temp
  kernel k0 {i0 < 64}
    v0: f32 = load x[i0]
    store h[i0] = v0
  repeat layers 5 bind unused = (x, x, x, x, x)
    kernel k1 {i0 < 64}
      v0: f32 = load h[i0]
      store a[i0] = v0
    kernel k2 {i0 < 64}
      v0: f32 = load a[i0]
      store c[i0] = v0
    kernel k3 {i0 < 64}
      v0: f32 = load c[i0]
      store d[i0] = v0
    kernel k4 {i0 < 64}
      v0: f32 = load d[i0]
      store h[i0] = v0
  extern last: (y) = aten.clone.default(h) reason "test"
  buffer unused: f32[64] input
  buffer y: f32[64] temp
  outputs y
"""


def test_what_lives_within_one_iteration_is_reused_within_it(build: Build) -> None:
    step = COPY.format(n="64", f="x[i] + 1")
    run = executable(build(CHAINED, dict.fromkeys(("k0", "k1", "k2", "k3", "k4"), step)))
    x = torch.randn(64)
    torch.testing.assert_close(run.call([x])[0], x + 21)
    # h is overwritten after a was written, so one of a, c, d lies beside it and the one before: three places for four buffers
    assert next(iter(run._session._frames.values())).arena_bytes == 3 * 256


LATE = """
program late
  symbol s0 in 1..64 from dim x 0
  symbol u0 in 0..512 from dim nz 0
  buffer x: f32[s0, 8] input
  buffer t: f32[s0, 8] temp
  buffer nz: i64[u0, 2] temp
  buffer y: f32[u0] temp
  buffer z: f32[u0, 3] temp
  kernel k0 {i0 < s0, i1 < 8}
    v0: f32 = load x[i0, i1]
    store t[i0, i1] = v0
  extern e0: (nz) = aten.nonzero.default(t) reason "size depends on the data"
  kernel k1 {i0 < u0}
    v0: i64 = load nz[i0, 1]
    v1: f32 = cast v0
    store y[i0] = v1
  kernel k2 {i0 < u0, i1 < 3}
    v0: f32 = load y[i0]
    store z[i0, i1] = v0
  outputs z
"""
LATE_BODIES = {
    "k0": COPY.format(n="n[0] * 8", f="x[i]"),
    "k1": "int64_t *z = b[0]; float *y = b[1]; for (int64_t i = 0; i < n[0]; i++) y[i] = z[2 * i + 1];",
    "k2": "float *y = b[0], *z = b[1]; for (int64_t i = 0; i < n[0] * 3; i++) z[i] = y[i / 3];",
}


def test_sizes_that_an_extern_decides(build: Build) -> None:
    # torch.nonzero gives column-major strides: the kernels read what was declared, so the result is copied and counted
    run = executable(build(LATE, LATE_BODIES))
    for size, threshold in ((4, 0.0), (4, 1.0), (9, 0.5), (2, 99.0)):
        x = torch.randn(size, 8)
        x[x < threshold] = 0
        (z,) = run.call([x])
        assert torch.equal(z, x.nonzero()[:, 1].float()[:, None].expand(-1, 3))
    assert run.restrided == {"e0": 3}
    run = executable(build(LATE.replace("u0 in 0..512", "u0 in 0..3"), LATE_BODIES))
    with pytest.raises(BindError, match="u0 = 16 is out of range"):
        run.call([torch.ones(2, 8)])


NUMBERS = """
program numbers
  symbol n in 1..9 from scalar k
  buffer x: f32[6] input
  buffer k: i64[] scalar
  buffer a: f64[] scalar
  buffer t: f32[6] temp
  buffer y: f32[6] temp
  buffer z: f32[n, 6] temp
  kernel k0 {i0 < 6}
    v0: f32 = load x[i0]
    v1: f64 = load a[]
    v2: f32 = cast v1
    v3: f32 = mul v0, v2
    store t[i0] = v3
  extern e0: (y) = aten.add.Scalar(t, a, index(2*n)) reason "test"
  extern e1: (z) = aten.expand_copy.default(y, [index(n), 6]) {implicit = false} reason "test"
  outputs z, y
"""
NUMBERS_BODIES = {"k0": "float *x = b[0], *y = b[2]; double *a = b[1]; for (int i = 0; i < 6; i++) y[i] = x[i] * *a;"}


def test_numbers_as_inputs(build: Build) -> None:
    run = executable(build(NUMBERS, NUMBERS_BODIES))
    for k, a in ((1, 0.5), (4, -3.0), (4, 2), (9, 1e-3)):
        x = torch.randn(6)
        z, y = run.call([x, k, a])
        torch.testing.assert_close(y, x * a + 2 * k * a)
        assert torch.equal(z, y.expand(k, 6))
    with pytest.raises(BindError, match="n = 10 is out of range"):
        run.call([torch.randn(6), 10, 1.0])


ALIASES = """
program aliases
  symbol s0 in 1..64 from dim x 0
  buffer x: f32[s0, 8] input
  buffer xt: f32[8, s0] input strides(1, 8) alias x + 0
  buffer row: f32[8] input alias x + 8*s0 - 8
  buffer t: f32[s0, 8] temp
  buffer tt: f32[8, s0] temp strides(1, 8) alias t + 0
  buffer m: f32[s0, s0] temp
  kernel k0 {i0 < s0, i1 < 8}
    v0: f32 = load x[i0, i1]
    v1: f32 = load row[i1]
    v2: f32 = add v0, v1
    store t[i0, i1] = v2
  extern e0: (m) = aten.mm.default(t, xt) reason "gemm"
  kernel k1 {i0 < 8}
    v0: f32 = load row[i0]
    v1: f32 = mul v0, 2.0
    store row[i0] = v1
  outputs tt, x, xt, row, m
"""
ALIASES_BODIES = {
    "k0": "float *x = b[0], *r = b[1], *t = b[2]; for (int64_t i = 0; i < n[0] * 8; i++) t[i] = x[i] + r[i % 8];",
    "k1": "float *r = b[0]; for (int i = 0; i < 8; i++) r[i] *= 2;",
}


def test_views_of_inputs_and_of_results_and_mutation(build: Build) -> None:
    run = executable(build(ALIASES, ALIASES_BODIES))
    for size in (1, 5, 9):
        backing = torch.randn(size + 2, 8)
        x = backing[1:-1]  # a caller's own view: offsets count from its first element
        before, around = x.clone(), (backing[0].clone(), backing[-1].clone())
        tt, same, xt, row, m = run.call([x])
        expected = before + before[-1]
        assert torch.equal(tt, expected.t())
        assert tt.stride() == (1, 8)
        assert same is x
        torch.testing.assert_close(m, expected @ before.t())
        assert torch.equal(x, torch.cat([before[:-1], before[-1:] * 2]))
        assert xt.data_ptr() == x.data_ptr()
        assert torch.equal(xt, x.t())
        assert row.data_ptr() == x[-1].data_ptr()
        assert torch.equal(backing[0], around[0])
        assert torch.equal(backing[-1], around[1])


def _with_extern(callee: str, args: list, *, outputs: list | None = None, strides: object = None, **step: object) -> dict:
    buffer = {"dtype": "f32", "shape": [2, 3], "strides": None, "role": "input", "alias": None}
    call = {"extern": callee, "name": "e", "args": args, "kwargs": {}, "outputs": ["y"] if outputs is None else outputs}
    return {
        "format": 1,
        "name": "one",
        "symbols": [],
        "buffers": [{**buffer, "name": "x"}, {**buffer, "name": "y", "role": "temp", "strides": strides}],
        "outputs": ["y"],
        "steps": [{**call, "mutates": [], "reason": "", **step}],
    }


X = {"buffer": "x"}


def test_operands_of_every_form() -> None:
    x = torch.randn(2, 3)
    cases: list[tuple[str, list, dict, Callable[[], torch.Tensor]]] = [
        ("aten.clamp.default", [X, {"float": "-inf"}, 0.5], {}, lambda: x.clamp(max=0.5)),
        ("aten.cat.default", [{"list": [X]}, 0], {}, lambda: x),
        ("aten.roll.default", [X, {"list": [1]}, {"list": [{"index": 1}]}], {}, lambda: x.roll(1, 1)),
        ("aten._to_copy.default", [X], {"dtype": {"type": ["dtype", "f32"]}, "device": {"type": ["device", "cpu"]}}, lambda: x),
        ("aten.clone.default", [X], {"memory_format": {"type": ["memory_format", "contiguous_format"]}}, lambda: x),
        ("aten.full_like.default", [X, {"float": "nan"}], {"layout": {"type": ["layout", "torch.strided"]}}, lambda: x * float("nan")),
        ("aten.add.Tensor", [X, X], {"alpha": {"index": ["+", 1, 1]}}, lambda: 3 * x),
        ("aten.div.Tensor_mode", [X, X], {"rounding_mode": "floor"}, lambda: torch.ones(2, 3)),
        ("prims.neg.default", [X], {}, lambda: -x),
    ]
    for callee, args, kwargs, expected in cases:
        (y,) = Executable(_with_extern(callee, args, kwargs=kwargs)).call([x])
        torch.testing.assert_close(y, expected(), equal_nan=True)


def test_several_and_unused_results() -> None:
    x = torch.randn(2, 3)
    launch = _with_extern("aten.sort.default", [X, 1], outputs=["y", None])
    assert torch.equal(Executable(launch).call([x])[0], x.sort(1)[0])
    launch = {**_with_extern("aten.sort.default", [X, 1], outputs=["y", None]), "outputs": [None, "y", "y", {"index": 7}]}
    none, one, two, seven = Executable(launch).call([x])
    assert none is None
    assert one is two
    assert seven == 7


def test_a_result_in_other_strides_is_copied_and_counted() -> None:
    x = torch.randn(2, 3)
    run = Executable(_with_extern("aten.clone.default", [X], strides=[1, 2]))
    (y,) = run.call([x])
    assert torch.equal(y, x)
    assert y.stride() == (1, 2)
    assert run.restrided == {"e": 1}


def test_a_result_of_another_size_or_type_is_an_error() -> None:
    with pytest.raises(BindError, match=r"aten\.sum\.default returned torch\.float32 \(\)"):
        Executable(_with_extern("aten.sum.default", [X])).call([torch.randn(2, 3)])
    with pytest.raises(BindError, match=r"returned torch\.bool"):
        Executable(_with_extern("aten.logical_not.default", [X])).call([torch.randn(2, 3)])


def test_a_view_that_an_extern_returns_is_its_own_memory(build: Build) -> None:
    text = """
program views
  buffer x: f32[2, 3] input
  buffer t: f32[2, 3] temp
  buffer y: f32[3, 2] temp strides(1, 3)
  kernel k0 {i0 < 2, i1 < 3}
    v0: f32 = load x[i0, i1]
    store t[i0, i1] = v0
  extern e0: (y) = aten.t.default(t) reason "test"
  outputs y
"""
    run = executable(build(text, {"k0": COPY.format(n="6", f="x[i]")}))
    x = torch.randn(2, 3)
    (y,) = run.call([x])
    run.call([torch.randn(2, 3)])
    assert torch.equal(y, x.t())
    # an operator that returns its operand against its schema: still not the arena
    silent = executable(
        build(
            text.replace("aten.t.default(t)", "aten.dropout.default(t, 0.5, false)").replace("[3, 2] temp strides(1, 3)", "[2, 3] temp"),
            {"k0": COPY.format(n="6", f="x[i]")},
        )
    )
    (y,) = silent.call([x])
    silent.call([torch.randn(2, 3)])
    assert torch.equal(y, x)


def test_a_view_of_what_is_written_later_keeps_its_values(build: Build) -> None:
    text = """
program later
  buffer x: f32[2, 3] state
  buffer y: f32[3, 2] temp strides(1, 3)
  extern e0: (y) = aten.t.default(x) reason "test"
  kernel k0 {i0 < 2, i1 < 3}
    v0: f32 = load x[i0, i1]
    v1: f32 = add v0, 1.0
    store x[i0, i1] = v1
  outputs y
"""
    run = executable(build(text, {"k0": "float *x = b[0]; for (int i = 0; i < 6; i++) x[i] += 1;"}))
    x = torch.randn(2, 3)
    before = x.clone()
    (y,) = run.call([x])
    assert torch.equal(y, before.t())
    torch.testing.assert_close(x, before + 1)
    # of what is only read, a view is a view
    (y,) = Executable(_with_extern("aten.view.default", [X, {"list": [2, 3]}])).call([x])
    assert y.data_ptr() == x.data_ptr()


def test_kernels_read_results_in_the_declared_strides(build: Build) -> None:
    text = """
program strided
  buffer x: f32[4, 6] input
  buffer y: f32[4, 6] temp strides(1, 4)
  buffer z: f32[4, 6] temp
  extern e0: (y) = aten.mul.Scalar(x, 2.0) reason "test"
  kernel k0 {i0 < 4, i1 < 6}
    v0: f32 = load y[i0, i1]
    store z[i0, i1] = v0
  outputs z
"""
    body = "float *y = b[0], *z = b[1]; for (int i = 0; i < 4; i++) for (int j = 0; j < 6; j++) z[6 * i + j] = y[i + 4 * j];"
    run = executable(build(text, {"k0": body}))
    x = torch.randn(4, 6)
    for _ in range(2):
        assert torch.equal(run.call([x])[0], 2 * x)
    assert run.restrided == {"e0": 2}


def test_an_operator_that_returns_its_operand_keeps_it_alive(build: Build) -> None:
    text = """
program lives
  buffer x: f32[4096] input
  buffer a: f32[4096] temp
  buffer d: f32[4096] temp
  buffer c: f32[4096] temp
  buffer e: f32[4096] temp
  buffer y: f32[4096] temp
  kernel k0 {i0 < 4096}
    v0: f32 = load x[i0]
    store a[i0] = v0
  extern e0: (d) = aten.dropout.default(a, 0.5, false) reason "test"
  kernel k1 {i0 < 4096}
    v0: f32 = load x[i0]
    v1: f32 = add v0, 1.0
    store c[i0] = v1
  kernel k2 {i0 < 4096}
    v0: f32 = load c[i0]
    v1: f32 = add v0, 1.0
    store e[i0] = v1
  kernel k3 {i0 < 4096}
    v0: f32 = load d[i0]
    v1: f32 = load e[i0]
    v2: f32 = add v0, v1
    store y[i0] = v2
  outputs y
"""
    add = COPY.format(n="4096", f="x[i] + 1")
    bodies = {
        "k0": COPY.format(n="4096", f="x[i]"),
        "k1": add,
        "k2": add,
        "k3": "float *d = b[0], *e = b[1], *y = b[2]; for (int i = 0; i < 4096; i++) y[i] = d[i] + e[i];",
    }
    x = torch.randn(4096)
    torch.testing.assert_close(executable(build(text, bodies)).call([x])[0], 2 * x + 2)


def test_effects_stay_in_order() -> None:
    launch = _with_extern("aten.rand_like.default", [X])
    launch["buffers"].append({**launch["buffers"][1], "name": "z"})
    launch["steps"].append({**launch["steps"][0], "name": "f", "outputs": ["z"]})
    launch["outputs"] = ["y", "z"]
    x = torch.randn(2, 3)
    torch.manual_seed(3)
    y, z = Executable(launch).call([x])
    torch.manual_seed(3)
    assert torch.equal(y, torch.rand_like(x))
    assert torch.equal(z, torch.rand_like(x))


def test_flagtree_operators_are_registered_when_named() -> None:
    launch = _with_extern("flagtree.no_such.default", [X])
    with pytest.raises(BundleError, match=r"no operator 'flagtree\.no_such\.default'"):
        Executable(launch)
    assert hasattr(torch.ops.flagtree, "attend")


# -- hostile launch lists --------------------------------------------------------------------------------------------
HOSTILE = [
    "os.system.default", "aten.__class__.default", "aten.linear.__call__", "aten.linear", "load_library.x.y", "aten.linear.default.op",
    "builtins.eval.default", "a b.c.d", "", "aten..default", "aten.no_such_operator.default", "aten.linear.no_such_overload",
    "_ops.aten.linear", "__class__.mro.x", "torch.load.default", "aten.linear.name",
]  # fmt: skip


@pytest.mark.parametrize("callee", HOSTILE)
def test_a_callee_reaches_registered_operators_only(callee: str) -> None:
    with pytest.raises(BundleError):
        Executable(_with_extern(callee, [X]))


def test_user_operators_are_allowed_once_registered() -> None:
    launch = _with_extern("flagtree_test_user.twice.default", [X])
    with pytest.raises(BundleError, match=r"import the library that registers torch\.ops\.flagtree_test_user"):
        Executable(launch)
    library = torch.library.Library("flagtree_test_user", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    x = torch.randn(2, 3)
    assert torch.equal(Executable(launch).call([x])[0], x * 2)
    library._destroy()


def _change(path: list, value: object) -> Callable[[dict], None]:
    def apply(launch: dict) -> None:
        at: Any = launch
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return apply


KERNEL = {"kernel": "0" * 64, "name": "k", "buffers": ["x", "y"], "writes": [1], "symbols": []}
BAD = {
    "format": _change(["format"], 2),
    "no steps": lambda launch: launch.pop("steps"),
    "role": _change(["buffers", 0, "role"], "root"),
    "dtype": _change(["buffers", 0, "dtype"], "f7"),
    "shape": _change(["buffers", 0, "shape"], ["os"]),
    "operator": _change(["buffers", 0, "shape"], [["**", 2, 3]]),
    "depth": _change(["buffers", 0, "shape"], [json.loads("[\"+\",1," * 60 + "1" + "]" * 60)]),
    "zero": _change(["buffers", 0, "shape"], [["//", 1, 0]]),
    "alias loop": _change(["buffers", 1, "alias"], {"base": "y", "offset": 0}),
    "unknown operand": _change(["steps", 0, "args"], [{"buffer": "nothing"}]),
    "odd operand": _change(["steps", 0, "args"], [{"call": "x"}]),
    "odd type": _change(["steps", 0, "args"], [X, {"type": ["dtype", "os"]}]),
    "odd layout": _change(["steps", 0, "args"], [X, {"type": ["layout", "load"]}]),
    "unknown output": _change(["outputs"], ["nothing"]),
    "unwritten output": _change(["steps"], []),
    "symbol": _change(["symbols"], [{"name": "s", "min": 0, "max": 9, "multiple": 1, "source": ["env", "HOME"]}]),
    "symbol rank": _change(["symbols"], [{"name": "s", "min": 0, "max": 9, "multiple": 1, "source": ["dim", "x", 7]}]),
    "huge repeat": _change(["steps"], [{"repeat": 10**9, "bindings": {}, "steps": [{**KERNEL, "buffers": [], "writes": []}]}]),
    "kernel without library": _change(["steps"], [KERNEL]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_launch_list_is_one_error(case: str) -> None:
    launch = copy.deepcopy(_with_extern("aten.clone.default", [X]))
    BAD[case](launch)
    with pytest.raises(BundleError):
        Executable(launch)


def test_the_arena_never_overlaps_what_is_alive() -> None:
    import random

    from flagtree.runtime.memory import ALIGNMENT, Lifetime, place

    for seed in range(50):
        rng = random.Random(seed)
        count = rng.randrange(1, 60)
        lives = {}
        for i in range(count):
            first = rng.randrange(100)
            lives[f"b{i}"] = Lifetime(first, first + rng.randrange(30))
        sizes = {n: rng.choice([0, 1, 63, 64, 100, 4096]) for n in lives}
        offsets, top = place(sizes, lives)
        for a in lives:
            assert offsets[a] % ALIGNMENT == 0
            assert offsets[a] + sizes[a] <= top
            for b in lives:
                meet = lives[a].first <= lives[b].last and lives[b].first <= lives[a].last
                if a < b and meet and sizes[a] and sizes[b]:
                    assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]


def test_a_kernel_that_was_not_compiled() -> None:
    from flagtree.codegen.launch import launch_list
    from flagtree.ir.parse import parse_program

    with pytest.raises(CodegenError, match="'k0' was not compiled"):
        launch_list(parse_program(CHAIN.replace("16}", "16} numerics(eager, contract=off, acc=f32)")), {})


def test_the_time_of_one_launch(build: Build) -> None:
    """Ten small kernels and five externs: the executor's own time a kernel stays far below the cost of an ATen call."""
    lines, bodies, last = ["program time", "  buffer x: f32[64] input"], {}, "x"
    for i in range(10):
        lines += [
            f"  buffer t{i}: f32[64] temp",
            f"  kernel k{i} {{i0 < 64}}",
            f"    v0: f32 = load {last}[i0]",
            f"    store t{i}[i0] = v0",
        ]
        bodies[f"k{i}"], last = COPY.format(n="64", f="x[i]"), f"t{i}"
    launch, library = build("\n".join([*lines, f"  outputs {last}\n"]), bodies)
    run, x = executable((launch, library)), torch.randn(64)
    run.call([x])
    assert calls(lambda: run.call([x])) < 40  # ten kernels: the C call and the pointers of each, and what a call costs once
    assert isinstance(next(iter(run._session._frames.values())), frame.Frame)


DIRECT = """
program direct
  symbol s0 in 1..8 multiple 1 from dim x 0
  buffer x: f32[s0, 3, 8] input strides(8, 8*s0, 1)
  buffer w: f32[16, 8] weight
  buffer u: f32[16, 8] weight
  buffer g: f32[s0, 3, 16] temp
  buffer h: f32[s0, 3, 16] temp
  buffer m: f32[3, 16] temp alias h + 0
  buffer z: f32[3, 3] temp
  buffer y: f32[s0, 3, 16] temp
  extern e0: (g) = aten.linear.default(x, w, none) reason "gemm"
  extern e1: (h) = aten.linear.default(x, u) reason "gemm"
  extern e2: (z) = aten.mm.default(m, v) reason "gemm"
  kernel k0 {i0 < s0, i1 < 3, i2 < 16}
    v0: f32 = load g[i0, i1, i2]
    v1: f32 = load h[i0, i1, i2]
    v2: f32 = add v0, v1
    store y[i0, i1, i2] = v2
  outputs y, z
"""


def test_products_write_into_the_arena(build: Build) -> None:
    text = DIRECT.replace("  buffer u:", "  buffer v: f32[16, 3] weight\n  buffer u:")
    added = "float *g = b[0], *h = b[1], *y = b[2]; for (int64_t i = 0; i < n[0] * 48; i++) y[i] = g[i] + h[i];"
    run = executable(build(text, {"k0": added}))
    direct = {s.into for s in run.prepared.steps if isinstance(s, Call)}
    assert direct == {"g", "h", "z"}
    w, u, v = torch.randn(16, 8), torch.randn(16, 8), torch.randn(16, 3)
    for size in (1, 5, 1):
        x = torch.randn(3, size, 8).transpose(0, 1)  # its rows are no matrix without a copy
        y, z = run.call([x, w, v, u])
        torch.testing.assert_close(y, torch.nn.functional.linear(x, w) + torch.nn.functional.linear(x, u))
        torch.testing.assert_close(z, torch.nn.functional.linear(x, u).reshape(-1)[:48].view(3, 16) @ v)


def test_a_product_of_other_sizes_than_declared_is_refused(build: Build) -> None:
    text = CHAIN.replace("buffer t1: f32[s0, 16]", "buffer t1: f32[s0, 15]")
    with pytest.raises(BindError, match="t1|returns"):
        executable(build(text, CHAIN_BODIES)).call([torch.randn(2, 16), torch.randn(16, 16)])
