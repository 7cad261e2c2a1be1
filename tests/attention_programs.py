"""Attention kernels as the pass makes them, and their operands with eager's and float64's results: what several tests execute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from flagtree.ir import attention
from flagtree.ir.attention import CACHED, FULL, PACKED, Form
from flagtree.ir.canonical import Isolated, isolate
from flagtree.ir.index import Index
from flagtree.ir.program import Buffer, Program, Symbol
from flagtree.ir.verify import verify
from flagtree.passes.attention import tiles
from flagtree.runtime import operators as operators  # registers torch.ops.flagtree.*

Tensor = torch.Tensor
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Case:
    """`heads` (query, key) of `widths` (key, value) elements; `tokens`: fixed number of tokens, None for a size of the call, which `step`
    divides."""

    form: Form
    dtype: str = "bf16"
    heads: tuple[int, int] = (8, 2)
    widths: tuple[int, int] = (64, 64)
    tokens: int | None = None
    step: int = 1

    def program(self) -> Program:
        """One step: the kernel, with the tiles of a GPU."""
        heads, key_heads, (depth, width) = *(Index.of(n) for n in self.heads), (Index.of(n) for n in self.widths)
        batch, tokens, context, edges = (Index.of(n) for n in ("batch", "tokens", "context", "edges"))
        tokens = tokens * self.step if self.tokens is None else Index.of(self.tokens)
        if self.form.kind == PACKED:
            shapes = (tokens, heads, depth), (tokens, key_heads, depth), (tokens, key_heads, width), (edges,), (tokens, heads, width)
            strides = None
        else:
            shapes = (batch, heads, tokens, depth), (batch, key_heads, context, depth), (batch, key_heads, context, width), (batch,), (
                batch, tokens, heads, width)  # fmt: skip
            strides = (tokens * heads * depth, depth, heads * depth, Index.of(1))  # as projections leave queries
        where = {"": "i32" if self.form.kind == PACKED else "i64", "seen": "b1", "added": self.dtype}[self.form.mask]
        if self.form.mask:
            shapes = (*shapes[:3], (batch, Index.of(1), tokens, context), shapes[-1])
        kinds = (self.dtype, self.dtype, self.dtype, where, self.dtype)
        names = ("q", "k", "v", "where", "out")
        given = [
            Buffer(n, t, s, "temp" if n == "out" else "input", strides if n == "q" else None)
            for n, t, s in zip(names, kinds, shapes, strict=True) if n != "where" or self.form.operands == 4
        ]  # fmt: skip
        used = {n for b in given for extent in b.shape for n in extent.names()}
        ranges = {"batch": (64, ("dim", "q", 0)), "tokens": (40960, ("dim", "q", 0 if strides is None else 2)),
                  "context": (40960, ("dim", "k", 2)), "edges": (4096, ("dim", "where", 0))}  # fmt: skip
        symbols = tuple(Symbol(n, 1, high, source) for n, (high, source) in ranges.items() if n in used)
        step = attention.kernel(self.form, given, "attention", tiles(self.form, *given[:3]))
        program = Program("attention", symbols, tuple(given), (step,), ("out",))
        verify(program)
        return program

    def isolated(self) -> Isolated:
        program = self.program()
        (step,) = program.steps
        return isolate(program, step)  # type: ignore[arg-type]


@dataclass
class Call:
    """One call: operands by the names of `Case.program`, and what eager gives in the case's type and in float64."""

    case: Case
    tensors: dict[str, Tensor]
    eager: Tensor
    truth: Tensor

    def operands(self, isolated: Isolated) -> tuple[list[Tensor], list[int]]:
        """Buffers and symbols as a launch passes them; the result's elements are NaN."""
        shapes = {"batch": self.eager.shape[0], "tokens": self.tensors["q"].shape[-2 if self.case.form.kind != PACKED else 0],
                  "context": self.tensors["k"].shape[2], "edges": len(self.tensors.get("where", ()))}  # fmt: skip
        return [self.tensors[n] for n in isolated.buffers], [shapes[str(s)] for s in isolated.symbols]


def make(case: Case, where: list[int], tokens: int, context: int = 0, seed: int = 0) -> Call:
    """`where`: the starts, lengths or bounds; under a mask or none of them as many numbers as sequences.  What no row may read is NaN."""
    generator = torch.Generator().manual_seed(seed)
    dtype, form = TORCH[case.dtype], case.form

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    heads, key_heads, (depth, width) = *case.heads, case.widths
    told = torch.tensor(where, dtype=torch.int32 if form.kind == PACKED else torch.int64)
    if form.kind == PACKED:
        q, k, v = random(tokens, heads, depth), random(tokens, key_heads, depth), random(tokens, key_heads, width)
        out = torch.full((tokens, heads, width), math.nan, dtype=dtype)
    else:
        batch = len(where)
        q = random(batch, tokens, heads, depth).transpose(1, 2)
        k, v = random(batch, key_heads, context, depth), random(batch, key_heads, context, width)
        out = torch.full((batch, tokens, heads, width), math.nan, dtype=dtype)
        if form.mask:
            told = torch.rand(batch, 1, tokens, context, generator=generator) < 0.7
            told[0, 0, 0] = False  # sees nothing
            told = told if form.mask == "seen" else torch.where(told, 0.5, -math.inf).to(dtype)
        elif form.operands == 4:
            for b, n in enumerate(where):
                seen = n + tokens if form.kind == CACHED else n
                k[b, :, seen:], v[b, :, seen:] = math.nan, math.nan
    tensors = {"q": q, "k": k, "v": v, "out": out} | ({"where": told} if form.operands == 4 else {})
    return Call(case, tensors, _eager(form, q, k, v, told), _eager(form, q.double(), k.double(), v.double(), told))


def _eager(form: Form, q: Tensor, k: Tensor, v: Tensor, where: Tensor) -> Tensor:
    ours = torch.ops.flagtree
    if form.kind == CACHED:
        return ours.attend(q, k, v, where, form.scale, form.window)
    if form.mask or (form.kind == FULL and form.causal):
        mask = where.to(q.dtype) if form.mask == "added" else where if form.mask else None
        shared = q.shape[1] != k.shape[1]
        return sdpa(q, k, v, mask, is_causal=form.causal, scale=form.scale, enable_gqa=shared).transpose(1, 2).contiguous()
    if form.kind == FULL:
        return ours.full_attention(q, k, v, where if form.limited else None, form.scale)
    return ours.varlen_attention(q, k, v, where, form.scale, form.causal)


def assert_as_good_as_eager(call: Call, found: Tensor) -> None:
    """DESIGN, "Equal to eager": root-mean-square error against float64 at most 4 times eager's plus 1e-6 of the mean magnitude."""
    assert not found.isnan().any(), "isnan"
    mine, theirs = ((x.double() - call.truth).square().mean().sqrt() for x in (found, call.eager))
    assert mine <= 4 * theirs + 1e-6 * call.truth.abs().mean(), f"RMS error {mine:.3g}, eager's is {theirs:.3g}"
