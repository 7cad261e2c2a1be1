"""Runs of the real engine, one after another, in a process of their own: `python -m tests.serve.engine JOB OUT`, both JSON.

A run writes ids, log-probabilities of the first two choices and each worker's report.  vLLM's spawned workers import this module
again, so what the test bed supplies is there too.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

DEFAULTS = {
    "max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 64, "enable_chunked_prefill": True, "enable_prefix_caching": True,
    "seed": 0, "dtype": "float32", "disable_log_stats": True, "worker_extension_cls": "flagtree.serve.worker.Report",
}  # fmt: skip
TOKENS = 48
SET_THREADS = torch.set_num_threads  # vLLM's worker replaces it by one that does nothing
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before vLLM is imported


def requests(image: str) -> list[Any]:
    """Eight of mixed length in one batch; where the model sees, three of them bring an image of another size."""
    from tests.serve.checkpoints import prompts

    texts: list[Any] = list(prompts())
    if image:
        from PIL import Image

        for place, size in ((1, (112, 84)), (4, (56, 140)), (6, (140, 140))):
            pixels = bytes(random.Random(place).choices(range(256), k=3 * size[0] * size[1]))
            shown = {"image": Image.frombytes("RGB", size, pixels)}
            texts[place] = {"prompt": image + texts[place], "multi_modal_data": shown}
    return texts


def run(model: str, image: str, arguments: dict[str, Any], threads: int | None, taught: Any) -> dict[str, Any]:
    """One engine from start to end.  `taught`: ids of another run, whose log-probabilities are asked for as well."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=model, **{**DEFAULTS, **arguments})
    if threads is not None:
        SET_THREADS(threads)
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    results = [r.outputs[0] for r in llm.generate(requests(image), sampling, use_tqdm=False)]
    steps = [list(zip(r.logprobs, r.token_ids)) for r in results]
    record: dict[str, Any] = {
        "ids": [list(r.token_ids) for r in results],
        "logprobs": [[step[token].logprob for step, token in one] for one in steps],
        "margins": [[_margin(step) for step, _ in one] for one in steps],
        "threads": torch.get_num_threads(),
    }
    if taught is not None or threads is not None:
        record["taught"] = _taught(llm, image, taught or record["ids"])
    record["reports"] = llm.collective_rpc("flagtree_report")
    llm.llm_engine.engine_core.shutdown()
    del llm, results
    cleanup_dist_env_and_memory()
    gc.collect()
    return record


def _margin(step: Any) -> float:
    """How far the first two choices lie apart."""
    first, second = sorted((choice.logprob for choice in step.values()), reverse=True)[:2]
    return first - second


def _taught(llm: Any, image: str, ids: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of given answers, read as prompts."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    asked = []
    for request, answer in zip(requests(image), ids):
        text, others = (request, {}) if isinstance(request, str) else (request["prompt"], {"multi_modal_data": request["multi_modal_data"]})
        asked.append({"prompt_token_ids": [*tokenizer.encode(text, add_special_tokens=False), *answer], **others})
    results = llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    return [[step[token].logprob for step, token in zip(r.prompt_logprobs[-len(a) :], a)] for r, a in zip(results, ids)]


def main(job: str, out: str) -> None:
    """`job`: {"model", "image", "runs": {name: {"arguments", "threads", "taught_by"}}}; `out` maps name to what `run` returns."""
    given = json.loads(Path(job).read_text())
    done: dict[str, Any] = dict(given.get("known", {}))
    for name, one in given["runs"].items():
        taught = done[one["taught_by"]]["ids"] if one.get("taught_by") else None
        done[name] = run(given["model"], given["image"], one["arguments"], one.get("threads"), taught)
        Path(out).write_text(json.dumps({n: done[n] for n in given["runs"] if n in done}))


if __name__ in ("__main__", "__mp_main__"):
    from tests.serve.supplied import supply

    supply()
if __name__ == "__main__":
    main(*sys.argv[1:])
