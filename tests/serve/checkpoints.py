"""Tiny random checkpoints at true architecture, with weights wide enough that greedy decoding moves.  Needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.15, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True,
}  # fmt: skip
TEXT = "the quick brown fox jumps over lazy dog hello world how are you today system user assistant tool flagtree compiles models"
WORDS = tuple(TEXT.split())


def write(kind: str, folder: Path, **changes: Any) -> Path:
    """`qwen3` or `qwen3_moe` with `changes` to its configuration."""
    import transformers

    torch.manual_seed(0)
    if kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**COMMON, **changes}))
    else:
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**COMMON, **EXPERTS, **changes}))
    model.to(torch.float32).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[1], pad_token=special[0], model_max_length=2048)


def prompts() -> list[str]:
    """Eight of mixed length."""
    return [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(n)) for i, n in enumerate((1, 2, 5, 9, 14, 23, 37, 60))]
