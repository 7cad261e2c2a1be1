"""Products of quantised operands: a linear layer as a call, the experts of a mixture as quantisations, products, gate and weighted sum.

Invariant: what is quantised is a kernel of its own body, so that the norm or the gate before it fuses with it; the products are calls that
a target's pass takes.  Rules of `lowering.py`; the operators' meaning stands in runtime/quantised_products.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flagtree.ir.experts import DOWN_SCALED, LINEAR_SCALED, UP_SCALED
from flagtree.ir.index import Index, floordiv
from flagtree.ir.program import Extern, Operand, Ref, TypeArg
from flagtree.lower.builder import NotLowered, Tensor
from flagtree.lower.experts import combine, gate, sorted_rows
from flagtree.lower.quantise import quantised

if TYPE_CHECKING:
    from flagtree.lower.lowering import Call, Lowering

REASON = "matrix product of quantised operands: the definition, block by block"
_GROUP = 128


def _linear(lowering: Lowering, call: Call) -> None:
    """flagtree.scaled_linear."""
    out = call.out()
    args: tuple[Operand, ...] = (*(Ref(call.tensor(k).name) for k in range(4)), TypeArg("dtype", out.dtype))
    name = lowering.step_name(call.node.name)
    lowering.steps.append(Extern(name, LINEAR_SCALED, args, (out.name,), reason=REASON, origins=(call.origin,)))


def _experts(lowering: Lowering, call: Call) -> None:
    """flagtree.fused_moe_scaled."""
    x, gate_up, up_scales, down, down_scales, weights, ids = (call.tensor(k) for k in range(7))
    if any(t.shape[-1].constant is None or t.shape[-1].constant % _GROUP for t in (x, down)):
        raise NotLowered(f"rows of {x.shape[-1]} and {down.shape[-1]} in groups of {_GROUP}")
    top_k, order, starts = sorted_rows(lowering, call, ids, down)
    rows, inner = order.shape[0], down.shape[2]
    both = lowering.temp(call, "both", x.dtype, [rows, inner * 2])
    first = _grouped(lowering, call, x, gate_up.dtype, "x")
    _product(lowering, call, UP_SCALED, (*first, gate_up, up_scales, order, starts), top_k, both)
    gated = lowering.temp(call, "gated", x.dtype, [rows, inner])
    call.emit(gate(both, gated, call.argument(7, "activation")), suffix="gate")
    results = lowering.temp(call, "results", x.dtype, [ids.shape[0], Index.of(top_k), x.shape[1]])
    second = _grouped(lowering, call, gated, down.dtype, "gated")
    _product(lowering, call, DOWN_SCALED, (*second, down, down_scales, order, starts), top_k, results)
    combine(call, weights, results, top_k)


def _grouped(lowering: Lowering, call: Call, x: Tensor, to: str, name: str) -> tuple[Tensor, Tensor]:
    """x in groups, with their scales."""
    q = lowering.temp(call, f"{name}_quantised", to, x.shape)
    scales = lowering.temp(call, f"{name}_scales", "f32", [*x.shape[:-1], floordiv(x.shape[-1], Index.of(_GROUP))])
    call.emit(quantised(x, _GROUP, to, q, scales), suffix=f"{name}_quantise")
    return q, scales


def _product(lowering: Lowering, call: Call, callee: str, operands: tuple[Tensor, ...], top_k: int, out: Tensor) -> None:
    name = lowering.step_name(f"{call.node.name}_{callee.split('_')[1]}")
    args: tuple[Operand, ...] = (*(Ref(t.name) for t in operands), top_k, TypeArg("dtype", out.dtype))
    lowering.steps.append(Extern(name, callee, args, (out.name,), reason=REASON, origins=(call.origin,)))


QUANTISED_PRODUCTS = {"flagtree.scaled_linear": _linear, "flagtree.fused_moe_scaled": _experts}
