"""Run time of one Qwen3 decoder layer on the CPU: flagtree beside eager and Inductor, in one process a case.

    python benchmarks/layer.py [--repeats 7] [--only bf16-1024-decode] [--steps] [--out benchmarks/results/layer.md]

What a user runs: transformers' Qwen3DecoderLayer with a StaticCache under torch.compile, one thread.  Prefill fills an empty cache
of 128 rows; decode writes row 511 of 512 and attends to all of them under the mask that transformers makes.  Thread CPU seconds by
measure.py; a copy of as many bytes as weights and cache runs among them.  `--steps` shows where flagtree's own time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

PROMPT, CONTEXT = 128, 512
WAYS = ("eager", "inductor", "flagtree")
TYPES = ("bf16", "fp32")
WIDTHS = (1024, 4096)
SAMPLE_SECONDS = 0.02

Case = tuple[str, int, str, int]  # element type, width, prefill or decode, batch


def cases() -> list[Case]:
    return [(t, w, p, b) for t in TYPES for w in WIDTHS for p in ("prefill", "decode") for b in (1, 8)]


def label(case: Case) -> str:
    return "-".join(map(str, case))


# -- one case, in its own process --------------------------------------------------------------------------------------
def layer_call(case: Case) -> tuple[Callable[[Callable[..., Any]], Any], Any, int]:
    """(a function that calls a layer once, the layer, bytes of its weights and cache): seeded weights and inputs."""
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

    moved = sum(p.numel() * p.element_size() for p in layer.parameters()) + 2 * cache.layers[0].keys.numel() * dtype.itemsize
    return call, layer, moved


def measured(case: Case, repeats: int, steps: bool) -> dict[str, Any]:
    """Seconds a call by way: median, least, greatest; the largest difference from eager; with `steps`, seconds by step."""
    import torch

    from flagtree.runtime.compile import backend as flagtree_backend  # the registered one, also where the package is not installed

    torch.set_num_threads(1)
    call, layer, moved = layer_call(case)
    ways: dict[str, Callable[..., Any]] = {"eager": layer}
    with torch.no_grad():
        want = call(layer).float()
        errors = {}
        for way in WAYS[1:]:
            ways[way] = torch.compile(layer, backend=flagtree_backend if way == "flagtree" else way)
            errors[way] = (call(ways[way]).float() - want).abs().max().item() / want.abs().max().item()
        contenders: dict[str, measure.Call] = {way: lambda run=run: call(run) for way, run in ways.items()}  # type: ignore[misc]
        times = measure.rotated(contenders | {"copy": measure.copier(moved)}, repeats, sample=SAMPLE_SECONDS)
        found: dict[str, Any] = {"seconds": {w: [t.median, t.low, t.high] for w, t in times.items()}, "errors": errors, "bytes": moved}
        if steps:
            found["steps"] = step_seconds(contenders["flagtree"], repeats * max(1, round(SAMPLE_SECONDS / times["flagtree"].median)))
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


def report(found: dict[Case, dict[str, Any]], repeats: int) -> str:
    """Markdown: milliseconds and the ratio to Inductor, which should be at most 1.05, and 0.95 in the geometric mean."""
    lines, ratios = [], []
    for case, one in found.items():
        s, e = {way: times[0] for way, times in one["seconds"].items()}, one["errors"]
        ratios.append(s["flagtree"] / s["inductor"])
        spread = f"{1e3 * one['seconds']['flagtree'][1]:.2f} to {1e3 * one['seconds']['flagtree'][2]:.2f}"
        lines.append([*case, *(f"{1e3 * s[way]:.2f}" for way in WAYS), spread, f"{ratios[-1]:.2f}", f"{s['flagtree'] / s['eager']:.2f}",
                      f"{1e3 * s['copy']:.2f}", f"{e['flagtree']:.1e}, {e['inductor']:.1e}"])  # fmt: skip
    header = ("type", "width", "phase", "batch", *WAYS, "flagtree, range", "flagtree / inductor", "flagtree / eager", "copy", "difference")
    return "\n".join([
        "# One Qwen3 decoder layer on the CPU", "", measure.conditions(),
        f"* one thread; median thread CPU milliseconds of {repeats} samples, all in one process, order rotated",
        f"* prefill: {PROMPT} tokens a sequence into an empty static cache; decode: one token at context {CONTEXT}, static cache",
        "* copy: as many bytes as weights and cache, read and written",
        "* difference: flagtree's and Inductor's largest to eager's result, as a share of its largest element",
        "", measure.rows(header, lines), "",
        f"Geometric mean of flagtree / inductor {measure.ratio(ratios):.3f}, largest {max(ratios):.2f}.", "",
        "Made by `python benchmarks/layer.py`.", "",
    ])  # fmt: skip


def picture(path: Path, found: dict[Case, dict[str, Any]]) -> None:
    panels = []
    for kind in TYPES:
        for phase in ("prefill", "decode"):
            mine = {c: found[c]["seconds"] for c in found if (c[0], c[2]) == (kind, phase)}
            series = {way: [1e3 * s[way][0] for s in mine.values()] for way in WAYS}
            labels = [f"{c[1]} wide, batch {c[3]}" for c in mine]
            panels.append(measure.Panel(f"{kind} {phase}", labels, series, [1e3 * s["copy"][0] for s in mine.values()]))
    measure.plot(path, "One Qwen3 decoder layer, one thread", "CPU ms", panels, "copy of weights and cache", columns=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose label contains this, such as bf16-1024 or decode")
    parser.add_argument("--steps", action="store_true", help="where flagtree's time goes, step by step")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        sys.path.insert(0, str(measure.ROOT))
        case = next(c for c in cases() if label(c) == options.case)
        print(json.dumps(measured(case, options.repeats, options.steps)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for case in (c for c in cases() if options.only in label(c)):
            found[case] = run_case(case, options.repeats, options.steps, home)
            s = {way: times[0] for way, times in found[case]["seconds"].items()}
            print(label(case), *(f"{w} {1e3 * v:.3f}" for w, v in s.items()), f"ratio {s['flagtree'] / s['inductor']:.3f}", flush=True)
            for name, seconds in found[case].get("steps", ()):
                print(f"    {1e3 * seconds:8.3f} ms  {name}")
    text = report(found, options.repeats)
    print(text)
    if options.out:
        measure.write(options.out, text, {label(case): one for case, one in found.items()})
        picture(options.out.with_suffix(".png"), found)


if __name__ == "__main__":
    main()
