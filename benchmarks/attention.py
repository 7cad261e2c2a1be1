"""Attention on the CPU: our blocked kernel beside PyTorch's SDPA, where SDPA needs a mask, a loop or grouped heads.

    python benchmarks/attention.py [--repeats 7] [--only decode] [--dtype bf16] [--out benchmarks/results/attention.md]

One thread, CPU seconds by measure.py, contenders side by side in one process.  `sdpa`: the eager definition of our operator, which calls
SDPA without a copy of keys or values (a call a sequence); `masked`: one call of SDPA under a boolean mask, as models without a packed
form do it; `ours`: the generated kernel of the highest level of this CPU.  Numbers below 1 in the last columns: ours is faster.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import measure

sys.path.insert(0, str(measure.ROOT))

import torch
from torch.nn.functional import scaled_dot_product_attention

from flagtree.codegen.cpp import generate
from flagtree.ir.attention import CACHED, FULL, PACKED, Form
from flagtree.ir.canonical import digest, isolate
from flagtree.runtime.cpu import levels, load_library
from flagtree.toolchain import cxx
from tests.attention_programs import Call, Case, make

DTYPES = ("f32", "bf16")


@dataclass(frozen=True)
class Shape:
    """A case and the sizes of its call; `what` says which model has it."""

    what: str
    case: Case
    where: tuple[int, ...]
    tokens: int
    context: int = 0


def shapes() -> Iterator[Shape]:
    for batch, context in ((1, 512), (8, 512), (1, 4096)):
        decode = Case(Form(CACHED, 128**-0.5), heads=(32, 8), widths=(128, 128), tokens=1)
        yield Shape(f"decode, batch {batch}, {context} rows (Qwen3-8B)", decode, (context - 1,) * batch, 1, context)
    shared = Case(Form(CACHED, 1 / 16), heads=(64, 1), widths=(256, 256), tokens=1)
    yield Shape("decode, one shared key head, 1024 rows (step3)", shared, (1023,), 1, 1024)
    sliding = Case(Form(CACHED, 0.1, window=128), heads=(8, 2), widths=(64, 64))
    yield Shape("prompt of 512 tokens, window 128", sliding, (0,), 512, 512)
    tower = Case(Form(PACKED, 80**-0.5), heads=(16, 16), widths=(80, 80))
    yield Shape("windows of 64 patches, 512 patches (RoboBrain2's tower)", tower, tuple(range(0, 513, 64)), 512)
    yield Shape("two images, 512 patches (RoboBrain2's tower)", tower, (0, 200, 512), 512)
    for heads, width, who in ((12, 64, "BERT-base"), (16, 64, "BERT-large"), (4, 8, "4 heads of 8")):
        encoder = Case(Form(FULL, width**-0.5), heads=(heads, heads), widths=(width, width))
        for batch, tokens in ((1, 16), (1, 128), (8, 128), (1, 512)):
            yield Shape(f"encoder, batch {batch}, {tokens} tokens ({who})", encoder, (0,) * batch, tokens, tokens)
        if width == 64:
            masks = replace(encoder, form=replace(encoder.form, mask="seen"))
            yield Shape(f"the same under a mask, batch 8, 128 tokens ({who})", masks, (0,) * 8, 128, 128)
    base = Case(Form(FULL, 1 / 8), heads=(12, 12), widths=(64, 64))
    yield Shape("encoder, batch 8, 197 patches (ViT-base)", base, (0,) * 8, 197, 197)
    causal = replace(base, form=replace(base.form, causal=True))
    for tokens in (128, 1024):
        yield Shape(f"causal, {tokens} tokens (GPT-2)", causal, (0,), tokens, tokens)
    siglip = Case(Form(FULL, 72**-0.5, limited=True), heads=(16, 16), widths=(72, 72))
    yield Shape("padded batch of 2 images, 256 patches (MiniCPM-V's tower)", siglip, (256, 144), 256, 256)


def ours(call: Call) -> tuple[Callable[[], object], torch.Tensor]:
    """A launch of our kernel, and the tensor that it writes."""
    program = call.case.program()
    (step,) = program.steps
    alone = isolate(program, replace(step, schedule=None))  # type: ignore[type-var, arg-type]
    key, level = digest(alone.program), levels()[0]
    kernel = load_library(cxx.link([(key, cxx.compile_object(generate(alone.program, key), level))], level), "benchmark").kernel(key)
    tensors, symbols = call.operands(alone)
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    numbers = (ctypes.c_int64 * max(1, len(symbols)))(*symbols)
    return (lambda: kernel(ctypes.addressof(pointers), ctypes.addressof(numbers))), call.tensors["out"]


def sdpa(call: Call) -> Callable[[], object]:
    """The eager definition."""
    form, t = call.case.form, call.tensors
    operators = torch.ops.flagtree
    if form.kind == CACHED:
        return lambda: operators.attend(t["q"], t["k"], t["v"], t["where"], form.scale, form.window)
    if form.kind == FULL and not form.limited:
        q, k, v, mask = (t.get(n) for n in ("q", "k", "v", "where"))
        return lambda: scaled_dot_product_attention(q, k, v, mask if form.mask else None, is_causal=form.causal, scale=form.scale)
    if form.kind == FULL:
        return lambda: operators.full_attention(t["q"], t["k"], t["v"], t["where"], form.scale)
    return lambda: operators.varlen_attention(t["q"], t["k"], t["v"], t["where"], form.scale, form.causal)


def masked(call: Call) -> Callable[[], object]:
    """One call under a mask; padding is zero here, for SDPA reads it."""
    form, t = call.case.form, call.tensors
    if form.kind == FULL and not form.limited:
        return sdpa(call)
    q, k, v = (t[n].nan_to_num() if n != "q" else t[n] for n in "qkv")
    if form.kind == PACKED:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        place = torch.bucketize(torch.arange(q.shape[2]), t["where"].long(), right=True)
        mask = (place[:, None] == place)[None, None]
    else:
        keys, rows = torch.arange(k.shape[2]), torch.arange(q.shape[2])[:, None]
        limits = t["where"][:, None, None, None]
        position = limits + rows
        mask = keys < limits if form.kind == FULL else (keys <= position) & (keys > position - (form.window or 1 << 40))
    grouped = call.case.heads[0] != call.case.heads[1]
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=form.scale, enable_gqa=grouped).transpose(1, 2).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose description holds this text")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure.keep_memory()
    lines = ["| case | type | ours, us | sdpa, us | masked, us | ours / sdpa | ours / masked |", "|---|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for shape in shapes():
        for dtype in arguments.dtype or DTYPES:
            if arguments.only not in shape.what:
                continue
            call = make(replace(shape.case, dtype=dtype), list(shape.where), shape.tokens, shape.context)
            launch, out = ours(call)
            launch()
            torch.testing.assert_close(out.double(), call.truth, rtol=2e-2, atol=2e-2)
            found = measure.rotated({"ours": launch, "sdpa": sdpa(call), "masked": masked(call)}, arguments.repeats)
            own, plain, under = (found[n].median * 1e6 for n in ("ours", "sdpa", "masked"))
            lines.append(f"| {shape.what} | {dtype} | {own:.0f} | {plain:.0f} | {under:.0f} | {own / plain:.2f} | {own / under:.2f} |")
            print(lines[-1], flush=True)
    if arguments.out is not None:
        told = (
            "`python benchmarks/attention.py`: CPU microseconds a call, one thread, medians; columns of one row were measured in turn.  "
            "`sdpa` is the eager definition of our operators (SDPA without copies, a call a sequence), `masked` one SDPA under a boolean "
            "mask."
        )
        text = "\n\n".join(["# Attention on the CPU", f"{measure.conditions()}\n* {levels()[0]}", told, "\n".join(lines)])
        arguments.out.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
