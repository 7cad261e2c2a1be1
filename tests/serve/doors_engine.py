"""Several engines of the real vLLM one after another in one process: `python -m tests.serve.doors_engine MODEL OUT RUNS`.

RUNS is JSON, arguments for `LLM` a run, with "refused": true for one that shall not start.  Writes ids and the report after each run, or
the error and whether weights were loaded; what the metrics say; and whether our compiler has the form of vLLM's.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

DEFAULTS = {
    "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "seed": 0, "dtype": "float32", "disable_log_stats": True,
    "worker_extension_cls": "flagtree.serve.worker.Report",
}  # fmt: skip
PROMPTS = ("hello world", "the quick brown fox jumps over the lazy dog and the others", "flagtree")


def main(model: str, out: str, runs: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)  # no log-probabilities: vLLM compiles a helper for them
    records: list[dict[str, Any]] = []
    for arguments in json.loads(runs):
        if arguments.pop("refused", False):
            records.append(refused(model, arguments))
            continue
        llm = LLM(model=model, **{**DEFAULTS, **arguments})
        results = llm.generate(list(PROMPTS), sampling, use_tqdm=False)
        ids = [list(r.outputs[0].token_ids) for r in results]
        records.append({"ids": ids, "report": llm.collective_rpc("flagtree_report")[0]})
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(out).write_text(json.dumps({"runs": records, "metrics": metrics(), "compiler": compiler()}))


def refused(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.model_loader import default_loader

    loaded: list[str] = []
    plain = default_loader.DefaultModelLoader.load_weights
    default_loader.DefaultModelLoader.load_weights = lambda *a, **k: loaded.append("weights") or plain(*a, **k)
    try:
        LLM(model=model, **{**DEFAULTS, **arguments})
    except Exception as error:
        return {"error": f"{error}", "loaded": loaded}
    finally:
        default_loader.DefaultModelLoader.load_weights = plain
        cleanup_dist_env_and_memory()
    return {"error": "", "loaded": loaded}


def metrics() -> list[str]:
    """Our lines of what `/metrics` would answer."""
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return [line for line in generate_latest(get_prometheus_registry()).decode().splitlines() if line.startswith("flagtree_")]


def compiler() -> list[str]:
    """Methods of our compiler that do not take what vLLM's own class takes."""
    import inspect

    from vllm.compilation.compiler_interface import CompilerInterface

    from flagtree.serve import compiler

    ours = compiler.Compiler
    assert issubclass(ours, CompilerInterface)
    names = ("compute_hash", "initialize_cache", "compile", "load")
    return [n for n in names if list(inspect.signature(getattr(ours, n)).parameters)
            != list(inspect.signature(getattr(CompilerInterface, n)).parameters)]  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
