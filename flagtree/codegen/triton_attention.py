"""Attention as a Triton module: the keys are walked once, tile by tile, with a running maximum (Dao et al., FlashAttention, 2022).

Invariant: the text computes what `ir.attention` writes down, reads no key that no row of the instance sees, and keeps to the portable
subset (docs/triton.md).  `triton.generate` calls this for a kernel that is an attention; the work is in templates/triton_attention.py.j2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flagtree.errors import CodegenError
from flagtree.ir import attention
from flagtree.ir.attention import Form, group_of
from flagtree.ir.index import Index
from flagtree.ir.program import Buffer, Kernel, Program

_ELEMENTS = {"bf16": "tl.bfloat16", "f16": "tl.float16", "f32": "tl.float32"}
_TOLD = {attention.CACHED: "up to its position", attention.FULL: "all of them", attention.PACKED: "those of its sequence"}


def tile_of(width: int) -> int:
    """The elements of a head that an instance holds: a power of two, at least what a matrix product needs."""
    return max(16, 1 << (width - 1).bit_length())


def context(program: Program, form: Form) -> dict[str, object]:
    """What the template needs, apart from the names of the module.  CodegenError for what it cannot express."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel) and kernel.schedule is not None
    buffers = attention.operands(program, form)
    q, k, v, out = *buffers[:3], buffers[-1]
    packed = form.kind == attention.PACKED
    tiles = dict(kernel.schedule.tiles)
    rows, columns = (tiles["i0"], tiles["r1"]) if packed else (tiles["i1"], tiles["r0"])
    if q.dtype not in _ELEMENTS or any(b.layout[-1].constant != 1 for b in (q, k, v, out)):
        raise CodegenError(f"attention over {q.dtype}", why="f32, f16 and bf16 with elements of a head side by side are generated")
    if form.mask:
        raise CodegenError("attention under a mask that is a tensor", why="it is generated for CPUs")
    depth, width = q.shape[-1].constant, v.shape[-1].constant
    assert depth and width
    keys = k.shape[0] if packed else k.shape[2]
    where = buffers[3] if form.operands == 4 else None
    sizes = {"tokens": q.shape[0] if packed else q.shape[2], "keys": keys} | ({"bounds": where.shape[0]} if packed and where else {})
    return {
        "kind": form.kind, "window": form.window, "causal": form.causal, "told": _TOLD[form.kind], "scale": repr(form.scale / math.log(2)),
        "element": _ELEMENTS[q.dtype], "rows": rows, "columns": columns, "depth": depth, "width": width, "depth_tile": tile_of(depth),
        "width_tile": tile_of(width), "group": group_of(q, k), "key_heads": k.shape[1].constant,
        "sizes": [f"{name} = {size}" for name, size in sizes.items()],
        "q": q.name, "k": k.name, "v": v.name, "out": out.name, "where": where.name if where else "",
        "where_at": "" if where is None else _times("sequence", where.layout[0]),
        "where_stride": "" if where is None else _wide(where.layout[0]),
        **_strides("q", q, packed), **_strides("k", k, packed), **_strides("v", v, packed), **_out_strides(out, packed),
    }  # fmt: skip


def grid(program: Program, form: Form) -> tuple[Index, Index, Index]:
    """Blocks of rows, key heads and sequences, all along x."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel) and kernel.schedule is not None
    q, k = attention.operands(program, form)[:2]
    packed = form.kind == attention.PACKED
    rows = dict(kernel.schedule.tiles)["i0" if packed else "i1"]
    tokens, sequences = (q.shape[0], Index.of(1)) if packed else (q.shape[2], q.shape[0])
    return (tokens * group_of(q, k) + (rows - 1)) // rows * k.shape[1] * sequences, Index.of(1), Index.of(1)


def _strides(name: str, buffer: Buffer, packed: bool) -> dict[str, str]:
    """Offsets along sequence, head and token (of keys: key)."""
    along: Sequence[Index] = buffer.layout
    row = "token" if name == "q" else "key"
    if packed:
        return {f"{name}_base": "0", f"{name}_sequence": "0", f"{name}_head": _wide(along[1]), f"{name}_{row}": _wide(along[0])}
    base = _times("sequence", along[0])
    return {f"{name}_base": base, f"{name}_sequence": base, f"{name}_head": _wide(along[1]), f"{name}_{row}": _wide(along[2])}


def _out_strides(out: Buffer, packed: bool) -> dict[str, str]:
    along = out.layout
    base, token, head = ("0", along[0], along[1]) if packed else (_times("sequence", along[0]), along[1], along[2])
    return {"out_base": base, "out_token": _wide(token), "out_head": _wide(head)}


def _times(name: str, stride: Index) -> str:
    return f"{name}.to(tl.int64) * ({_wide(stride)})"


def _wide(stride: Index) -> str:
    """A stride whose symbols are widened first: the product may not fit 32 bits."""
    return str(stride.rename({name: f"{name}.to(tl.int64)" for name in stride.names()})) if stride.names() else str(stride)
