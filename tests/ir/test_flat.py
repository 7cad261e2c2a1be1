"""Flat kernels: offsets, axes of extent one, joined axes, 32-bit proofs, breakpoints and the pieces between them."""

from __future__ import annotations

import pytest

from flagtree.codegen.segments import breakpoints, segments
from flagtree.errors import CodegenError
from flagtree.ir.flat import FlatKernel, flatten
from flagtree.ir.index import parse_index
from flagtree.ir.program import Load, Reduce, Store
from flagtree.ir.text import parse_program, print_op


def flat(body: str, buffers: str = "", head: str = "{i0 < n0, i1 < n1, i2 < 128}", collapse: bool = True) -> FlatKernel:
    buffers = buffers or "  buffer x: f32[n0, n1, 128] input\n  buffer y: f32[n0, n1, 128] temp\n"
    lines = "".join(f"    {line.strip()}\n" for line in body.strip().split("\n"))
    text = f"""program p
  symbol n0 in 1..64 from dim x 0
  symbol n1 in 1..40960 multiple 8 from dim x 1
{buffers}  kernel k {head} numerics(eager, contract=off, acc=f32)
{lines}  outputs y
"""
    return flatten(parse_program(text), collapse)


def axes(kernel: FlatKernel) -> list[str]:
    return [f"{a.name} < {a.extent}" for a in kernel.axes]


COPY = "v0: f32 = load x[i0, i1, i2]\nstore y[i0, i1, i2] = v0"


def test_contiguous_axes_become_one() -> None:
    kernel = flat(COPY)
    assert axes(kernel) == ["i2 < 128*n0*n1"]
    assert [str(op.access.index[0]) for op in kernel.body if isinstance(op, (Load, Store))] == ["i2", "i2"]


def test_collapse_can_be_left_out() -> None:
    assert axes(flat(COPY, collapse=False)) == ["i0 < n0", "i1 < n1", "i2 < 128"]


def test_a_broadcast_axis_stays_apart() -> None:
    buffers = "  buffer x: f32[n0, n1, 128] input\n  buffer w: f32[128] weight\n  buffer y: f32[n0, n1, 128] temp\n"
    kernel = flat("v0: f32 = load x[i0, i1, i2]\nv1: f32 = load w[i2]\nv2: f32 = mul v0, v1\nstore y[i0, i1, i2] = v2", buffers)
    assert axes(kernel) == ["i1 < n0*n1", "i2 < 128"]
    assert kernel.depends["v1"] == {"i2"}
    assert kernel.depends["v2"] == {"i1", "i2"}


def test_strides_that_do_not_nest_stay_apart() -> None:
    buffers = "  buffer x: f32[n0, n1, 128] input strides(128, 128*n0, 1)\n  buffer y: f32[n0, n1, 128] temp\n"
    assert axes(flat(COPY, buffers)) == ["i0 < n0", "i1 < n1", "i2 < 128"]


def test_a_position_keeps_its_axis() -> None:
    kernel = flat("v0: i64 = index i2\nv1: f32 = cast v0\nstore y[i0, i1, i2] = v1")
    assert axes(kernel) == ["i1 < n0*n1", "i2 < 128"]


def test_the_flat_position_itself_may_be_joined() -> None:
    kernel = flat("v0: i64 = index 128*n1*i0 + 128*i1 + i2\nv1: f32 = cast v0\nstore y[i0, i1, i2] = v1")
    assert axes(kernel) == ["i2 < 128*n0*n1"]


def test_unit_axes_vanish_but_a_reduction_keeps_one() -> None:
    buffers = "  buffer x: f32[1, n1, 1] input\n  buffer y: f32[1, n1] temp\n"
    body = "v0: f32 = load x[i0, i1, r0]\nv1: f32 = sum v0 over r0\nstore y[i0, i1] = v1"
    kernel = flat(body, buffers, "{i0 < 1, i1 < n1} reduce {r0 < 1}")
    assert axes(kernel) == ["i1 < n1", "r0 < 1"]


def test_reduce_axes_join_when_every_reduction_runs_over_both() -> None:
    buffers = "  buffer x: f32[n0, n1, 128] input\n  buffer y: f32[n0] temp\n"
    body = "v0: f32 = load x[i0, r0, r1]\nv1: f32 = sum v0 over r0, r1\nstore y[i0] = v1"
    kernel = flat(body, buffers, "{i0 < n0} reduce {r0 < n1, r1 < 128}")
    assert axes(kernel) == ["i0 < n0", "r1 < 128*n1"]
    assert next(op for op in kernel.body if isinstance(op, Reduce)).axes == ("r1",)


def test_a_position_used_as_an_index_is_written_out() -> None:
    kernel = flat("v0: i64 = index i1 + 1\nv1: f32 = load x[i0, v0, i2]\nstore y[i0, i1, i2] = v1")
    load = next(op for op in kernel.body if isinstance(op, Load))
    assert load.access.index == (parse_index("128*n1*i0 + 128*i1 + i2 + 128"),)


def test_32_bit_proofs() -> None:
    kernel = flat(COPY)
    assert kernel.fits_int32(parse_index("i2"))  # 64 * 40960 * 128 - 1 elements
    assert not kernel.fits_int32(parse_index("16*i2"))
    assert not kernel.fits_int32(parse_index("unknown"))
    buffers = "  buffer x: f32[n0, n1, 128] input\n  buffer y: f32[n0, n1, 128] temp\n  buffer t: i64[n1] input\n"
    gather = flat("v0: i64 = load t[i1]\nv1: f32 = load x[i0, v0, i2]\nstore y[i0, i1, i2] = v1", buffers)
    access = next(op.access for op in gather.body if isinstance(op, Load) and op.name == "v1")
    assert not gather.fits_int32(access.index[0])
    assert gather.access_fits_int32(access)  # the buffer is small enough


ROTARY = """v0: i64 = index i2
v1: b1 = lt v0, 64
v2: f32 = load x[i0, i1, (i2 + 64) % 128]
v3: f32 = neg v2
v4: f32 = where v1, v3, v2
store y[i0, i1, i2] = v4"""


def test_rotary_splits_in_two_without_branches() -> None:
    kernel = flat(ROTARY)
    assert [str(p) for p in breakpoints(kernel, "i2")] == ["64"]
    first, second = segments(kernel, "i2")
    assert (str(first.lo), str(first.hi), str(second.hi)) == ("0", "64", "128")
    assert print_op(first.body[0]).endswith("i2 + 64]")
    assert any("neg" in print_op(op) for op in first.body)
    assert not any("neg" in print_op(op) or "%" in print_op(op) or "lt" in print_op(op) for op in second.body)


def test_masked_accesses_vanish_where_they_are_off() -> None:
    kernel = flat("""v0: i64 = index i2
v1: b1 = ge v0, 100
v2: f32 = load x[i0, i1, i2 - 100] if v1 else 3.0
store y[i0, i1, i2] = v2 if v1""")
    off, on = segments(kernel, "i2")
    assert (str(off.lo), str(off.hi), off.body) == ("0", "100", ())
    assert [print_op(op) for op in on.body][-1].endswith("= v2")
    assert all(op.access.mask is None for op in on.body if isinstance(op, (Load, Store)))


def test_symbolic_breakpoints_need_a_proof_of_order() -> None:
    buffers = "  buffer x: f32[n0, n1, 128] input\n  buffer y: f32[n0, n1 + n0] temp\n"
    kernel = flat("""v0: i64 = index i1
v1: i64 = index n1
v2: b1 = lt v0, v1
v3: f32 = cast v2
store y[i0, i1] = v3""", buffers, "{i0 < n0, i1 < n0 + n1}")
    assert [str(p) for p in breakpoints(kernel, "i1")] == ["n1"]


def test_only_one_kernel_is_accepted() -> None:
    program = parse_program("program p\n  outputs\n")
    with pytest.raises(CodegenError, match="one isolated kernel"):
        flatten(program)
