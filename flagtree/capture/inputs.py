"""What a part of a model takes, as data, and the module that is traced: from those arguments to logits or features.

Invariant: the arguments of a part follow from the description alone; whoever serves a bundle passes tensors of exactly these names.
Between `capture/build.py`, which makes the model, and `capture/model.py`, which traces the module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from flagtree.capture.architectures import architecture
from flagtree.capture.cache import ExplicitCache
from flagtree.capture.model_spec import ModelSpec
from flagtree.capture.spec_rules import token_side
from flagtree.passes.repeat import Run

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor that a caller passes; a dimension is a number or the name of a size that the description bounds."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    role: Literal["input", "state"] = "input"


def arguments_of(spec: ModelSpec, part: str, runs: Sequence[Run], element: torch.dtype) -> tuple[Argument, ...]:
    """The arguments of a part whose captured layers are those of `runs`, in order."""
    layers = sum(run.captured for run in runs)
    if part == "vision":
        return _vision_arguments(spec, layers, element)
    known, sizes = architecture(spec.architecture), spec.bounds(part).sizes
    tokens: int | str = "sequence" if "sequence" in sizes else 1
    found = [Argument("ids", ("batch", tokens), torch.int64), Argument("start", ("batch",), torch.int64)]
    if part == "prefill":
        found.append(Argument("last", ("batch",), torch.int64))
    if known.positions > 1:
        found.append(Argument("positions", (known.positions, "batch", tokens), torch.int64))
    if "features" in sizes:
        found.append(Argument("features", ("features", spec.text["hidden_size"]), element))
        found.append(Argument("feature_rows", ("batch", tokens), torch.int64))
    if spec.capture.ranks > 1:
        found.append(Argument("rank", (1,), torch.int64))
    shape = ("batch", spec.cache_heads, "context", spec.head_width)
    found += [Argument(f"{cache}.{i}", shape, element, "state") for cache in ("k_cache", "v_cache") for i in range(layers)]
    return tuple(found)


def _vision_arguments(spec: ModelSpec, layers: int, element: torch.dtype) -> tuple[Argument, ...]:
    vision, kind = spec.config["vision_config"], architecture(spec.architecture).vision
    if kind == "merged patches":
        merged = vision["spatial_merge_size"] ** 2
        pixels = vision.get("in_channels", vision.get("in_chans", 3)) * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        return (
            Argument("pixels", ("tokens", merged, pixels), element),
            Argument("positions", ("tokens", merged, 2), torch.int64),
            Argument("window_index", ("tokens",), torch.int64),
            *(Argument(f"bounds.{i}", ("edges",), torch.int32) for i in range(layers)),
        )
    if kind == "padded patches":
        pixels = vision["num_channels"] * vision["patch_size"] ** 2
        return (
            Argument("pixels", ("images", "patches", pixels), element),
            Argument("positions", ("images", "patches"), torch.int64),
            Argument("lengths", ("images",), torch.int64),
            Argument("grid", ("images", "patches", spec.text["hidden_size"]), element),
        )
    pixels, merged = vision["num_channels"] * vision["patch_size"] ** 2, token_side(spec.config)
    return (
        Argument("pixels", ("images", "side", merged, "side", merged, pixels), element),
        Argument("positions", ("side", merged, "side", merged, vision["hidden_size"]), element),
    )


class Part(torch.nn.Module):
    """What is exported: one mapping of arguments in, one tensor out.  Keeps the model under the name `model`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> torch.Tensor:
        raise NotImplementedError


class TextPart(Part):
    """ids [B, S], start [B] and the caches to the logits [B, vocabulary] of each sequence's last token.

    Token t of a sequence stands at `start + t` in its cache; that is also its position unless `positions` [3, B, S] says another for
    each axis.  `rank` [1] is the number of the rank whose part of the weights
    this is.  `feature_rows` [B, S] names the row of `features` that stands in the place of a token's embedding, -1 for none.
    The rows that the output head shall see are picked in a hook before the head, so that whatever a model class computes after its
    head (scaling, soft caps) stays in the graph.
    """

    def forward(self, inputs: Inputs) -> torch.Tensor:
        model: Any = self.model
        ids, start, last = inputs["ids"], inputs["start"], inputs.get("last")

        def pick(head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            hidden = arguments[0]
            return (hidden[:, 0] if last is None else hidden[torch.arange(hidden.shape[0], device=hidden.device), last],)

        positions = inputs.get("positions")
        if positions is None:
            positions = start[:, None]
            if last is not None:
                positions = positions + torch.arange(ids.shape[1], device=ids.device)
        hooks = []
        if "rank" in inputs:
            hooks.append(model.get_input_embeddings().register_forward_pre_hook(lambda table, words: (*words, inputs["rank"])))
        tokens = {"input_ids": ids}
        if "features" in inputs:
            rows = inputs["feature_rows"]
            words, seen = model.get_input_embeddings()(ids), inputs["features"][rows.clamp(min=0)]
            tokens = {"inputs_embeds": torch.where((rows >= 0)[..., None], seen, words)}
        keys, values = ([v for name, v in inputs.items() if name.startswith(cache)] for cache in ("k_cache.", "v_cache."))
        cache = ExplicitCache(keys, values, start)
        hooks.append(model.get_output_embeddings().register_forward_pre_hook(pick))
        try:
            found = model(**tokens, position_ids=positions, past_key_values=cache, use_cache=True, flagtree_cache=cache)
        finally:
            for hook in hooks:
                hook.remove()
        return found.logits


class MergedPatches(Part):
    """Qwen2.5-VL's tower: patches of all images, four that merge side by side, to one row of the text's width each [tokens, width].

    `positions`: row and column of each patch; `window_index`: the tokens in order of windows; `bounds.i` [edges]: where the groups of
    patches that see each other in block i begin and end, in that order; images for blocks with full attention, with their last edge
    repeated, windows for the others.
    """

    def forward(self, inputs: Inputs) -> torch.Tensor:
        model: Any = self.model
        bounds = [value for name, value in inputs.items() if name.startswith("bounds.")]
        return model.model.visual(
            inputs["pixels"].flatten(0, 1), None, position_ids=inputs["positions"].flatten(0, 1), cu_seqlens=bounds[0], max_seqlen=1,
            window_index=inputs["window_index"], cu_window_seqlens=bounds[0], max_window_seqlen=1, flagtree_bounds=bounds,
        ).pooler_output  # fmt: skip


class ReferenceVision(Part):
    """A tower of ours (`capture/references`), which takes its arguments by name."""

    def forward(self, inputs: Inputs) -> torch.Tensor:
        model: Any = self.model
        return model.see(**inputs)


def part_module(spec: ModelSpec, part: str, model: torch.nn.Module) -> Part:
    """The module to trace for a part."""
    if part != "vision":
        return TextPart(model)
    return MergedPatches(model) if architecture(spec.architecture).vision == "merged patches" else ReferenceVision(model)
