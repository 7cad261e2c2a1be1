"""Quantisation of rows or of groups of a row to e4m3fn or int8, and back, as torch operators.

Invariant: nothing becomes larger than the format's largest number; a group of zeros gives zeros and no division by zero.
Registered by `operators.py`; `lower/quantise.py` makes them kernels, which fuse with the norm or the gate before them.

    flagtree::quantise(x, group, dtype) -> (q, scales)     x [..., N]; group divides N, 0 is the whole row; q of `dtype` [..., N]; scales
        f32 [..., N / group].  scale = max(|x|, 1e-10) / limit over the group, q = x / scale, rounded to nearest, ties to even, at most
        `limit`: 448 for float8_e4m3fn, 127 for int8 (never -128).  The least scale is that of vLLM's per_token_group_quant.
        A NaN in a group makes its scale NaN and its q NaN, or 0 for int8, which has none; an infinity makes the others 0 and itself that.
    flagtree::dequantise(q, scales, rows, columns, dtype) -> x     q [..., M, N]; scales [..., M / rows, N / columns], rounded up; x = q *
        its block's scale in f32, rounded to `dtype`.  128 x 128 are the blocks of MiniMax-M2's weights; rows = 1 takes `quantise` back.

Formats: OCP 8-bit Floating Point Specification, revision 1.0 (e4m3: no infinity, NaN is 0x7f and 0xff).
"""

from __future__ import annotations

import torch

from flagtree.errors import BindError

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
LEAST = 1e-10

_library = torch.library.Library("flagtree", "FRAGMENT")
_library.define("quantise(Tensor x, int group, ScalarType dtype) -> (Tensor q, Tensor scales)")
_library.define("dequantise(Tensor q, Tensor scales, int rows, int columns, ScalarType dtype) -> Tensor")


def _group(x: torch.Tensor, group: int, dtype: torch.dtype) -> int:
    """Elements of a group.  BindError for what is not quantised."""
    if dtype not in LIMITS or not x.dtype.is_floating_point or x.dtype == torch.float64:
        raise BindError(f"quantise: {x.dtype} to {dtype}", hint=f"floats of at most 32 bits to {' or '.join(map(str, LIMITS))}")
    width = x.shape[-1] if x.ndim else 0
    if group < 0 or (group and width % group) or width == 0:
        raise BindError(f"quantise: groups of {group} do not divide a row of {width}", hint="0 for the whole row")
    return group or width


def _quantise(x: torch.Tensor, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(torch.float32).unflatten(-1, (-1, _group(x, group, dtype)))
    limit = LIMITS[dtype]
    scales = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST) / limit
    y = wide / scales
    if dtype == torch.int8:
        y = torch.where(y.isnan(), 0.0, y.round())
    return y.clamp(-limit, limit).to(dtype).flatten(-2), scales.squeeze(-1)


def _quantise_shape(x: torch.Tensor, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.shape[-1] // _group(x, group, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


def _blocks(q: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> None:
    if rows < 1 or columns < 1 or q.ndim < 2:
        raise BindError(f"dequantise: blocks of {rows} x {columns} of {tuple(q.shape)}")
    wanted = (*q.shape[:-2], -(-q.shape[-2] // rows), -(-q.shape[-1] // columns))
    if scales.shape != wanted or scales.dtype != torch.float32 or q.dtype not in LIMITS:
        raise BindError(
            f"dequantise: {q.dtype} {tuple(q.shape)} with scales {scales.dtype} {tuple(scales.shape)}", hint=f"float32 {tuple(wanted)} fit"
        )


def _dequantise(q: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    _blocks(q, scales, rows, columns)
    spread = scales.repeat_interleave(rows, -2)[..., : q.shape[-2], :].repeat_interleave(columns, -1)[..., : q.shape[-1]]
    return (q.to(torch.float32) * spread).to(dtype)


def _dequantise_shape(q: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    _blocks(q, scales, rows, columns)
    return q.new_empty(q.shape, dtype=dtype)


_library.impl("quantise", _quantise, "CompositeExplicitAutograd")
_library.impl("dequantise", _dequantise, "CompositeExplicitAutograd")
torch.library.register_fake("flagtree::quantise", _quantise_shape, lib=_library)
torch.library.register_fake("flagtree::dequantise", _dequantise_shape, lib=_library)
