"""Equal computations have equal digests whatever their names; different ones do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from flagtree.ir.canonical import digest, isolate, isolate_all
from flagtree.ir.program import Kernel
from flagtree.ir.text import parse_program, print_program

NORM = """program p
  symbol s0 in 1..64 from dim x 0
  symbol s1 in 1..64 from dim x 1
  buffer x: bf16[s0, s1, 4096] input
  buffer w: f32[4096] weight
  buffer xt: bf16[s0, 4096, s1] input strides(4096*s1, 1, 4096) alias x + 0
  buffer y: bf16[s1, s0, 4096] temp
  kernel norm {i < s0*s1} reduce {r < 4096} numerics(eager, contract=off, acc=f32)
    origin "a" "b" "c"
    ops "aten.mean.dim"
    schedule lane=r tiles(r=4096) loop() warps=4 stages=1
    a: bf16 = load xt[(i // s1), r, (i % s1)]
    b: f32 = cast a
    c: f32 = sum b over r
    p: i64 = index i + s0
    m: b1 = lt p, 12
    d: f32 = load w[r] if m else 0.0
    e: f32 = mul c, d
    f: bf16 = cast e
    store y[(i % s1), (i // s1), r] = f
  outputs y
"""


def only(text: str) -> str:
    program = parse_program(text)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return digest(isolate(program, kernel).program)


def rename(text: str, names: dict[str, str]) -> str:
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda m: names.get(m.group(), m.group()), text)


def test_isolated_form() -> None:
    program = parse_program(NORM)
    ((kernel, alone),) = isolate_all(program)
    assert kernel is program.steps[0]
    assert alone.buffers == ("xt", "w", "y")
    assert sorted(alone.symbols) == ["s0", "s1"]
    text = print_program(alone.program)
    assert parse_program(text) == alone.program
    assert [b.role for b in alone.program.buffers] == ["input", "input", "temp"]
    assert alone.program.buffers[0].alias_of is None
    assert [str(s) for s in alone.program.buffers[0].layout] == [f"4096*n{alone.symbols.index('s1')}", "1", "4096"]
    assert "origin" not in text
    assert "aten" not in text
    assert "kernel kernel {i0 < n0*n1} reduce {r0 < 4096}" in text


@pytest.mark.parametrize(
    "names",
    [
        {"s0": "z", "s1": "bb"},
        {"s0": "s1", "s1": "s0"},
        {"s0": "i0", "s1": "r0"},  # a symbol may be called like a canonical axis
        {"s0": "n1", "s1": "n0"},
        {"i": "r0", "r": "i0", "a": "v3", "f": "a", "b": "c", "c": "b"},
        {"x": "b1", "w": "b0", "xt": "layer.0", "y": "out", "norm": "k7"},
    ],
)
def test_digest_does_not_depend_on_names(names: dict[str, str]) -> None:
    assert only(rename(NORM, names)) == only(NORM)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("acc=f32", "acc=f64"),
        ("warps=4", "warps=8"),
        ("in 1..64 from dim x 0", "in 2..64 from dim x 0"),
        ("in 1..64 from dim x 1", "in 1..64 multiple 8 from dim x 1"),
        ("strides(4096*s1, 1, 4096)", "strides(4096*s1, 1, 8192)"),
        ("index i + s0", "index i + s1"),
        ("mul c, d", "mul d, c"),
        ("else 0.0", "else 1.0"),
        ("lt p, 12", "le p, 12"),
        ("store y", "store.add y"),
    ],
)
def test_digest_depends_on_the_rest(old: str, new: str) -> None:
    assert old in NORM
    assert only(NORM.replace(old, new)) != only(NORM)


def test_origins_and_reports_do_not_count() -> None:
    assert only(NORM.replace('origin "a" "b" "c"', 'origin "d" "e" "f"').replace("mean.dim", "sum")) == only(NORM)


def test_equal_views_are_one_buffer_and_roles_follow_use() -> None:
    text = """program p
  buffer x: f32[8] state
  buffer v: f32[8] state alias x + 0
  buffer a: f32[8] temp
  buffer m: f32[8] temp
  kernel k {i < 8} numerics(eager, contract=off, acc=f32)
    a: f32 = load x[i]
    store v[i] = a
    store a[i] = a
    store.max m[i] = a
  outputs a, m
"""
    program = parse_program(text)
    alone = isolate(program, program.steps[0])  # type: ignore[arg-type]
    assert alone.buffers == ("x", "a", "m")
    assert [b.role for b in alone.program.buffers] == ["state", "temp", "state"]


def test_kernels_of_a_repeat_count_once() -> None:
    text = """program p
  buffer h: f32[8] temp
  buffer g: f32[8] temp
  buffer f: f32[8] temp
  repeat l 2 bind f = (h, g)
    kernel k {i < 8} numerics(eager, contract=off, acc=f32)
      a: f32 = load f[i]
      store f[i] = a
  kernel k2 {i < 8} numerics(eager, contract=off, acc=f32)
    a: f32 = load g[i]
    store g[i] = a
  outputs h
"""
    found = list(isolate_all(parse_program(text)))
    assert [k.name for k, _ in found] == ["k", "k2"]
    assert digest(found[0][1].program) == digest(found[1][1].program)


def test_digest_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import sys; from flagtree.ir.canonical import *; from flagtree.ir.text import parse_program;"
        "p = parse_program(sys.stdin.read()); print(digest(isolate(p, p.steps[0]).program))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], input=NORM, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("0", "1", "12345")
    }
    assert seen == {only(NORM)}
