"""Externs that write their result into memory of ours, by the operator's `out` form: no allocation, no page touched for the first time.

Only operators whose `out` form gives the bits of the plain one are listed, and only a row-major temp of known sizes is written so.
`memory.py` gives such a result a home, `frame.py` makes the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flagtree.runtime.expand import ExternCall, Unrolled
from flagtree.runtime.index import symbols_of

Sizes = tuple[int, ...]

# callee -> (its out form, sizes of the tensor operands to the result's)
_FORMS: Mapping[str, tuple[str, Callable[..., Sizes]]] = {
    "aten.linear.default": ("aten.linear.out", lambda x, w: (*x[:-1], w[0])),
    "aten.mm.default": ("aten.mm.out", lambda a, b: (a[0], b[1])),
    "aten.bmm.default": ("aten.bmm.out", lambda a, b: (a[0], a[1], b[2])),
    "aten.addmm.default": ("aten.addmm.out", lambda c, a, b: (a[0], b[1])),
}


def out_form(callee: str) -> str:
    """The operator that writes into its keyword `out`."""
    return _FORMS[callee][0]


def result_sizes(callee: str, operands: Sequence[Sizes]) -> Sizes:
    """Sizes of the result; an `out` of other sizes would be moved away from our memory."""
    return _FORMS[callee][1](*operands)


def written_into(program: Unrolled, step: ExternCall, late: set[str]) -> str | None:
    """The buffer that the call may write in place of returning it, None where it has to return it.  `late`: symbols that an extern's
    result decides."""
    if step.callee not in _FORMS or len(step.outputs) != 1 or step.outputs[0] is None or step.mutates:
        return None
    tensors = [a["buffer"] for a in step.args if isinstance(a, dict) and "buffer" in a]
    # linear with a bias rounds between product and sum in some forms; a product that scales keeps the plain call
    if any(a is not None for a in step.args[len(tensors) :]) or step.kwargs or (step.callee == "aten.linear.default" and len(tensors) != 2):
        return None
    out = program.buffers[step.outputs[0]]
    if out.role != "temp" or out.base is not None or out.strides is not None or any(program.buffers[t].dtype != out.dtype for t in tensors):
        return None
    known = not symbols_of([[b.shape, b.strides or [], b.offset] for b in (out, *map(program.buffers.__getitem__, tensors))]) & late
    return out.name if known and step.outputs[0] not in step.operands else None
