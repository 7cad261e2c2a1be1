"""A random Qwen3 as three things: a description for the compiler, transformers' own model, and the same model in float64.

The description is written as a file that `flagtree compile` reads; the reference knows nothing of flagtree.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

STEPS = 16  # decode steps after each prefill
SMALL = {
    "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 36,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False,
    "initializer_range": 0.06,
}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "initializer_range": 0.02}  # fmt: skip


def describe(path: Path, config: dict[str, Any], dtype: str, batch: int = 4) -> Path:
    """Write the description of a model and return its path."""
    rows = [1, config["max_position_embeddings"]]
    decode = {"batch": [1, batch], "context": [*rows]}
    parts = {"prefill": {"batch": [1, batch], "sequence": [*rows], "context": [*rows]}, "decode": decode}
    name = f"qwen3-{config['hidden_size']}x{config['num_hidden_layers']}"
    data = {"name": name, "architecture": "Qwen3ForCausalLM", "dtype": dtype, "config": config, "parts": parts}
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def random_model(config: dict[str, Any], dtype: torch.dtype, seed: int = 7) -> Qwen3ForCausalLM:
    """transformers' model with seeded weights; the norms' are not all one, so that a norm that ignores its weight shows."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * torch.randn(weight.shape))
    return model


class _ExactNorm(torch.nn.Module):
    """transformers' norm computes in float32 whatever its input; the truth must not."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def in_float64(model: Qwen3ForCausalLM, *, keep: bool = True) -> Qwen3ForCausalLM:
    """The same weights in float64; `keep=False` turns the model itself, where two copies would not fit."""
    exact = (copy.deepcopy(model) if keep else model).double()
    for module in list(exact.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Qwen3RMSNorm":
                setattr(module, name, _ExactNorm(child))
    return exact


@dataclass(frozen=True)
class Request:
    """Prompts, padded on the right to one length, and the tokens of the decode steps: given, so that no rounding changes the question."""

    ids: torch.Tensor  # [B, S]
    lengths: torch.Tensor  # [B]
    following: torch.Tensor  # [B, STEPS]

    def sequences(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Each sequence alone and unpadded, prompt and following tokens joined, with the prompt's length."""
        for ids, length, following in zip(self.ids, self.lengths.tolist(), self.following):
            yield torch.cat([ids[:length], following])[None], length


def requests(vocabulary: int, lengths: tuple[tuple[int, ...], ...], seed: int = 11) -> dict[str, Request]:
    """One request for each tuple of prompt lengths, by name."""
    random = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(vocabulary, shape, generator=random)

    return {
        "-".join(map(str, each)): Request(tokens(len(each), max(each)), torch.tensor(each), tokens(len(each), STEPS)) for each in lengths
    }


@torch.no_grad()
def eager(model: Qwen3ForCausalLM, request: Request) -> torch.Tensor:
    """transformers' logits [1 + STEPS, B, V]: a prefill and then token by token with its cache, each sequence alone."""
    columns = []
    for tokens, length in request.sequences():
        cache = DynamicCache(config=model.config)
        rows = [model(tokens[:, :length], past_key_values=cache, use_cache=True).logits[0, -1]]
        rows += [model(tokens[:, k : k + 1], past_key_values=cache, use_cache=True).logits[0, -1] for k in range(length, tokens.shape[1])]
        columns.append(torch.stack(rows))
    return torch.stack(columns, 1)


@torch.no_grad()
def truth(exact: Qwen3ForCausalLM, request: Request) -> torch.Tensor:
    """The same logits in float64 from one causal pass without a cache."""
    return torch.stack([exact(tokens, use_cache=False).logits[0, length - 1 :] for tokens, length in request.sequences()], 1)
