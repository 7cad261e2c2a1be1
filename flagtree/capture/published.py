"""A published Hugging Face config.json as a model description: bounds from its own numbers, the name from its sizes.

Invariant: nothing is guessed; a configuration without class or element type is refused with what to add.
Between `capture/spec_file.py` and the validation in `capture/model_spec.py`.
"""

from __future__ import annotations

from typing import Any

from flagtree.capture.architectures import architecture
from flagtree.capture.spec_file import SpecFile
from flagtree.capture.spec_rules import named, text_config, token_side
from flagtree.errors import CaptureError

_BATCH = [1, 64]
_IMAGES = [1, 64]
# bounds of a vision part for a configuration that states none: 64 images of 1024 merged tokens
_VISION: dict[str, dict[str, list[int]]] = {
    "merged patches": {"tokens": [1, 65536], "edges": [2, 65537]},
    "padded patches": {"images": _IMAGES, "patches": [1, 4900]},
    "square images": {"images": _IMAGES},
}


def from_config(file: SpecFile) -> SpecFile:
    """The description of a config.json.  CaptureError where it names no class or no element type."""
    config = dict(file.data)
    architectures = config.pop("architectures", None)
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise CaptureError("the configuration names no model class", where=str(file.path), why=f"architectures is {architectures!r}")
    text = text_config(config)
    dtype = config.pop("torch_dtype", None) or config.pop("dtype", None) or text.get("torch_dtype") or text.get("dtype")
    if dtype is None:
        why = "neither 'dtype' nor 'torch_dtype' is given"
        raise CaptureError("the configuration names no dtype", where=str(file.path), why=why, hint='add "dtype": "bfloat16" to it')
    for note in ("transformers_version", "_name_or_path", "dtype", "auto_map"):
        config.pop(note, None)
    longest = named(text, "max_position_embeddings")[1]
    context = [1, longest if isinstance(longest, int) else 1]
    layers = text.get("num_hidden_layers")
    parts: dict[str, Any] = {
        "prefill": {"batch": _BATCH, "sequence": context, "context": context},
        "decode": {"batch": _BATCH, "context": context},
    }
    kind = architecture(architectures[0]).vision
    if kind is not None and isinstance(config.get("vision_config"), dict):
        parts["vision"] = dict(_VISION[kind])
        if kind == "square images":
            size, patch = (config["vision_config"].get(name) for name in ("image_size", "patch_size"))
            side = size // patch if isinstance(size, int) and isinstance(patch, int) and patch > 0 else 0
            parts["vision"]["side"] = [1, side // token_side(config)]
        parts["prefill"]["features"] = [1, 65536]
    data = {
        "name": f"{config.get('model_type', 'model')}-{text.get('hidden_size')}x{layers}",
        "architecture": architectures[0],
        "dtype": dtype,
        "config": config,
        "parts": parts,
    }
    return SpecFile(file.path, data, {})
