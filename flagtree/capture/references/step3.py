"""step3: multi-matrix factorisation attention, experts beside a shared one, a post-norm vision tower with a convolutional bridge.

Text: per layer a 2048-wide query is normed and expanded to 64 heads of 256; one key head and one value head of 256 serve all of them;
rotary on the whole head.  Layers of `moe_layers_enum` route each token to `moe_top_k` experts by softmax, the weights not renormalised,
and always add the shared expert.  Vision: x + norm(attention(x)), x + norm(mlp(x)), the class row four times before the patches.
Sources: vLLM 0.32 models/step3_text.py and models/step3_vl.py, transformers_utils/configs/step3_vl.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flagtree.capture.cache import ExplicitCache
from flagtree.capture.references.blocks import GatedLayer, Output, RMSNorm, Rotary, heads, rotate
from flagtree.capture.references.checkpoint import Joined
from flagtree.capture.spec_rules import text_config

# the checkpoint keeps the experts' gate and up matrices [E, I, H] apart; all else has the names below
CHECKPOINT = (
    Joined(".moe.gate_up_proj", (".moe.gate_proj.weight", ".moe.up_proj.weight"), 1),
    Joined(".moe.expert_down_proj", (".moe.down_proj.weight",), 0),
)

_CLASS_ROWS = 4  # the class row stands four times before the patches, so that their number is a multiple of four


class FactorisedAttention(nn.Module):
    """q = wq(norm(q_proj(x))) in heads; one key and one value head; hidden [B, S, width] to the same."""

    def __init__(self, text: Mapping[str, Any], layer_idx: int) -> None:
        super().__init__()
        width, self.head, self.layer_idx = text["hidden_size"], text["head_dim"], layer_idx
        shared, inner = text["share_q_dim"], text["num_attention_heads"] * text["head_dim"]
        self.q_proj = nn.Linear(width, shared, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, self.head, bias=False), nn.Linear(width, self.head, bias=False)
        self.inter_norm = RMSNorm(shared, text["rms_norm_eps"])
        self.wq = nn.Linear(shared, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], cache: ExplicitCache) -> torch.Tensor:
        q = rotate(heads(self.wq(self.inter_norm(self.q_proj(x))), self.head), *tables)
        k, v = rotate(heads(self.k_proj(x), self.head), *tables), heads(self.v_proj(x), self.head)
        keys, values = cache.keys[self.layer_idx], cache.values[self.layer_idx]
        found = torch.ops.flagtree.attention(q, k, v, keys, values, cache.start, self.head**-0.5)
        return self.o_proj(found.flatten(2))


class Experts(nn.Module):
    """The routed experts: softmax over all, the `moe_top_k` greatest with their own weights."""

    def __init__(self, text: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner, count = text["hidden_size"], text["moe_intermediate_size"], text["moe_num_experts"]
        self.top_k, self.renormalise = text["moe_top_k"], bool(text["norm_expert_weight"])
        self.gate = nn.Linear(width, count, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.expert_down_proj = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        weights, ids = torch.ops.flagtree.moe_route(self.gate(rows), None, self.top_k, "softmax", self.renormalise)
        return torch.ops.flagtree.fused_moe(rows, self.gate_up_proj, self.expert_down_proj, weights, ids).view(x.shape)


class DecoderLayer(nn.Module):
    """Pre-norm attention and pre-norm gated layer, or experts and shared expert."""

    def __init__(self, text: Mapping[str, Any], layer_idx: int, kind: str) -> None:
        super().__init__()
        width, eps = text["hidden_size"], text["rms_norm_eps"]
        self.self_attn = FactorisedAttention(text, layer_idx)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.routed = kind == "experts"
        if self.routed:
            self.moe, self.share_expert = Experts(text), GatedLayer(width, text["share_expert_dim"])
            self.sum = nn.Identity()  # where ranks that have a part of each expert add up
        else:
            self.mlp = GatedLayer(width, text["intermediate_size"])

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], cache: ExplicitCache) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables, cache)
        y = self.post_attention_layernorm(x)
        return x + (self.sum(self.share_expert(y) + self.moe(y)) if self.routed else self.mlp(y))


class TextModel(nn.Module):
    """Embedding, decoder layers, last norm."""

    def __init__(self, text: Mapping[str, Any], kinds: Sequence[str]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(text["vocab_size"], text["hidden_size"])
        self.layers = nn.ModuleList([DecoderLayer(text, i, kind) for i, kind in enumerate(kinds)])
        self.norm = RMSNorm(text["hidden_size"], text["rms_norm_eps"])
        self.rotary = Rotary(SimpleNamespace(width=text["head_dim"], theta=float(text["rope_theta"])))

    def forward(self, x: torch.Tensor, positions: torch.Tensor, cache: ExplicitCache) -> torch.Tensor:
        tables = self.rotary(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, tables, cache)
        return self.norm(x)


class Text(nn.Module):
    """The text half, called as transformers calls a decoder."""

    def __init__(self, text: Mapping[str, Any], kinds: Sequence[str]) -> None:
        super().__init__()
        self.model = TextModel(text, kinds)
        self.lm_head = nn.Linear(text["hidden_size"], text["vocab_size"], bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, *, position_ids: torch.Tensor,
        flagtree_cache: ExplicitCache, **options: object,
    ) -> Output:  # fmt: skip
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return Output(self.lm_head(self.model(x, position_ids, flagtree_cache)))


class TowerAttention(nn.Module):
    """All rows of an image see each other; [B, S, width] to the same."""

    def __init__(self, width: int, count: int, layer_idx: int) -> None:
        super().__init__()
        self.head, self.layer_idx = width // count, layer_idx
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(part, self.head) for part in self.qkv_proj(x).chunk(3, -1))
        return self.out_proj(torch.ops.flagtree.full_attention(q, k, v, None, self.head**-0.5).flatten(2))


class QuickGeluLayer(nn.Module):
    """fc2(y sigmoid(1.702 y)) with y = fc1(x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc1(x)
        return self.fc2(y * torch.sigmoid(1.702 * y))


class TowerBlock(nn.Module):
    """Post-norm: what attention and layer add is normed, not what they read."""

    def __init__(self, vision: Mapping[str, Any], layer_idx: int) -> None:
        super().__init__()
        width, eps = vision["hidden_size"], vision["layer_norm_eps"]
        self.self_attn = TowerAttention(width, vision["num_attention_heads"], layer_idx)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.mlp = QuickGeluLayer(width, vision["intermediate_size"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer_norm1(self.self_attn(x))
        return x + self.layer_norm2(self.mlp(x))


class Embeddings(nn.Module):
    """Patches of images [B, side, m, side, m, 3 * patch * patch], each as the convolution of the checkpoint reads it, with the class row
    four times before them and a position on each [B, 4 + (side m)^2, width]; `positions` [side, m, side, m, width]: `patch_positions`."""

    def __init__(self, vision: Mapping[str, Any]) -> None:
        super().__init__()
        width, patch = vision["hidden_size"], vision["patch_size"]
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.patch_embedding = nn.Conv2d(vision["num_channels"], width, patch, patch)
        self.position_embedding = nn.Embedding((vision["image_size"] // patch) ** 2 + 1, width)

    def forward(self, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        convolution = self.patch_embedding  # its kernel is as large as its step: a product with the flat patch
        rows = functional.linear(pixels.flatten(3, 4).flatten(1, 3), convolution.weight.flatten(1), convolution.bias)
        first = self.class_embedding + self.position_embedding.weight[:1]
        return torch.cat([first.expand(pixels.shape[0], _CLASS_ROWS, -1), rows + positions.flatten(2, 3).flatten(0, 2)], 1)


class Tower(nn.Module):
    """Embeddings and blocks."""

    def __init__(self, vision: Mapping[str, Any], blocks: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(vision)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList([TowerBlock(vision, i) for i in range(blocks)])

    def forward(self, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(pixels, positions)
        for block in self.transformer.layers:  # type: ignore[union-attr]
            x = block(x)
        return x[:, _CLASS_ROWS:]


class Vision(nn.Module):
    """The tower and its bridge: two convolutions, each of half the rows and columns, and a linear layer."""

    def __init__(self, config: Mapping[str, Any], blocks: int) -> None:
        super().__init__()
        vision, width = config["vision_config"], text_config(config)["hidden_size"]
        made, stride = vision["output_hidden_size"], config["understand_projector_stride"]
        self.vision_model = Tower(vision, blocks)
        self.vit_downsampler = nn.Conv2d(vision["hidden_size"], made, 2, stride)
        self.vit_downsampler2 = nn.Conv2d(made, 2 * made, 3, 2, 1)
        self.vit_large_projector = nn.Linear(2 * made, width, bias=config["projector_bias"])

    def see(self, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Patches [B, side, m, side, m, 3 * patch * patch] to rows of the text's width [B, side * side, width].

        `m` patches on a side become one token (`spec_rules.token_side`), so the sizes of every step are multiples of one.
        """
        patches, (side, merged) = self.vision_model(pixels, positions), pixels.shape[1:3]
        grid = patches.transpose(1, 2).unflatten(2, (side * merged, side * merged))
        return self.vit_large_projector(self.vit_downsampler2(self.vit_downsampler(grid)).flatten(2).transpose(1, 2))


def layer_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """"dense" or "experts" for each decoder layer; `moe_layers_enum` is a text of numbers and commas, or a list."""
    text = text_config(config)
    given = text["moe_layers_enum"]
    routed = {int(number) for number in (given.split(",") if isinstance(given, str) else given)}
    return tuple("experts" if i in routed else "dense" for i in range(text["num_hidden_layers"]))


def build(config: Mapping[str, Any], numbers: Sequence[int], vision: bool) -> nn.Module:
    """The text with the decoder layers of these numbers, or the tower with as many blocks."""
    if vision:
        return Vision(config, len(numbers))
    kinds = layer_kinds(config)
    return Text(text_config(config), [kinds[i] for i in numbers])


def patch_positions(weight: torch.Tensor, side: int) -> torch.Tensor:
    """The learned positions of patches, `position_embedding.weight` less its first row, for images of `side` x `side` patches
    [side, side, width]: resampled where that is not the trained side, bicubic with antialias, in float32 as vLLM does."""
    trained = int((weight.shape[0] - 1) ** 0.5)
    table = weight[1:].view(1, trained, trained, -1)
    if side != trained:
        planes = table.permute(0, 3, 1, 2).to(torch.float32)
        resampled = functional.interpolate(planes, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        table = resampled.permute(0, 2, 3, 1).to(weight.dtype)
    return table[0]
