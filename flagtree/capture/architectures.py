"""What flagtree knows of a model class beyond its config.json: how its text takes positions, its vision tower, its kinds of layer.

Invariant: plain data, no model's dimensions; a class that is not named here is a plain text decoder of transformers.
Read by `capture/model_spec.py` (which parts a model can have) and `capture/build.py` (which modules are traced).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Vision = Literal["merged patches", "padded patches", "square images"]
Rule = tuple[str, str]  # pattern of a module's path, and how ranks share its weights
# the end of a weight's name, the ends of the checkpoint's tensors joined in it ({expert}: one an expert), and the dimension of the joint
Published = tuple[str, tuple[str, ...], int]

# the sizes that the tower of each kind needs bounds for
VISION_SIZES: dict[Vision, tuple[str, ...]] = {
    "merged patches": ("tokens", "edges"),
    "padded patches": ("images", "patches"),
    "square images": ("images", "side"),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One class named under "architectures" in a config.json.

    `positions`: coordinates of a token (3 for M-RoPE, else 1); `vision`: how its tower takes images, None for text only; `reference`:
    the module of `capture/references` that has its definition, None for transformers' own class; `renamed`: prefixes of module paths
    and what a checkpoint has in their place, in order; `divided`: how ranks share the weights of modules that `capture/ranks.py` does not
    name, or names otherwise; `published`: weights that the checkpoint holds under other names.
    """

    positions: Literal[1, 3] = 1
    vision: Vision | None = None
    reference: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    divided: tuple[Rule, ...] = ()
    published: tuple[Published, ...] = ()


_QWEN_VL = (("model.language_model.", "model."), ("model.visual.", "visual."))
_PLAIN = Architecture()
# one norm over the heads of all ranks; the bias of the routers' choice is the block's own
_MINIMAX = (("*.self_attn.q_norm", "norm of heads"), ("*.self_attn.k_norm", "norm of key heads"), ("*.mlp", "whole"))
_MINIMAX_NAMES: tuple[Published, ...] = (
    (".mlp.experts.gate_up_proj", (".block_sparse_moe.experts.{expert}.w1.weight", ".block_sparse_moe.experts.{expert}.w3.weight"), 1),
    (".mlp.experts.down_proj", (".block_sparse_moe.experts.{expert}.w2.weight",), 1),
    (".mlp.gate.weight", (".block_sparse_moe.gate.weight",), 0),
    (".mlp.e_score_correction_bias", (".block_sparse_moe.e_score_correction_bias",), 0),
)
_QWEN_MOE_NAMES: tuple[Published, ...] = (
    (".mlp.experts.gate_up_proj", (".mlp.experts.{expert}.gate_proj.weight", ".mlp.experts.{expert}.up_proj.weight"), 1),
    (".mlp.experts.down_proj", (".mlp.experts.{expert}.down_proj.weight",), 1),
)
# the narrow query, key and value stand on every rank (vLLM: ReplicatedLinear); experts and shared expert are added before the ranks are
_STEP3 = (
    ("*.self_attn.[qkv]_proj", "whole"), ("*.self_attn.wq", "columns"), ("*.moe", "expert addends"), ("*.moe.gate", "whole"),
    ("*.share_expert.gate_proj", "columns"), ("*.share_expert.up_proj", "columns"), ("*.share_expert.down_proj", "addend"),
    ("*.sum", "sum"),
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "Qwen3ForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "LlamaForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": Architecture(published=_QWEN_MOE_NAMES),
    "MiniMaxM2ForCausalLM": Architecture(divided=_MINIMAX, published=_MINIMAX_NAMES),
    "Qwen2_5_VLForConditionalGeneration": Architecture(positions=3, vision="merged patches", renamed=_QWEN_VL),
    "MiniCPMV": Architecture(vision="padded patches", reference="minicpmv4"),
    "Step3VLForConditionalGeneration": Architecture(vision="square images", reference="step3", divided=_STEP3),
    "Step3TextForCausalLM": Architecture(reference="step3", divided=_STEP3),
}


def architecture(name: str) -> Architecture:
    """What is known of a class; a plain text decoder of transformers when it is not named."""
    return ARCHITECTURES.get(name, _PLAIN)
