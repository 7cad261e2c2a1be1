"""One run of the real engine in a process of its own: `python -m tests.serve.engine MODEL OUT ARGUMENTS`.

Writes ids, log-probabilities and the worker's report as JSON; ARGUMENTS is JSON for vLLM's `LLM`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

DEFAULTS = {
    "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64, "enable_chunked_prefill": True, "enable_prefix_caching": True,
    "seed": 0, "dtype": "float32", "disable_log_stats": True, "worker_extension_cls": "flagtree.serve.worker.Report",
}  # fmt: skip


def main(model: str, out: str, arguments: str) -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    from tests.serve.checkpoints import prompts

    llm = LLM(model=model, **{**DEFAULTS, **json.loads(arguments)})
    sampling = SamplingParams(temperature=0.0, max_tokens=int(os.environ.get("TOKENS", "48")), ignore_eos=True, logprobs=1)
    results = [r.outputs[0] for r in llm.generate(prompts(), sampling, use_tqdm=False)]
    record = {
        "ids": [list(r.token_ids) for r in results],
        "logprobs": [[step[token].logprob for step, token in zip(r.logprobs, r.token_ids)] for r in results],
        "reports": llm.collective_rpc("flagtree_report"),
    }
    Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
