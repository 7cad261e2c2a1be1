"""Tiny random checkpoints at true architecture, with weights wide enough that greedy decoding moves.  Needs no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.serve.architectures import ARCHITECTURES, VOCABULARY

TEXT = "the quick brown fox jumps over lazy dog hello world how are you today system user assistant tool flagtree compiles models"
WORDS = tuple(TEXT.split())
GAIN = 1.9  # of a matrix, by the root of its width: greedy decoding moves, and nothing overflows


def write(kind: str, folder: Path, **changes: Any) -> Path:
    """The checkpoint of one of `ARCHITECTURES` with `changes` to its configuration; `folder` is made."""
    architecture = ARCHITECTURES[kind]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(architecture.tokens)
    tokenizer.save_pretrained(folder)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in architecture.tokens}
    configuration = {**architecture.configuration(ids), **changes}
    if architecture.saved:
        _save(architecture.saved, configuration, folder)
    else:
        (folder / "config.json").write_text(json.dumps(configuration, indent=1))
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    for path in Path(__file__).with_name(architecture.code).glob("*.py") if architecture.code else ():
        shutil.copy(path, folder)
    return folder


def _save(name: str, configuration: dict[str, Any], folder: Path) -> None:
    """Weights and all, as transformers writes them."""
    import transformers

    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    values = {k: v for k, v in configuration.items() if k not in ("architectures", "model_type")}
    width = values["hidden_size"]
    model = model_class(model_class.config_class(**values, initializer_range=GAIN / width**0.5))
    model.to(torch.float32).save_pretrained(folder)


def _tokenizer(special: tuple[str, ...]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*ends, *special], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 50, trainer)
    names = {"bos_token": ends[0], "eos_token": ends[1], "pad_token": ends[0]}
    names |= {"unk_token": "<unk>"} if "<unk>" in special else {}
    others = {"additional_special_tokens": list(special)} if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **names, **others)


def prompts() -> list[str]:
    """Eight of mixed length."""
    return [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(n)) for i, n in enumerate((1, 2, 5, 9, 14, 23, 37, 60))]
