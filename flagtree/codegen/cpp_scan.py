"""Running values: how each is carried from point to point of its axis, and what one step of it says.

Along lanes a sum whose order cannot be seen runs in blocks of a fixed tree (templates/cpp_reduce.h, `running`), so that its bits are
the same at every level; every other running value goes element by element.  `cpp_sweeps` declares the carry, `cpp_body` writes the step.
"""

from __future__ import annotations

from flagtree.codegen import cpp_ops as ops
from flagtree.codegen.cpp_layout import Layout
from flagtree.errors import CodegenError
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.program import Compute, Scan

STEPS = {"sum": "{0} + {1}", "prod": "{0} * {1}", "min": "minimum({0}, {1})", "max": "maximum({0}, {1})",
         "any": "{0} | {1}", "all": "{0} & {1}"}  # fmt: skip


def carry_type(op: Scan) -> str:
    """Register type of a running value: f64 for float sums and products, as ATen's on the CPU (at::acc_type)."""
    return "f64" if op.combiner in ("sum", "prod") and DTYPES[op.dtype].is_float else ops.register(op.dtype)


def in_blocks(layout: Layout, op: Scan, whole: bool) -> bool:
    """A sum along lanes that is walked as one piece (`whole`), of integers or of numbers no wider than f32: in f64 those add up
    without overflow, and the order shows only far below a last place of f32."""
    if op.combiner != "sum" or not whole or layout.lane is None or layout.lane.name != op.axis:
        return False
    if not DTYPES[op.dtype].is_float:
        return True
    source = next((o for o in layout.kernel.body if isinstance(o, Compute) and o.op == "cast" and o.name == op.arg), None)
    origin = source.args[0] if source is not None else op.arg
    return isinstance(origin, str) and DTYPES[layout.kernel.dtypes[origin]].bits <= 32


def declared(layout: Layout, op: Scan, whole: bool, start: str) -> str:
    """The declaration of `<name>_carry`, which holds `start` before the first point: a vector in every lane, a scalar along lanes."""
    kind = carry_type(op)
    if in_blocks(layout, op, whole):
        return f"running<{kind}v> {op.name}_carry = {{splat({start})}};"
    along = layout.lane is not None and layout.lane.name == op.axis
    return f"{kind} {op.name}_carry = {start};" if along else f"{kind}v {op.name}_carry = splat({start});"


def step(layout: Layout, op: Scan, whole: bool, along: bool) -> tuple[list[str], str]:
    """Statements that bring the carry forward over one vector (`along`: over its lanes), and the running value's expression."""
    if op.combiner not in STEPS:
        raise CodegenError(f"cannot generate C++ for a scan with '{op.combiner}'")
    register, source, carry = ops.register(op.dtype), ops.cast(op.arg, layout.kernel.dtypes[op.arg], op.dtype), carry_type(op)
    value = source if carry == register else f"to_{carry}({source})"
    if not along:
        lines, text = [f"{op.name}_carry = {STEPS[op.combiner].format(op.name + '_carry', value)};"], f"{op.name}_carry"
    elif in_blocks(layout, op, whole):
        lines, text = [], f"advance({op.name}_carry, {value}, {op.axis})"
    else:
        lines, text = _lane_by_lane(op, carry, value), f"{op.name}_wide"
    return lines, ops.rounded(text if carry == register else f"to_{register}({text})", op.dtype)


def _lane_by_lane(op: Scan, carry: str, value: str) -> list[str]:
    before, now = f"{op.name}_carry", f"{op.name}_in"
    following = STEPS[op.combiner].format(before, now)
    if op.combiner in ("min", "max"):
        following = f"{STEPS[op.combiner].format(f'splat({before})', f'splat({now})')}[0]"
    return [
        f"{carry}v {op.name}_wide = {value};",
        "for (int l = 0; l < n; ++l) {",
        f"  const {carry} {now} = {op.name}_wide[l];",
        f"  {op.name}_wide[l] = {before} = {following};",
        "}",
    ]
