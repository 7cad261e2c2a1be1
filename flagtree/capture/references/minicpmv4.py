"""MiniCPM-V-4: transformers' Llama with longrope as the text, a SigLIP tower for images of any shape, 64 queries that resample each.

Images of a batch are rows of patches, padded to the longest; `lengths` tells how many are the image's own, and no later one is read.
What depends on an image's shape alone is computed outside the graph: `positions`, the bucket of each patch among the 70 x 70 learned
positions (`patch_positions`), and `grid`, the sine table on the resampler's keys (`sine_table`).
Sources: vLLM 0.32 models/minicpmv.py (version 4.0), models/idefics2_vision_model.py, layers/resampler.py; the names are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flagtree.capture.attention import register_attention
from flagtree.capture.references.blocks import heads
from flagtree.capture.references.checkpoint import Joined

CHECKPOINT: tuple[Joined, ...] = ()  # every weight has its name and shape

_NORM_EPS = 1e-6  # of the resampler, in its definition rather than the configuration
_HEAD = 128  # the resampler's heads: its width over 128
# fields of the configuration that are the text's
_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias",
    "attention_dropout", "initializer_range", "bos_token_id", "eos_token_id",
)  # fmt: skip


class TowerAttention(nn.Module):
    """The own patches of an image see each other; [B, P, width] to the same."""

    def __init__(self, width: int, count: int, layer_idx: int) -> None:
        super().__init__()
        self.head, self.layer_idx = width // count, layer_idx
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(project(x), self.head) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(torch.ops.flagtree.full_attention(q, k, v, lengths, self.head**-0.5).flatten(2))


class GeluLayer(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of gelu."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class TowerBlock(nn.Module):
    """Pre-norm attention and pre-norm layer."""

    def __init__(self, vision: Mapping[str, Any], layer_idx: int) -> None:
        super().__init__()
        width, eps = vision["hidden_size"], vision["layer_norm_eps"]
        self.self_attn = TowerAttention(width, vision["num_attention_heads"], layer_idx)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.mlp = GeluLayer(width, vision["intermediate_size"])

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), lengths)
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patches [B, P, 3 * patch * patch], each as the convolution of the checkpoint reads it, with learned positions."""

    def __init__(self, vision: Mapping[str, Any]) -> None:
        super().__init__()
        width, patch = vision["hidden_size"], vision["patch_size"]
        self.patch_embedding = nn.Conv2d(vision["num_channels"], width, patch, patch)
        self.position_embedding = nn.Embedding((vision["image_size"] // patch) ** 2, width)

    def forward(self, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        convolution = self.patch_embedding  # its kernel is as large as its step: a product with the flat patch
        return functional.linear(pixels, convolution.weight.flatten(1), convolution.bias) + self.position_embedding(positions)


class Tower(nn.Module):
    """Embeddings, blocks, last norm."""

    def __init__(self, vision: Mapping[str, Any], blocks: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(vision)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([TowerBlock(vision, i) for i in range(blocks)])
        self.post_layernorm = nn.LayerNorm(vision["hidden_size"], vision["layer_norm_eps"])

    def forward(self, pixels: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(pixels, positions)
        for block in self.encoder.layers:  # type: ignore[union-attr]
            x = block(x, lengths)
        return self.post_layernorm(x)


class Attention(nn.Module):
    """Query, key and value projections in one weight, as `torch.nn.MultiheadAttention` keeps them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * width, width)), nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        rows = [heads(functional.linear(x, w, b), _HEAD) for x, w, b in zip((q, k, v), weights, biases, strict=True)]
        rows[0] = rows[0].expand(k.shape[0], -1, -1, -1)
        return self.out_proj(torch.ops.flagtree.full_attention(*rows, lengths, _HEAD**-0.5).flatten(2))


class Resampler(nn.Module):
    """Learned queries attend to an image's patches: [B, P, seen] to [B, queries, width]."""

    def __init__(self, queries: int, width: int, seen: int) -> None:
        super().__init__()
        self.query, self.proj = nn.Parameter(torch.empty(queries, width)), nn.Parameter(torch.empty(width, width))
        self.kv_proj = nn.Linear(seen, width, bias=False)
        self.attn = Attention(width)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, _NORM_EPS) for _ in range(3))

    def forward(self, x: torch.Tensor, grid: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        rows = self.ln_kv(self.kv_proj(x))
        return self.ln_post(self.attn(self.ln_q(self.query)[None], rows + grid, rows, lengths)) @ self.proj


class Vision(nn.Module):
    """The tower and its bridge."""

    def __init__(self, config: Mapping[str, Any], blocks: int) -> None:
        super().__init__()
        self.vpm = Tower(config["vision_config"], blocks)
        self.resampler = Resampler(config["query_num"], config["hidden_size"], config["vision_config"]["hidden_size"])

    def see(self, pixels: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Patches to rows of the text's width [images, queries, width]; rows of `pixels` beyond an image's length are not read."""
        return self.resampler(self.vpm(pixels, positions, lengths), grid, lengths)


class Text(nn.Module):
    """transformers' Llama under the checkpoint's prefix."""

    def __init__(self, config: Mapping[str, Any], layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        from flagtree.capture.build import constant_longrope, refuse_changing_rotary

        fields = {name: config[name] for name in _TEXT if name in config}
        fields["rope_scaling"] = dict(fields["rope_scaling"]) if fields.get("rope_scaling") else None
        taken = LlamaConfig(**{**fields, "num_hidden_layers": layers})
        refuse_changing_rotary(taken, "MiniCPMV")
        taken._attn_implementation = register_attention()
        self.llm = LlamaForCausalLM(taken)
        constant_longrope(self.llm)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def forward(self, **options: Any) -> Any:
        return self.llm(**options)


def layer_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """All decoder layers are alike."""
    return ("dense",) * int(config["num_hidden_layers"])


def build(config: Mapping[str, Any], numbers: Sequence[int], vision: bool) -> nn.Module:
    """The text with as many decoder layers, or the tower with as many blocks."""
    return Vision(config, len(numbers)) if vision else Text(config, len(numbers))


def patch_positions(rows: int, columns: int, side: int) -> torch.Tensor:
    """Bucket of each patch of a rows x columns image among side x side learned positions [rows * columns], row by row.

    The position of patch i of n is i / n, rounded down to a multiple of 1 / side, in float32 as the model's own code does.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    row, column = (torch.bucketize(torch.arange(n) / n, boundaries, right=True) for n in (rows, columns))
    return (row[:, None] * side + column).flatten()


def sine_table(rows: int, columns: int, width: int) -> torch.Tensor:
    """sin and cos of each patch's column, then of its row, at frequencies 10000^(-4i / width) [rows * columns, width], float32."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width / 4.0))

    def wave(n: int) -> torch.Tensor:
        angles = torch.arange(n, dtype=torch.float32)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), -1)

    across, down = wave(columns)[None].expand(rows, -1, -1), wave(rows)[:, None].expand(-1, columns, -1)
    return torch.cat((across, down), -1).flatten(0, 1)
