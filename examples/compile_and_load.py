"""Compile a small Qwen3 ahead of time without its weights, load the bundle, and get the logits of transformers.

`flagtree.load` needs neither transformers nor a compiler; both are here to make the model and to compare.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import flagtree
from flagtree.compile import compile_model

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}


def main() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, tie_word_embeddings=False)
    model = Qwen3ForCausalLM(config).eval()

    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "config.json"
        description.write_text(json.dumps({**config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": "float32"}))
        report = compile_model(str(description), ["cpu"], out=Path(folder) / "bundles", jobs=1)
        bundle = flagtree.load(report.bundles[0].path)

        weights = dict(model.state_dict())
        caches = {f"{kind}_cache.{layer}": torch.zeros(1, 2, 64, 16) for kind in "kv" for layer in range(3)}
        ids = torch.randint(0, 97, (1, 9))
        # the cache is written in place: prefill puts nine rows into it, decode the tenth
        first = bundle.parts["prefill"]({**weights, **caches, "ids": ids, "start": torch.tensor([0]), "last": torch.tensor([8])})
        (logits,) = first.values()
        following = logits.argmax(-1, keepdim=True)
        second = bundle.parts["decode"]({**weights, **caches, "ids": following, "start": torch.tensor([9])})
        (decoded,) = second.values()

    with torch.no_grad():
        truth = model(torch.cat([ids, following], 1)).logits
    torch.testing.assert_close(logits, truth[:, 8], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoded, truth[:, 9], atol=1e-4, rtol=1e-4)
    kernels = sum(len(part.kernels) for part in report.bundles[0].parts)
    print(f"{kernels} kernels; prefill and decode give the logits of transformers")


if __name__ == "__main__":
    main()
