"""ATen calls left by `torch.compile(backend="flagtree")`, of those that eager executes: inference, and training (forward and backward).

    python benchmarks/coverage.py [--model qwen3 ...] [--json] [--out benchmarks/results/coverage.md]

The rule of counting stands in `flagtree/check/coverage.py`.  The loss is part of the compiled function in training; the optimiser is
left out on both sides.  Models are small and random: calls do not depend on widths.  They do depend on rows: a product of few rows is ours
(docs/cpu.md, "Templates"), one of many the library's; the last two models have many.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagtree.check.coverage import Coverage, coverage

MANY = torch.randint(0, 90, (1, 128), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))
INFERENCE, TRAINING = 0.5, 0.6  # the targets: calls left for each call of eager's
Made = tuple[nn.Module, Callable[[nn.Module], Any], Callable[[nn.Module], Tensor]]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Written out, with a causal mask and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mask = torch.full((n, n), float("-inf")).triu(1)
        p = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5 + mask, -1)
        return self.out((p @ v).transpose(1, 2).reshape(b, n, d))


class ResidualNorm(nn.Module):
    """RMS norm as models write it, and torch's own, around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(64)), nn.RMSNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        h = x + x.tanh()
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return h + self.weight * (h * scale) + self.norm(h)


def regression(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Made]:
    """A model of one tensor with a squared error."""

    def made() -> Made:
        x, model = torch.randn(shape), make()
        target = torch.zeros_like(model(x).detach())
        return model, lambda m: m(x), lambda m: F.mse_loss(m(x), target)

    return made


def convolution() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (3, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers)


def classifier() -> Made:
    """Embedding, one linear layer, cross-entropy; the loss belongs to inference too."""
    model, labels = nn.Sequential(nn.Embedding(90, 32), nn.Linear(32, 90)), IDS.roll(1, 1).view(-1)

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(IDS).view(-1, 90), labels)

    return model, loss, loss


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0} | {
    "use_cache": False, "decoder_start_token_id": 0,
}  # fmt: skip


def transformer(name: str, head: str, configuration: dict[str, Any], **inputs: Tensor) -> Callable[[], Made]:
    """A model of transformers under its own loss."""

    def made() -> Made:
        import transformers

        model = getattr(transformers, name + head)(getattr(transformers, name + "Config")(**configuration))
        return model, lambda m: m(**inputs).logits, lambda m: m(**inputs, labels=labels).loss

    labels = inputs["input_ids"] if "input_ids" in inputs else torch.arange(len(inputs["pixel_values"])) % 2
    return made


MODELS: dict[str, Callable[[], Made]] = {
    "qwen3": transformer("Qwen3", "ForCausalLM", SIZES | {"num_key_value_heads": 2, "head_dim": 16, "use_cache": False}, input_ids=IDS),
    "LayerNorm, GELU MLP": regression(Perceptron, 3, 9, 32),
    "attention": regression(Attention, 2, 7, 32),
    "convolution, batch norm": regression(convolution, 2, 3, 8, 8),
    "embedding, cross-entropy": classifier,
    "RMSNorm, residual": regression(ResidualNorm, 3, 5, 64),
    # nobody tuned anything for these
    "llama": transformer("Llama", "ForCausalLM", SIZES | {"num_key_value_heads": 2, "use_cache": False}, input_ids=IDS),
    "gpt2": transformer("GPT2", "LMHeadModel", GPT2 | {"use_cache": False}, input_ids=IDS),
    "bert": transformer("Bert", "ForMaskedLM", SIZES | NO_DROPOUT, input_ids=IDS),
    "vit": transformer(
        "ViT", "ForImageClassification", SIZES | NO_DROPOUT | {"image_size": 16, "patch_size": 4}, pixel_values=torch.randn(2, 3, 16, 16)
    ),
    "t5": transformer("T5", "ForConditionalGeneration", T5, input_ids=IDS, decoder_input_ids=IDS),
    "bert, 128 tokens": transformer("Bert", "ForMaskedLM", SIZES | NO_DROPOUT, input_ids=MANY),
    "vit, 8 images": transformer(
        "ViT", "ForImageClassification", SIZES | NO_DROPOUT | {"image_size": 16, "patch_size": 4}, pixel_values=torch.randn(8, 3, 16, 16)
    ),
}  # fmt: skip


def measure(name: str) -> tuple[Coverage, Coverage]:
    """(inference, training)."""
    print(f"counting {name}", file=sys.stderr, flush=True)
    torch.manual_seed(0)
    model, forward, loss = MODELS[name]()

    def infer(called: Callable[..., Any]) -> None:
        with torch.no_grad():
            called(model.eval())

    def train(called: Callable[..., Any]) -> None:
        model.train().zero_grad()
        called(model).backward()

    return coverage(forward, infer), coverage(loss, train)


def report(found: dict[str, tuple[Coverage, Coverage]]) -> str:
    """Markdown: the table, then what is left by reason."""
    lines = [
        "# ATen calls left by torch.compile with flagtree", "",
        f"* {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, torch {torch.__version__}; small random models",
        f"* targets: inference at most {INFERENCE}, training (forward and backward) at most {TRAINING} of eager's calls", "",
        "| model | inference: eager | left | share | training: eager | left | share |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    totals = [Counter[str](), Counter[str]()]
    for name, pair in found.items():
        cells = [name]
        for total, one in zip(totals, pair):
            cells += [str(one.eager.total()), str(one.left.total()), f"{one.share:.2f}"]
            total.update({"eager": one.eager.total(), "left": one.left.total()})
        lines.append("| " + " | ".join(cells) + " |")
    cells = [c for t in totals for c in (str(t["eager"]), str(t["left"]), f"{t['left'] / t['eager']:.2f}")]
    lines += ["| **all** | " + " | ".join(cells) + " |", ""]
    lines += ["What is left, by the reason that the launch lists give (training graphs, all models):", ""]
    reasons: dict[str, Counter[str]] = {}
    for _, training in found.values():
        for (callee, reason), count in training.externs.items():
            reasons.setdefault(reason, Counter())[callee.removesuffix(".default")] += count
    for reason in sorted(reasons, key=lambda r: -reasons[r].total()):
        callees = ", ".join(f"`{callee}` {count}" for callee, count in sorted(reasons[reason].items()))
        lines.append(f"* {reason}: {callees}")
    kernels = sum(training.kernels for _, training in found.values())
    lines += ["", f"Launches of generated kernels in the same graphs: {kernels}.", "", "Made by `python benchmarks/coverage.py`.", ""]
    return "\n".join(lines)


def as_json(found: dict[str, tuple[Coverage, Coverage]]) -> str:
    """Counts by operator and model."""
    kinds = ("inference", "training")
    counts = {
        name: {kind: {"eager": one.eager, "left": one.left, "kernels": one.kernels} for kind, one in zip(kinds, pair)}
        for name, pair in found.items()
    }
    return json.dumps(counts, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=[*MODELS], help="only these")
    parser.add_argument("--json", action="store_true", help="counts by operator instead of the table")
    parser.add_argument("--out", type=Path, help="write the table to a file too")
    options = parser.parse_args()
    measured = {name: measure(name) for name in options.model or MODELS}
    print(as_json(measured) if options.json else report(measured))
    if options.out:
        options.out.write_text(report(measured), "utf-8")
