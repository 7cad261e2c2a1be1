"""A model's weights divided over the ranks of tensor parallelism: the part of each that a rank has, and where the ranks add up.

Invariant: each weight is named by a rule or the model is refused; all ranks trace one graph, in which only the input `rank` tells them
apart.  Works on the model that `capture/build.py` made whole on the meta device, before `capture/model.py` traces it.
Divided as vLLM does by default (0.32: `layers/linear.py`, `vocab_parallel_embedding.py`, `fused_moe/layer.py`): heads, inner widths of
gated layers and of each expert, vocabulary; key heads stand on several ranks where there are fewer than ranks; norms and routers on all.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from flagtree.capture.architectures import Rule, architecture
from flagtree.capture.model_spec import ModelSpec
from flagtree.capture.shares import Share, by_key_heads, divided, on_the_first, padded
from flagtree.errors import CaptureError
from flagtree.runtime.collectives import TENSOR_PARALLEL

# paths of modules, the first pattern that fits; what a class has beyond these stands in capture/architectures.py
TEXT: tuple[Rule, ...] = (
    ("*.self_attn.q_proj", "columns"), ("*.self_attn.[kv]_proj", "key heads"), ("*.self_attn.o_proj", "rows"),
    ("*.mlp.gate_proj", "columns"), ("*.mlp.up_proj", "columns"), ("*.mlp.down_proj", "rows"),
    ("*.mlp.experts", "experts"), ("*.mlp.gate", "whole"), ("*norm", "whole"),
    ("*embed_tokens", "vocabulary"), ("*lm_head", "head"),
)  # fmt: skip
TOWERS: dict[str, tuple[Rule, ...]] = {
    "merged patches": (
        ("*.attn.qkv", "packed"), ("*.attn.proj", "rows"), ("*.mlp.gate_proj", "columns"), ("*.mlp.up_proj", "columns"),
        ("*.mlp.down_proj", "rows"), ("*.merger.mlp.0", "columns"), ("*.merger.mlp.2", "rows"), ("*.patch_embed.proj", "whole"),
        ("*.norm[12]", "whole"), ("*.ln_q", "whole"),
    ),
    "padded patches": (
        ("*.self_attn.[qkv]_proj", "columns"), ("*.self_attn.out_proj", "rows"), ("*.mlp.fc1", "columns"), ("*.mlp.fc2", "rows"),
        ("vpm.*", "whole"), ("resampler*", "whole"),
    ),
    "square images": (
        ("*.self_attn.qkv_proj", "packed"), ("*.self_attn.out_proj", "rows"), ("*.mlp.fc1", "columns"), ("*.mlp.fc2", "rows"),
        ("vision_model.*", "whole"), ("vit_*", "whole"),
    ),
}  # fmt: skip

def divide(model: torch.nn.Module, spec: ModelSpec, part: str) -> dict[str, Share]:
    """Give every module the sizes of one rank and its collective, in place; returns the shares by weight, for those that are divided.

    CaptureError for a weight without a rule and a size that does not divide.
    """
    if spec.capture.ranks == 1:
        return {}
    known = architecture(spec.architecture)
    general = TOWERS[str(known.vision)] if part == "vision" else TEXT
    work = _Division(model, spec)
    for path, module in list(model.named_modules()):
        kind = next((kind for pattern, kind in (*known.divided, *general) if fnmatch.fnmatchcase(path, pattern)), None)
        own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if kind is not None:
            work.take(path, module, kind)
        elif set(own) - module._non_persistent_buffers_set:
            why = f"no rule says how ranks share {path}.{own[0]}"
            hint = "serve it undivided, or with --for vllm, which divides what vLLM does"
            raise CaptureError(f"{spec.architecture} cannot be divided over ranks", where=spec.name, why=why, hint=hint)
    return work.shares


class _Division:
    """The walk over one model: new sizes of weights, a tied one once, and new forwards."""

    def __init__(self, model: torch.nn.Module, spec: ModelSpec) -> None:
        self.model, self.spec, self.ranks = model, spec, spec.capture.ranks
        self.shares: dict[str, Share] = {}
        self.made: dict[int, torch.nn.Parameter] = {}

    def take(self, path: str, module: Any, kind: str) -> None:
        share: dict[str, Callable[[int, str], Share]] = {
            "columns": lambda size, what: divided(size, self.ranks, what),
            "packed": lambda size, what: divided(size, self.ranks, what, pieces=3),
            "key heads": lambda size, what: by_key_heads(size, self.spec.key_heads, self.ranks, what),
            "norm of heads": lambda size, what: divided(size, self.ranks, what),
            "norm of key heads": lambda size, what: by_key_heads(size, self.spec.key_heads, self.ranks, what),
            "vocabulary": lambda size, what: padded(size, self.ranks),
            "head": lambda size, what: padded(size, self.ranks),
        }
        if kind in share:
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                self._shrink(path, module, name, share[kind](module.get_parameter(name).shape[0], f"{path}.{name}"))
        elif kind in ("rows", "addend"):
            self._shrink(path, module, "weight", divided(module.weight.shape[1], self.ranks, f"{path}.weight", dim=1))
            if module.bias is not None:
                self._shrink(path, module, "bias", on_the_first(module.bias.shape[0], self.ranks))
        elif kind in ("experts", "expert addends"):
            for name, weight in list(module.named_parameters(recurse=False)):
                dim, pieces = (1, 2) if name == "gate_up_proj" else (2, 1)
                self._shrink(path, module, name, divided(weight.shape[dim], self.ranks, f"{path}.{name}", dim, pieces))
        if kind == "packed" and hasattr(owner := self.model.get_submodule(path.rpartition(".")[0]), "num_heads"):
            owner.num_heads //= self.ranks  # type: ignore[operator,assignment]
        if (made := FORWARDS.get(kind)) is not None:
            module.forward = made(module, self.ranks, self.spec.text["vocab_size"])

    def _shrink(self, path: str, module: torch.nn.Module, name: str, share: Share) -> None:
        whole = module.get_parameter(name)
        self.shares[f"{path}.{name}"] = share
        if id(whole) not in self.made:
            shape = [share.own if d == share.dim else size for d, size in enumerate(whole.shape)]
            self.made[id(whole)] = torch.nn.Parameter(torch.empty(shape, dtype=whole.dtype, device=whole.device), requires_grad=False)
        module._parameters[name] = self.made[id(whole)]


# -- what a rank computes ------------------------------------------------------------------------------------------------
def _sum(x: torch.Tensor, ranks: int) -> torch.Tensor:
    return torch.ops.flagtree.all_reduce(x, TENSOR_PARALLEL, ranks)


def _rows(module: Any, ranks: int, vocabulary: int) -> Callable[..., torch.Tensor]:
    """A product over a part of the inner width; the ranks' sum.  The bias is the first rank's, zeros elsewhere."""
    return lambda x: _sum(functional.linear(x, module.weight, module.bias), ranks)


def _summed(module: Any, ranks: int, vocabulary: int) -> Callable[..., torch.Tensor]:
    """What the module computes, summed over the ranks."""
    plain = module.forward
    return lambda *arguments, **options: _sum(plain(*arguments, **options), ranks)


def _vocabulary(module: Any, ranks: int, vocabulary: int) -> Callable[..., torch.Tensor]:
    """Rows of the words that the rank has, zeros for the others; the ranks' sum.  `rank` int64 [1]."""

    def forward(ids: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        rows = module.weight.shape[0]
        place = ids - rank * rows
        own = (place >= 0) & (place < rows)
        found = functional.embedding(place.clamp(0, rows - 1), module.weight)
        return _sum(torch.where(own[..., None], found, 0.0), ranks)

    return forward


def _head(module: Any, ranks: int, vocabulary: int) -> Callable[..., torch.Tensor]:
    """Logits of the rank's words, then those of all, without the padding."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(x, module.weight, module.bias)
        return torch.ops.flagtree.all_gather(logits, TENSOR_PARALLEL, ranks, vocabulary)

    return forward


def _norm(module: Any, ranks: int, vocabulary: int) -> Callable[..., torch.Tensor]:
    """A root-mean-square norm over the heads of all ranks (transformers' `MiniMaxM2RMSNorm`); a key head that stands on several counts as
    often for each."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        mean = _sum(wide.pow(2).mean(-1, keepdim=True), ranks) / ranks
        return module.weight * (wide * torch.rsqrt(mean + module.variance_epsilon)).to(x.dtype)

    return forward


FORWARDS: dict[str, Callable[[Any, int, int], Callable[..., torch.Tensor]]] = {
    "rows": _rows, "experts": _summed, "sum": _summed, "vocabulary": _vocabulary, "head": _head,
    "norm of heads": _norm, "norm of key heads": _norm,
}  # fmt: skip

