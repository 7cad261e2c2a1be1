"""Run time of one layer of an encoder on the CPU: flagtree beside eager and Inductor, in one process.

    python benchmarks/encoders.py [--repeats 7] [--only bert] [--out benchmarks/results/encoders.md]

transformers' BERT-base (embeddings, one layer, no head) and ViT-base (patches, one layer) at their true widths, random weights, one
thread, thread CPU seconds by measure.py.  `left`: ATen calls of flagtree's for each of eager's (check/coverage.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import measure

sys.path.insert(0, str(measure.ROOT))

import torch
import transformers

from flagtree.check.coverage import coverage
from flagtree.runtime import compile as compiling

CASES = [(name, batch, size) for name in ("bert", "bert, masked") for batch, size in ((1, 16), (1, 128), (8, 128), (1, 512))]
CASES += [("vit", batch, 197) for batch in (1, 8)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def made(name: str, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """(the model, its inputs)."""
    torch.manual_seed(0)
    if name == "vit":
        vit = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1), add_pooling_layer=False)
        return vit.eval().to(dtype), {"pixel_values": torch.randn(batch, 3, 224, 224, dtype=dtype)}
    bert = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1), add_pooling_layer=False)
    inputs = {"input_ids": torch.randint(0, 30000, (batch, tokens))}
    if name == "bert, masked":
        inputs["attention_mask"] = (torch.arange(tokens) < tokens - 5).long().expand(batch, tokens).contiguous()
    return bert.eval().to(dtype), inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="models whose name starts with this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure.keep_memory()
    lines = ["| model | batch | tokens | type | eager, ms | Inductor, ms | flagtree, ms | of eager | of Inductor | left |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines), flush=True)
    for name, batch, tokens in CASES:
        for kind, dtype in DTYPES.items():
            if name.startswith(options.only):
                lines.append(measured(name, batch, tokens, kind, dtype, options.repeats))
                print(lines[-1], flush=True)
    if options.out:
        head = "# Encoders\n\nOne layer, one thread, medians of CPU milliseconds: `python benchmarks/encoders.py`.\n\n"
        head += measure.conditions() + "\n\n"
        options.out.write_text(head + "\n".join(lines) + "\n", "utf-8")


def measured(name: str, batch: int, tokens: int, kind: str, dtype: torch.dtype, repeats: int) -> str:
    """A row of the table."""
    torch._dynamo.reset()
    model, inputs = made(name, batch, tokens, dtype)
    with torch.no_grad():
        left = coverage(lambda **given: model(**given).last_hidden_state, lambda called: called(**inputs)).share
        torch._dynamo.reset()
        ways = {"eager": model, "inductor": torch.compile(model), "flagtree": torch.compile(model, backend=compiling.backend)}
        found = measure.rotated({way: lambda called=called: called(**inputs) for way, called in ways.items()}, repeats)
    eager, inductor, ours = (found[way].median * 1e3 for way in ways)
    cells = [name, batch, tokens, kind, f"{eager:.2f}", f"{inductor:.2f}", f"{ours:.2f}", f"{ours / eager:.2f}", f"{ours / inductor:.2f}",
             f"{left:.2f}"]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
