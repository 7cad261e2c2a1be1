"""Printer and parser are inverse; a wrong text names line, column and what was expected."""

from __future__ import annotations

import textwrap

import pytest

from flagtree.errors import IRError
from flagtree.ir.index import Index
from flagtree.ir.program import (
    Access,
    Alias,
    Axis,
    Buffer,
    Compute,
    Extern,
    Kernel,
    Load,
    Program,
    Ref,
    Store,
    TypeArg,
)  # fmt: skip
from flagtree.ir.text import parse_program, print_kernel, print_program

KERNEL = "program p\n  kernel k {} numerics(eager, contract=on, acc=f32)\n"
EVERYTHING = """program everything
  symbol s0 in 1..64 from dim x 0
  symbol s1 in 1..40960 multiple 8 from stride x 1
  symbol n in -3..7 from scalar start
  symbol m in 0..9 from argument
  buffer start: i64[] scalar
  buffer x: bf16[s0, s1, 4096] input
  buffer w: bf16[4096] weight
  buffer group: _[] opaque
  buffer xt: bf16[s0, 4096, s1] input strides(4096*s1, 1, 4096) alias x + n*s1 + 3
  buffer h.a: bf16[s0, ((s1 + 3) // 4)] temp
  buffer y: bf16[s0, s1, 4096] temp
  kernel k0 {i0 < s0, i1 < s1} reduce {r0 < 4096} numerics(eager, contract=off, acc=f32)
    origin "pow_1" "model.layers.0.input_layernorm" "modeling_qwen3.py:60"
    origin "mul \\"# \\u2028" "" ""
    ops "aten.pow.Tensor_Scalar" "aten.mean.dim"
    schedule lane=r0 tiles(r0=4096, i1=2) loop(i1) warps=4 stages=1
    v0: bf16 = load x[i0, i1, r0]
    v1: f32 = cast v0
    v2: f32 = mul v1, v1
    v3: f32 = ordered.sum v2 over r0
    v4: f32 = mul v3, 0.000244140625
    v5: i64 = index i1 + 1
    v6: b1 = lt v5, -12
    v7: bf16 = load x[i0, i1, ((r0 + 4032) % 4096)] if v6 else -0.0
    v8: f32 = add 1e-06, -inf
    v9: f32 = where true, nan, 1e+16
    (v10: f32, v11: i64) = argmax v1, v5 over r0
    v12: f32 = scan.sum v1 over r0
    v13: f32 = max v2 over i1, r0
    store y[i0, i1, r0] = v0
    store.add y[v11, i1, r0] = v0 if v6
    store.max y[i0, 0, 0] = v0
  kernel k1 reduce {r0 < 3} parallel {i0 < 2*s0} numerics(fused, contract=on, acc=f64)
    schedule tiles() loop() warps=8 stages=2
  kernel k2 {} numerics(eager, contract=off, acc=f32)
  extern e0: (y, _) = aten.linear.default(x, w, none, [2, [3.0, true], x], index(s0*s1), "a\\nb", -7) reason "gemm # 1" effect "rng"
    origin "linear" "lm_head" ""
  extern e1: () = c10d.barrier.default() {alpha = 1.0, dtype = type("dtype", "bf16")} mutates(x, y)
  template t0: (y) = gemm(x, w) {transposed = true} numerics(eager, contract=off, acc=f32)
    origin "mm" "" ""
    prologue
      p0: f32 = load w[i0]
    epilogue
      e0: bf16 = cast acc
      store y[i0, i1, i2] = e0
  repeat layers 2 bind w = (w, w), h.a = (h.a, y)
    kernel k3 {i0 < s0} numerics(eager, contract=off, acc=f32)
      v0: bf16 = load w[i0]
    repeat inner 1
      extern e2: (_) = aten.relu.default(w)
  outputs y, x
"""


def test_every_form_round_trips() -> None:
    program = parse_program(EVERYTHING)
    text = print_program(program)
    assert text == EVERYTHING
    assert print_program(parse_program(text)) == text
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    assert textwrap.indent(print_kernel(kernel), "  ") in text
    assert kernel.axes[2] == Axis("r0", Index.of(4096), "reduce")
    assert program.buffer("xt").alias_of == Alias("x", Index.of("n") * "s1" + 3)


def test_built_programs_round_trip_as_objects() -> None:
    i0, n = Index.of("i0"), Index.of("n")
    kernel = Kernel(
        "k",
        (Axis("i0", n),),
        (Load("a", "i8", Access("x", ((i0 * 3 + 5) // 4,))), Compute("b", "i8", "add", ("a", 3)), Store(Access("y", (i0,)), "b")),
    )
    extern = Extern("e", "aten.f.default", (Ref("x"), None, True, 1, 1.0, "s", n + 1, TypeArg("dtype", "f32"), ((), (1,))), (None, "y"))
    program = Program("p", (), (Buffer("x", "i8", (n,), "input"), Buffer("y", "i8", (n,))), (kernel, extern), ())
    assert parse_program(print_program(program)) == program


def test_comments_blank_lines_and_other_indentation() -> None:
    text = "# a comment\nprogram p # here\n\n      buffer x: f32[] input   # there\n      outputs x\n"
    assert print_program(parse_program(text)) == "program p\n  buffer x: f32[] input\n  outputs x\n"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", 1, "empty"),
        ("kernel k {}", 1, "'program'"),
        ("program p\n  outputs x y", 2, "','"),
        ("program p\n  buffer x: f32[2 input\n  outputs", 2, "unexpected 'input'"),
        ("program p\n  buffer x: f32[2 3] input\n  outputs", 2, "unexpected '3'"),
        ("program p\n  buffer x: f32[2] inputt\n  outputs", 2, "a role"),
        ("program p\n  buffer true: f32[2] input\n  outputs", 2, "name"),
        ("program p\n  symbol s in 1.5..3 from dim x 0\n  outputs", 2, "lower end"),
        ("program p\n  symbol s in 1..3 from nowhere\n  outputs", 2, "'scalar'"),
        ("program p\n  kernel k {} numerics(eager, contract=maybe, acc=f32)\n  outputs", 2, "'on' or 'off'"),
        (f"{KERNEL}    v: f32 = load x[i0 // 0]\n  outputs", 3, "zero"),
        (f"{KERNEL}    v: f32 = neg a b\n  outputs", 3, "','"),
        (f"{KERNEL}    v: f32 = neg a\n      w: f32 = neg v\n  outputs", 4, "nothing nested"),
        (f"{KERNEL}    (v: f32, w: f32) = neg a\n  outputs", 3, "'over'"),
        ("program p\n  buffer x: f32[" + "(" * 3000 + "1" + ")" * 3000 + "] input\n  outputs", 2, ""),
        ("program p\n  buffer x: f32[] input\n    outputs x", 3, "nothing nested"),
        ("program p\n  buffer x: f32[] input\n outputs x", 3, "an indentation of 2 blanks"),
        ("program p\n  buffer x: f32[] input ?\n  outputs x", 2, "'?'"),
        ("program p\n  extern e: (y) = f(1e) \n  outputs x", 2, "','"),
    ],
)
def test_errors_name_line_and_expectation(text: str, line: int, expected: str) -> None:
    with pytest.raises(IRError) as caught:
        parse_program(text)
    assert f"line {line}" in caught.value.where
    assert expected in str(caught.value)


def test_no_text_reaches_python() -> None:
    with pytest.raises(IRError):
        parse_program("program p\n  buffer x: f32[__import__('os').getcwd()] input\n  outputs x\n")
