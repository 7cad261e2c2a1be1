"""Run time of one Qwen3 decoder layer on the CPU: flagtree beside eager and Inductor, in one process a case.

    python benchmarks/layer.py [--repeats 9] [--only bf16-1024-decode] [--steps] [--out benchmarks/results/layer.md]

What a user runs: transformers' Qwen3DecoderLayer with a StaticCache under torch.compile, one thread.  Prefill fills an empty cache
of 128 rows; decode writes row 511 of 512 and attends to all of them under the mask that transformers makes.  Thread CPU seconds, the
three rotate from round to round, medians are reported.  `--steps` shows where flagtree's own time goes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, CONTEXT = 128, 512
WAYS = ("eager", "inductor", "flagtree")
TYPES = ("bf16", "fp32")
WIDTHS = (1024, 4096)
SHORTEST = 0.02  # seconds that one sample lasts at least: several calls where one is shorter

Case = tuple[str, int, str, int]  # element type, width, prefill or decode, batch


def cases() -> list[Case]:
    return [(t, w, p, b) for t in TYPES for w in WIDTHS for p in ("prefill", "decode") for b in (1, 8)]


def label(case: Case) -> str:
    return "-".join(map(str, case))


# -- one case, in its own process --------------------------------------------------------------------------------------
def layer_call(case: Case) -> tuple[Callable[[Callable[..., Any]], Any], Any]:
    """(a function that calls a layer once, the layer): seeded weights and inputs."""
    import torch
    import transformers
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

    kind, width, phase, batch = case
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=1, num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512), head_dim=128, attn_implementation="sdpa", dtype=dtype,
    )  # fmt: skip
    layer = Qwen3DecoderLayer(config, 0).to(dtype).eval()
    tokens, rows = (PROMPT, PROMPT) if phase == "prefill" else (1, CONTEXT)
    cache = transformers.StaticCache(config, max_cache_len=rows)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, dtype, torch.device("cpu"))
    for kept in (cache.layers[0].keys, cache.layers[0].values):
        kept.normal_()
    hidden = torch.randn(batch, tokens, width).to(dtype)
    places = torch.arange(rows - tokens, rows)[None].expand(batch, -1)
    rotary = Qwen3RotaryEmbedding(config)(hidden, places)
    mask = None if phase == "prefill" else torch.ones(batch, 1, 1, rows, dtype=torch.bool)
    filled = cache.layers[0].cumulative_length

    def call(run: Callable[..., Any]) -> Any:
        filled.fill_(rows - tokens)
        return run(hidden, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, position_embeddings=rotary)

    return call, layer


def measure(case: Case, repeats: int, steps: bool) -> dict[str, Any]:
    """Median thread CPU seconds a call by way, and the largest difference from eager; with `steps`, seconds by kind of step."""
    import torch

    from flagtree.runtime.compile import backend as flagtree_backend  # the registered one, also where the package is not installed

    torch.set_num_threads(1)
    call, layer = layer_call(case)
    ways: dict[str, Callable[..., Any]] = {"eager": layer}
    with torch.no_grad():
        want = call(layer).float()
        errors = {}
        for way in WAYS[1:]:
            ways[way] = torch.compile(layer, backend=flagtree_backend if way == "flagtree" else way)
            errors[way] = (call(ways[way]).float() - want).abs().max().item() / want.abs().max().item()
            call(ways[way])
        started = time.thread_time()
        call(layer)
        calls = max(1, math.ceil(SHORTEST / (time.thread_time() - started)))
        spent: dict[str, list[float]] = {way: [] for way in WAYS}
        for k in range(repeats):
            for way in (*WAYS[k % 3 :], *WAYS[: k % 3]):
                started = time.thread_time()
                for _ in range(calls):
                    call(ways[way])
                spent[way].append((time.thread_time() - started) / calls)
        seconds = {way: statistics.median(values) for way, values in spent.items()}
        found = {"seconds": seconds, "spread": {w: [min(v), max(v)] for w, v in spent.items()}, "errors": errors, "calls": calls}
        if steps:
            found["steps"] = step_seconds(lambda: call(ways["flagtree"]), calls * repeats)
    return found


def step_seconds(call: Callable[[], Any], calls: int) -> list[tuple[str, float]]:
    """CPU seconds a call of each step of flagtree's launch list, and of everything around them."""
    import gc

    from flagtree.runtime.frame import Frame

    frame = max((o for o in gc.get_objects() if type(o) is Frame), key=lambda f: len(f.steps))
    spent = [0.0] * len(frame.steps)

    def timed(k: int, step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            started = time.thread_time()
            step()
            spent[k] += time.thread_time() - started

        return run

    plain = list(frame.steps)
    frame.steps[:] = [timed(k, step) for k, step in enumerate(plain)]
    started = time.thread_time()
    for _ in range(calls):
        call()
    whole = time.thread_time() - started
    frame.steps[:] = plain
    names = [_named(step) for step in frame.prepared.steps]
    return [*((n, s / calls) for n, s in zip(names, spent, strict=True)), ("around", (whole - sum(spent)) / calls)]


def _named(step: Any) -> str:
    called = getattr(step, "step", None)
    return type(step).__name__ if called is None else f"{called.callee} {called.name}"


# -- all cases ---------------------------------------------------------------------------------------------------------
def run_case(case: Case, repeats: int, steps: bool, home: str) -> dict[str, Any]:
    """A fresh process; raises CalledProcessError when it fails."""
    env = {**os.environ, "FLAGTREE_CACHE_DIR": f"{home}/flagtree", "TORCHINDUCTOR_CACHE_DIR": f"{home}/inductor", "OMP_NUM_THREADS": "1",
           "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, __file__, "--case", label(case), "--repeats", str(repeats), *(["--steps"] if steps else [])]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[Case, dict[str, Any]], repeats: int) -> str:
    """Markdown: milliseconds and the ratio to Inductor, which should be at most 1.05, and 0.95 in the geometric mean."""
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    lines = [
        "# One Qwen3 decoder layer on the CPU", "",
        f"* {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, {platform.machine()}, {versions}",
        f"* one thread; median thread CPU milliseconds of {repeats} rounds, eager, Inductor and flagtree in one process, order rotated",
        f"* prefill: {PROMPT} tokens a sequence; decode: one token at context {CONTEXT}, static cache",
        f"* load average at the end {os.getloadavg()[0]:.1f}",
        "* difference: largest, to eager's result, as a share of its largest element", "",
        "| type | width | phase | batch | eager | Inductor | flagtree | flagtree / Inductor | flagtree / eager | difference, Inductor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case, one in found.items():
        s, e = one["seconds"], one["errors"]
        times = " | ".join(f"{1e3 * s[way]:.2f}" for way in WAYS)
        ratios = f"{s['flagtree'] / s['inductor']:.2f} | {s['flagtree'] / s['eager']:.2f}"
        lines.append(f"| {' | '.join(map(str, case))} | {times} | {ratios} | {e['flagtree']:.1e}, {e['inductor']:.1e} |")
    ratios_of = [one["seconds"]["flagtree"] / one["seconds"]["inductor"] for one in found.values()]
    mean = math.exp(statistics.fmean(map(math.log, ratios_of)))
    return "\n".join([*lines, "", f"Geometric mean {mean:.3f}, largest {max(ratios_of):.2f}. Made by `python benchmarks/layer.py`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose label contains this, such as bf16-1024 or decode")
    parser.add_argument("--steps", action="store_true", help="where flagtree's time goes, step by step")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = next(c for c in cases() if label(c) == options.case)
        print(json.dumps(measure(case, options.repeats, options.steps)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for case in (c for c in cases() if options.only in label(c)):
            found[case] = run_case(case, options.repeats, options.steps, home)
            s = found[case]["seconds"]
            print(label(case), *(f"{w} {1e3 * v:.3f}" for w, v in s.items()), f"ratio {s['flagtree'] / s['inductor']:.3f}", flush=True)
            for name, seconds in found[case].get("steps", ()):
                print(f"    {1e3 * seconds:8.3f} ms  {name}")
    text = table(found, options.repeats)
    print(text)
    if options.out:
        options.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
