"""A reference beside vLLM's own model of the same checkpoint: `python -m tests.capture.vllm_reference KIND FOLDER`.

Writes a small checkpoint through our map, lets vLLM's loader read it, runs text and tower of both on the same input, and writes
FOLDER/found.json: per output, the greatest difference and the mean magnitude.  vLLM's paged attention is replaced by PyTorch's causal
attention over the one sequence, since no engine runs here; projections, norms, rotary, experts and loading stay vLLM's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch.nn.functional import scaled_dot_product_attention

from flagtree.capture.cache import ExplicitCache
from flagtree.capture.references import minicpmv4, step3
from flagtree.capture.references.checkpoint import to_checkpoint
from tests.models.small import CONFIGS, full_depth, random_weights, small_spec

RULES = {"step3": step3.CHECKPOINT, "minicpm": minicpmv4.CHECKPOINT}
TOKENS = 11
# as the published checkpoint brings its own code; transformers has no class of this model type
MINICPM_CONFIGURATION = '''
from transformers import LlamaConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

class MiniCPMVConfig(LlamaConfig):
    model_type = "minicpmv"

    def __init__(self, query_num=64, image_size=448, drop_vision_last_layer=False, vision_config=None, version=4.0, **options):
        self.query_num, self.image_size, self.drop_vision_last_layer, self.version = query_num, image_size, drop_vision_last_layer, version
        self.vision_config = vision_config if isinstance(vision_config, SiglipVisionConfig) else SiglipVisionConfig(**(vision_config or {}))
        self.patch_size = self.vision_config.patch_size
        super().__init__(**options)
'''


def write(kind: str, folder: Path) -> dict[str, torch.nn.Module]:
    """The checkpoint in `folder`; our text and tower of it, with tables computed."""
    spec = small_spec(kind)
    ours = {part: random_weights(full_depth(spec, part), seed) for seed, part in enumerate(("prefill", "vision"))}
    weights = {name: w for model in ours.values() for name, w in model.named_parameters()}
    safetensors.torch.save_file(to_checkpoint({n: w.detach() for n, w in weights.items()}, RULES[kind]), folder / "model.safetensors")
    architecture, config, _ = CONFIGS[kind]
    written = {**config, "architectures": [architecture], "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    if kind == "minicpm":
        written["auto_map"] = {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"}
        (folder / "configuration_minicpm.py").write_text(MINICPM_CONFIGURATION)
    else:
        written["text_config"] = {**config["text_config"], "architectures": ["Step3TextForCausalLM"]}
        written["image_token_id"] = 96
    (folder / "config.json").write_text(json.dumps(written))
    return ours


def text_logits(kind: str, model: Any) -> torch.Tensor:
    """Our logits [TOKENS, vocabulary] for the first tokens of the vocabulary."""
    spec, ids = small_spec(kind), torch.arange(TOKENS)[None]
    from flagtree.capture.model import constants_of

    for name, table in constants_of(model).items():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], table, persistent=False)
    rows = [torch.zeros(1, spec.key_heads, TOKENS, spec.head_width) for _ in range(2 * spec.depth)]
    cache = ExplicitCache(rows[: spec.depth], rows[spec.depth :], torch.zeros(1, dtype=torch.int64))
    return model(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True, flagtree_cache=cache).logits[0]


def load(kind: str, folder: Path) -> tuple[Any, Any]:
    """vLLM's model of the checkpoint, by its own loader, and its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    torch.accelerator.empty_cache = lambda: None  # vLLM's loader and resampler ask an accelerator; where there is none PyTorch raises
    torch.cuda.is_current_stream_capturing = lambda: False
    if kind == "step3":
        register_step3()
    arguments = EngineArgs(
        model=str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, trust_remote_code=True,
        load_format="safetensors", max_num_seqs=2, max_num_batched_tokens=64,
    )  # fmt: skip
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        return get_model(vllm_config=config), config


def causal(layer: Any) -> Any:
    """Attention of one sequence in the place of the paged one."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (-1, layer.head_size)).transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.impl.scale, enable_gqa=True)[0].transpose(0, 1).flatten(1)

    return forward


def their_text(model: Any, config: Any) -> torch.Tensor:
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = causal(module)
    ids = torch.arange(TOKENS)
    with set_forward_context(None, config, num_tokens=TOKENS):
        return model.compute_logits(model(ids, ids))


def compare(kind: str, folder: Path) -> dict[str, tuple[float, float]]:
    ours = write(kind, folder)
    theirs, config = load(kind, folder)
    random = torch.Generator().manual_seed(5)
    pairs = {"text": (text_logits(kind, ours["prefill"]), their_text(theirs, config))}
    tower: Any = ours["vision"]
    if kind == "step3":
        for side in (8, 4):  # an image, and a crop whose positions are resampled
            images = torch.randn(2, 3, 4 * side, 4 * side, generator=random)
            pixels = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, side // 4, 4, side // 4, 4, -1)
            table = tower.vision_model.embeddings.position_embedding.weight
            positions = step3.patch_positions(table, side).view(side // 4, 4, side // 4, 4, -1)
            mine = tower.see(pixels, positions).flatten(0, 1)
            pairs["vision" if side == 8 else "crop"] = (mine, theirs._batched_encoder_forward(images))
    else:
        shapes = ((10, 10), (3, 7))
        images = [torch.randn(r * c, 48, generator=random) for r, c in shapes]
        padded = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
        tables = [
            torch.nn.utils.rnn.pad_sequence([make(r, c, n) for r, c in shapes], batch_first=True)
            for make, n in ((minicpmv4.patch_positions, 10), (minicpmv4.sine_table, 128))
        ]
        mine = tower.see(padded, tables[0], torch.tensor([r * c for r, c in shapes]), tables[1])
        # the published layout: an image is one row of patches side by side, [3, patch, patch * patches]
        flat = [x.unflatten(1, (3, 4, 4)).permute(1, 2, 0, 3).flatten(2) for x in images]
        pairs["vision"] = (mine, theirs.get_vision_hidden_states({"pixel_values": flat, "tgt_sizes": torch.tensor(shapes)}))
    return {name: (float((a - b).abs().max()), float(b.abs().mean())) for name, (a, b) in pairs.items()}


def register_step3() -> None:
    """vLLM's step3 imports torchvision for the preprocessing of images, which is not used here; where it is missing, names that import."""
    from transformers.utils import is_torchvision_available
    from vllm import ModelRegistry

    names = [] if is_torchvision_available() else ["torchvision", "torchvision.transforms", "torchvision.transforms.functional"]
    for name in names:
        sys.modules[name] = ModuleType(name)
    if names:
        sys.modules[names[0]].transforms = sys.modules[names[1]]  # type: ignore[attr-defined]
        sys.modules[names[2]].InterpolationMode = object  # type: ignore[attr-defined]
    from vllm.model_executor.models.step3_vl import Step3VLForConditionalGeneration

    for name in names:
        del sys.modules[name]
    ModelRegistry.register_model("Step3VLForConditionalGeneration", Step3VLForConditionalGeneration)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    torch.set_num_threads(1)
    with torch.no_grad():
        found = compare(sys.argv[1], Path(sys.argv[2]))
    (Path(sys.argv[2]) / "found.json").write_text(json.dumps(found))
