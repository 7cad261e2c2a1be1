"""Footprints against a count of the elements actually touched, by enumerating the domain."""

from __future__ import annotations

import itertools

import pytest

from flagtree.ir.facts import Facts
from flagtree.ir.program import Kernel, Load, Program, Store
from flagtree.ir.text import parse_program
from flagtree.ir.traffic import buffer_bytes, footprint, program_traffic

SIZES = {"s": 3, "m": 8}


def kernel_of(axes: str, lines: str) -> Program:
    body = "".join(f"    {line.strip()}\n" for line in lines.strip().splitlines())
    return parse_program(f"""program p
  symbol s in 1..64 from argument
  symbol m in 1..64 from argument
  buffer x: f32[s, 24] input
  buffer xv: f32[24, s] input strides(1, 24) alias x + 0
  buffer h: f16[16, m] state
  buffer t: i64[s] input
  buffer y: f32[s, 24] temp
  buffer z: f32[2*s, 24] temp
  kernel k {{{axes}}} numerics(eager, contract=off, acc=f32)
{body}  outputs y
""")


def touched(program: Program) -> tuple[int, int]:
    """Bytes by walking every point; masks of the form index comparison."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    facts = Facts.of(program, kernel)
    sets: tuple[set, set] = (set(), set())
    names = [a.name for a in kernel.axes]
    for point in itertools.product(*(range(a.extent.evaluate(SIZES)) for a in kernel.axes)):
        values = {**SIZES, **dict(zip(names, point, strict=True))}
        for op in kernel.body:
            if isinstance(op, Load | Store) and all(c.evaluate(values) >= 0 for c in facts.constraints(op.access.mask)):
                b = program.buffer(op.access.buffer)
                positions = [facts.resolve(i).evaluate(values) for i in op.access.index]
                place = sum(p * n.evaluate(SIZES) for p, n in zip(positions, b.layout, strict=True))
                sizes = {"f32": 4, "f16": 2, "i64": 8}
                for which in (0, 1) if isinstance(op, Store) and op.mode != "set" else (int(isinstance(op, Store)),):
                    sets[which].add((program.root(b.name), place, sizes[b.dtype]))
    return sum(e[2] for e in sets[0]), sum(e[2] for e in sets[1])


@pytest.mark.parametrize(
    ("axes", "lines"),
    [
        ("i < s, j < 24", "a: f32 = load x[i, j]\nstore y[i, j] = a"),
        ("i < s, j < 24", "a: f32 = load x[i, j]\nb: f32 = load x[i, (j + 12) % 24]\nstore y[i, j] = b"),  # rotary
        ("i < s, j < 12", "a: f32 = load x[i, j]\nb: f32 = load x[i, j + 12]\nstore y[i, j] = a\nstore y[i, j + 12] = b"),
        ("i < s, j < 12", "a: f32 = load x[i, 2*j]\nstore y[i, j] = a"),
        ("i < s, j < 24", "a: f32 = load x[i, j // 8]\nstore y[i, j] = a"),  # grouped heads
        ("i < s, j < 24", "a: f32 = load xv[j, i]\nb: f32 = load xv[j, i]\nstore y[i, j] = b"),
        ("f < 24*s", "a: f32 = load x[f // 24, f % 24]\nstore y[f // 24, f % 24] = a"),
        ("i < s, j < 6, k < 4", "a: f32 = load x[i, 4*j + k]\nstore y[i, 0] = a"),
        ("i < s, j < 24", "a: f32 = load x[0, j]\nstore y[i, j] = a"),
        ("i < s, j < 24", "p: i64 = index j - 4\nq: b1 = ge p, 0\na: f32 = load x[i, j - 4] if q else 0.0\nstore y[i, j] = a"),
        (
            "i < 2*s, j < 24",
            "p: i64 = index i\nq: b1 = lt p, s_\na: f32 = load x[i, j] if q else 0.0\nstore z[i, j] = a".replace("s_", "3"),
        ),
        ("i < 16, j < m", "a: f16 = load h[i, j]\nstore.add h[i, j] = a"),
        ("i < s", "a: f32 = load x[i, 0]\nb: f32 = load x[i, 3]\nstore y[i, 1] = a\nstore y[i, 2] = b"),
    ],
)
def test_footprint_is_what_is_touched(axes: str, lines: str) -> None:
    program = kernel_of(axes, lines)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    assert footprint(program, kernel, SIZES) == touched(program)


def test_a_stencil_counts_at_most_its_buffer() -> None:
    lines = "a: f32 = load x[i, j]\nb: f32 = load x[i, j + 1]\nc: f32 = load x[i, j + 2]\nstore y[i, j] = c"
    program = kernel_of("i < s, j < 22", lines)
    read, written = footprint(program, program.steps[0], SIZES)  # type: ignore[arg-type]
    assert (read, written) == (3 * 24 * 4, 3 * 22 * 4)


def test_a_gather_counts_one_row_per_index() -> None:
    program = kernel_of("i < 2, j < 24", "r: i64 = load t[i]\na: f32 = load x[r, j]\nstore y[i, j] = a")
    assert footprint(program, program.steps[0], SIZES) == (2 * 8 + 2 * 24 * 4, 2 * 24 * 4)  # type: ignore[arg-type]
    # more indices than rows: at most the table
    program = kernel_of("i < 9, j < 24", "r: i64 = load t[i % s]\na: f32 = load x[r, j]\nstore y[i % s, j] = a")
    assert footprint(program, program.steps[0], SIZES)[0] == 3 * 8 + 3 * 24 * 4  # type: ignore[arg-type]


def test_zero_extents_move_nothing() -> None:
    program = kernel_of("i < s, j < 24", "a: f32 = load x[i, j]\nstore y[i, j] = a")
    assert footprint(program, program.steps[0], {"s": 0, "m": 1}) == (0, 0)  # type: ignore[arg-type]


def test_program_traffic() -> None:
    program = parse_program("""program p
  symbol s in 1..64 from argument
  buffer x: f32[s, 8] input
  buffer wide: f32[4, s, 8] input strides(0, 8, 1) alias x + 0
  buffer w: f32[6, 8] weight
  buffer ids: i64[s] input
  buffer table: f16[1000, 8] weight
  buffer rows: f16[s, 8] temp
  buffer kc: f32[100, 8] state
  buffer k: f32[s, 8] input
  buffer v: f32[s, 8] input
  buffer y: f32[s, 6] temp
  buffer o: f32[s, 8] temp
  extern e0: (y) = aten.linear.default(x, w) reason "gemm"
  extern e1: (rows) = aten.embedding.default(table, ids)
  extern e2: (o) = flagtree.attention.default(x, k, v, kc, kc, none, 1.0) mutates(kc)
  extern e3: () = aten.add_.Scalar(kc, 1.0) mutates(kc)
  repeat r 3
    kernel k {i < s, j < 8} numerics(eager, contract=off, acc=f32)
      a: f32 = load x[i, j]
      store o[i, j] = a
  template t: (y) = gemm(x, w) numerics(eager, contract=off, acc=f32)
    epilogue
      b: f32 = load y[i0, i1]
      c: f32 = add acc, b
      store y[i0, i1] = c
  outputs y
""")
    found = program_traffic(program, {"s": 5})
    x, w, y, kc = 5 * 8 * 4, 6 * 8 * 4, 5 * 6 * 4, 100 * 8 * 4
    assert [(s.name, s.bytes_read, s.bytes_written, s.launches) for s in found.steps] == [
        ("e0", x + w, y, 1),
        ("e1", 5 * 8 + 5 * 8 * 2, 5 * 8 * 2, 1),
        ("e2", kc + x, x + 2 * x, 1),
        ("e3", kc, kc, 1),
        ("k", 3 * x, 3 * x, 3),
        ("t", x + w + y, y, 1),
    ]
    assert found.launches == 8
    assert found.generated == 6 * x + x + w + 2 * y
    assert found.generated + found.extern == sum(s.bytes for s in found.steps)
    assert buffer_bytes(program, "wide", {"s": 5}) == x


@pytest.mark.parametrize(("tokens", "taken"), [(1, 2), (3, 6), (100, 8)])
def test_a_call_over_experts_reads_the_weights_of_those_that_can_be_chosen(tokens: int, taken: int) -> None:
    program = parse_program("""program p
  symbol t in 1..100 from dim x 0
  buffer x: bf16[t, 16] input
  buffer w: bf16[8, 32, 16] weight
  buffer order: i32[2*t] input
  buffer starts: i32[9] input
  buffer y: bf16[2*t, 32] temp
  extern e: (y) = flagtree.experts_up.default(x, w, order, starts, 2)
  outputs y
""")
    (step,) = program_traffic(program, {"t": tokens}).steps
    assert step.bytes_read == tokens * 16 * 2 + taken * 32 * 16 * 2 + tokens * 2 * 4 + 9 * 4
    assert step.bytes_written == tokens * 2 * 32 * 2
