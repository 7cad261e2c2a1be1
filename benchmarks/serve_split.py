"""Where a decoding step's time goes, with Inductor and from a bundle: products, attention, what the compiler generated, the rest.

Part of benchmarks/serve.py.  The engine runs in one process under torch's profiler.  Both compilers leave products and attention to the
same operators of vLLM; how long these take depends on where a start's weights happen to lie in memory.  What a compiler answers for is
`generated`: its kernels and what it does around calls, that is the graph's time less that of the operators within it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import rows
from serve import DTYPE, ENGINE, PAGES, cache_of, environment, prompt, read
from serve_tokens import BATCHES, TOKENS

FILE = "split.jsonl"  # in the state
CONTENDERS = {"inductor": ("inductor held", "inductor cold"), "flagtree": ("flagtree second", "flagtree first")}
# self time of events whose name holds this text
PARTS = {"products": ("onednn_mm",), "attention and its cache": ("attention", "kv_cache", "reshape_and_cache"),
         "generated": ("CompiledFxGraph", "flagtree graph")}  # fmt: skip


# -- in the child ----------------------------------------------------------------------------------------------------
def split(model: str, arguments: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds a step by batch and part; "step": of wall time without the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    from flagtree.serve.callee import ServedGraph

    llm = LLM(model=model, dtype=DTYPE, distributed_executor_backend="uni", **{**ENGINE, **arguments})
    call = ServedGraph.__call__

    def named(self: ServedGraph, *operands: Any) -> Any:
        with torch.profiler.record_function("flagtree graph"):
            return call(self, *operands)

    settings = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    found = {}
    for batch in BATCHES:
        prompts = [prompt(k) for k in range(batch)]
        times = []
        for _ in range(4):
            started = time.perf_counter()
            llm.generate(prompts, settings, use_tqdm=False)
            times.append((time.perf_counter() - started) / TOKENS * 1e3)
        ServedGraph.__call__ = named  # type: ignore[method-assign]
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            llm.generate(prompts, settings, use_tqdm=False)
        ServedGraph.__call__ = call  # type: ignore[method-assign]
        spent = {e.key: e.self_cpu_time_total / TOKENS / 1e3 for e in profiled.key_averages()}
        parts = {part: sum(t for name, t in spent.items() if any(text in name for text in texts)) for part, texts in PARTS.items()}
        found[str(batch)] = {"step": statistics.median(times[1:]), **parts, "other operators": sum(spent.values()) - sum(parts.values())}
    return found


# -- in the parent ---------------------------------------------------------------------------------------------------
def campaign(state: Path, asked: Mapping[str, Any], starts: int) -> None:
    """So many starts of each contender, alternating; those that stand in the state already are left out."""
    place = state / FILE
    for number in range(len(read(place)) // len(CONTENDERS), starts):
        for name, (start, first) in CONTENDERS.items():
            job, out = state / "split.job.json", state / "split.json"
            job.write_text(json.dumps({"model": str(state / "model"), "arguments": {"skip_tokenizer_init": True, **asked[start]}}))
            alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
            with (state / "split.log").open("w") as log:
                given = environment(state, cache_of(state, (first,)), start) | alone
                subprocess.run([sys.executable, __file__, str(job), str(out)], env=given, stdout=log, stderr=log, check=True)
            record = {"name": name, "start": number, "parts": json.loads(out.read_text())}
            with place.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"start {number + 1} of {starts}: {name} {record['parts']}", flush=True)


def told(state: Path) -> list[str]:
    """Paragraphs of the page; none where nothing was measured."""
    found = read(state / FILE)
    return [] if not found else [
        f"Where the time of a decoding step goes: milliseconds, {len(found) // len(CONTENDERS)} starts of each, alternating, medians, in "
        f"brackets the range; both on huge pages (`{PAGES}`), the engine in one process, one thread, under torch's profiler (`step`: "
        "without).  Products and attention are the same operators of vLLM for both; what a compiler answers for is `generated`, its "
        "kernels and all it does around calls.",
        _table(found),
    ]  # fmt: skip


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for batch in map(str, BATCHES):
        for part in found[0]["parts"][batch]:
            values = {name: sorted(r["parts"][batch][part] for r in found if r["name"] == name) for name in CONTENDERS}
            middles = {name: statistics.median(times) for name, times in values.items()}
            cells = [f"{middles[name]:.2f} ({times[0]:.2f} to {times[-1]:.2f})" for name, times in values.items()]
            lines.append([batch, part, *cells, f"{middles['flagtree'] / middles['inductor']:.2f}"])
    return rows(["batch", "part", *CONTENDERS, "flagtree by inductor"], lines)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(split(**json.loads(Path(sys.argv[1]).read_text()))))
