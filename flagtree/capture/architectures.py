"""What flagtree knows of a model class beyond its config.json: how its text takes positions, its vision tower, its kinds of layer.

Invariant: plain data, no model's dimensions; a class that is not named here is a plain text decoder of transformers.
Read by `capture/model_spec.py` (which parts a model can have) and `capture/build.py` (which modules are traced).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Vision = Literal["merged patches", "padded patches", "square images"]

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
    and what a checkpoint has in their place, in order.
    """

    positions: Literal[1, 3] = 1
    vision: Vision | None = None
    reference: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()


_QWEN_VL = (("model.language_model.", "model."), ("model.visual.", "visual."))
_PLAIN = Architecture()

ARCHITECTURES: dict[str, Architecture] = {
    "Qwen3ForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "LlamaForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": _PLAIN,
    "MiniMaxM2ForCausalLM": _PLAIN,
    "Qwen2_5_VLForConditionalGeneration": Architecture(positions=3, vision="merged patches", renamed=_QWEN_VL),
    "MiniCPMV": Architecture(vision="padded patches", reference="minicpmv4"),
    "Step3VLForConditionalGeneration": Architecture(vision="square images", reference="step3"),
    "Step3TextForCausalLM": Architecture(reference="step3"),
}


def architecture(name: str) -> Architecture:
    """What is known of a class; a plain text decoder of transformers when it is not named."""
    return ARCHITECTURES.get(name, _PLAIN)
