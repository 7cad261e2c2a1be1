"""What a start of vLLM costs, and how fast it then answers (serve_tokens.py): eager, with Inductor, and from a bundle.

    python benchmarks/serve.py --out benchmarks/results/serve.md        # the whole campaign, page and plot: 5 rounds at 4 and 36 layers
    python benchmarks/serve.py --layers 4 --repeats 1 --sets 1          # one round and one set: 400 CPU s, 6 minutes on two idle cores
    python benchmarks/serve.py --repeats 0 --out ...                    # nothing more is measured: the page of what was

Needs the extras `vllm` and, for the plot, `bench`.  Each run is a fresh server process with vLLM's own layout of processes; the contender
that goes first changes from round to round, medians are reported.  A run that stands in STATE/LAYERS/runs.jsonl is not repeated: a
campaign goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, Panel, conditions, plot, rows, write

SIZES: dict[int, dict[str, Any]] = {  # by depth
    4: {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    36: {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
}
VOCABULARY, DTYPE = 1024, "bfloat16"
# starts that follow one another in one cache of vLLM's; the first finds it empty
SERIES = (
    ("eager none",), ("eager held",), ("eager default",), ("inductor cold", "inductor warm", "inductor held"),
    ("flagtree first", "flagtree second"),
)  # fmt: skip
# as `flagtree serve` starts vLLM: its garbage collector waits while it imports, large blocks lie on huge pages
LAUNCHED = ("eager held", "inductor held", "flagtree first", "flagtree second")
PAGES = "GLIBC_TUNABLES"
HELD = "SERVE_HELD"  # set in a child's environment
if os.environ.get(HELD):  # at import: vLLM's processes import this module again before anything else
    from flagtree.serve import collector

    collector.hold()
STARTS = tuple(start for starts in SERIES for start in starts)
ENGINE = {"max_model_len": 512, "max_num_seqs": 32, "max_num_batched_tokens": 512, "seed": 0, "disable_log_stats": True,
          "enable_prefix_caching": False, "worker_extension_cls": "flagtree.serve.worker.Report"}  # fmt: skip


# -- in the child ----------------------------------------------------------------------------------------------------
def family(root: int) -> dict[int, int]:
    """A process and its living descendants: CPU clock ticks of each and of its children that have ended (proc_pid_stat(5), fields 4 and 14
    to 17), parents first."""
    parents, used = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        parents[int(entry.name)] = int(fields[1])
        used[int(entry.name)] = sum(map(int, fields[11:15]))
    found = {root: used.get(root, 0)}
    while more := {pid: used[pid] for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return found


def tree_seconds(root: int) -> float:
    """CPU seconds of a process and its descendants."""
    return sum(family(root).values()) / os.sysconf("SC_CLK_TCK")


def serve(model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One server: CPU seconds of its processes until the first answer, and counts."""
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype=DTYPE, **{**ENGINE, **arguments})
    ready = time.perf_counter() - started
    first = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    answer = llm.generate([prompt(0)], SamplingParams(**first), use_tqdm=False)[0].outputs[0]
    record: dict[str, Any] = {"cpu": tree_seconds(os.getpid()), "ready": ready, "ids": list(answer.token_ids)}
    llm.generate([prompt(0)], SamplingParams(**first, logprobs=1), use_tqdm=False)  # vLLM compiles a helper of its own for it
    record["cpu logprobs"] = tree_seconds(os.getpid())
    (report,) = llm.collective_rpc("flagtree_report")
    record["dynamo graphs"] = report["dynamo"].get("stats", {}).get("unique_graphs", 0)
    record["inductor kernels"] = report["inductor_kernels"]
    record["flagtree"] = {k: v for k, v in report["flagtree"].items() if isinstance(v, int)}
    return record


def prompt(number: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [(7 * number + 13 * k) % 500 + 2 for k in range(16)]}


# -- in the parent ---------------------------------------------------------------------------------------------------
def prepare(state: Path, layers: int) -> dict[str, Any]:
    """A random checkpoint, and the bundle of the graph that a recording start writes down; how each start is asked for."""
    model = state / "model"
    if not (model / "config.json").exists():
        import torch
        import transformers

        torch.manual_seed(0)
        sizes = SIZES[layers]
        config = transformers.Qwen3Config(**sizes, num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=False,
                                          max_position_embeddings=2048, initializer_range=1.9 / sizes["hidden_size"] ** 0.5)  # fmt: skip
        transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    compilation = {"mode": 2, "custom_ops": ["none"]}
    bundle = state / "bundles" / "graphs-cpu"
    if not bundle.exists():
        settings = {"strict": "off", "record": str(state / "graphs.jsonl")}
        recording = {**compilation, "backend": "flagtree.serve.bundles.store"}
        lenient = {"compilation_config": recording, "additional_config": {"flagtree": settings}}
        run(state, "recording", lenient, state / "caches" / "recording")
        command = [sys.executable, "-m", "flagtree", "compile", "--graphs", str(state / "graphs.jsonl"), "--target", "cpu"]
        subprocess.run([*command, "-o", str(bundle.parent)], cwd=ROOT, env=environment(state, state / "caches"), check=True)
    from flagtree.artifact.bundle import open_bundle

    name = f"flagtree.serve.bundles.d_{open_bundle(bundle).digest}"
    strict = {"bundle": str(bundle), "strict": "serve"}
    flagtree = {"compilation_config": {**compilation, "backend": name}, "additional_config": {"flagtree": strict}}
    eager = {"enforce_eager": True}
    none = {**eager, "compilation_config": {"custom_ops": ["none"]}}
    return {"eager none": none, "eager held": none, "eager default": eager, "inductor cold": {}, "inductor warm": {},
            "inductor held": {}, "flagtree first": flagtree, "flagtree second": flagtree}  # fmt: skip


def environment(state: Path, cache: Path, start: str = "") -> dict[str, str]:
    """Of a start.  Compilers are counted where Inductor and flagtree look for them; what vLLM knows of its model classes is there
    for everybody, since finding it out costs 8 CPU s once a machine."""
    counting = state / "cxx"
    if not counting.exists():
        counting.write_text(f'#!/bin/sh\necho run >> {state}/cxx.log\nexec {shutil.which("g++")} "$@"\n')
        counting.chmod(0o755)
    (state / "modelinfos").mkdir(exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "modelinfos").exists():
        (cache / "modelinfos").symlink_to(state / "modelinfos")
    from flagtree.cli.serve import ENVIRONMENT

    own = {HELD: "1", PAGES: ENVIRONMENT[PAGES]} if start in LAUNCHED else {}
    own |= ENVIRONMENT if "flagtree" in start else {}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGTREE_", "TORCHINDUCTOR_", "VLLM_", PAGES))}
    return {**clean, "VLLM_CACHE_ROOT": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "CXX": str(counting),
            "FLAGTREE_CACHE_DIR": str(state / "store"), "FLAGTREE_CXX": str(counting), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": str(ROOT),
            **own}  # fmt: skip


def run(state: Path, name: str, arguments: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """One start; CalledProcessError when it fails."""
    log = state / "cxx.log"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    job, out = state / "job.json", state / "run.json"
    job.write_text(json.dumps({"model": str(state / "model"), "arguments": {"skip_tokenizer_init": True, **arguments}}))
    load = os.getloadavg()[0]
    with (state / f"{name.replace(' ', '_')}.log").open("w") as told:
        command = [sys.executable, __file__, "--child", str(job), str(out)]
        subprocess.run(command, env=environment(state, cache, name), stdout=told, stderr=told, check=True)
    after = len(log.read_text().splitlines()) if log.exists() else 0
    return {"start": name, "compilers": after - before, "load": load, **json.loads(out.read_text())}


def cache_of(state: Path, starts: Sequence[str]) -> Path:
    """vLLM's cache of a series of starts."""
    return state / "caches" / starts[0].replace(" ", "_")


def campaign(state: Path, layers: int, repeats: int) -> None:
    """Every start `repeats` times; what stands in the state already is left out."""
    state.mkdir(parents=True, exist_ok=True)
    asked = prepare(state, layers)
    place = state / "runs.jsonl"
    known = read(place)
    if not (state / "conditions.md").exists():
        (state / "conditions.md").write_text(conditions())
    for k in range(repeats):
        turn = k % len(SERIES)
        for starts in (*SERIES[turn:], *SERIES[:turn]):
            if all(sum(r["start"] == s for r in known) > k for s in starts):
                continue
            cache = cache_of(state, starts)
            shutil.rmtree(cache, ignore_errors=True)
            found = [run(state, start, asked[start], cache) for start in starts]
            known += found
            with place.open("a") as file:
                file.writelines(json.dumps({"layers": layers, **record}) + "\n" for record in found)
            print(f"round {k + 1}: " + "; ".join(f"{r['start']} {r['cpu']:.1f} CPU s" for r in found), flush=True)


def read(place: Path) -> list[dict[str, Any]]:
    """What was measured, a record a line."""
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


# -- the page --------------------------------------------------------------------------------------------------------
def medians(found: Sequence[Mapping[str, Any]], start: str, value: str) -> list[float]:
    return [float(r[value]) for r in found if r["start"] == start]


def _middle(found: Sequence[Mapping[str, Any]], start: str, value: str) -> float | None:
    values = medians(found, start, value)
    return statistics.median(values) if values else None


def _shown(value: float | None, digits: int = 1) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def starts_table(found: Sequence[Mapping[str, Any]]) -> str:
    """CPU seconds and counts, a line a start."""
    base = _middle(found, "eager none", "cpu")
    lines = []
    for start in STARTS:
        values = medians(found, start, "cpu")
        if not values:
            continue
        middle = statistics.median(values)
        share = f"{middle / base:.2f}" if base else ""
        counts = [f"{_middle(found, start, name):.0f}" for name in ("compilers", "dynamo graphs", "inductor kernels")]
        span = f"{min(values):.1f} to {max(values):.1f}"
        more = _shown(_middle(found, start, "cpu logprobs"))
        lines.append([start, f"{middle:.1f}", span, share, more, *counts, _shown(_middle(found, start, "ready")), len(values)])
    header = ["start", "CPU s", "range", "by eager none", "CPU s with log-probabilities", "C++ compilers run", "Dynamo graphs",
              "Inductor kernels", "wall s until ready", "runs"]  # fmt: skip
    return rows(header, lines)


def same_ids(found: Sequence[Mapping[str, Any]]) -> str:
    """Which starts gave the first answer of eager with `custom_ops` none."""
    want = next((r["ids"] for r in found if r["start"] == "eager none"), None)
    equal = [start for start in STARTS if (own := [r["ids"] for r in found if r["start"] == start]) and all(ids == want for ids in own)]
    return f"The first answer, 16 greedy tokens, is that of `eager none` in every run of: {', '.join(equal)}."


def page(states: Sequence[Path]) -> tuple[str, dict[str, Any], list[Panel]]:
    """The page in Markdown, its numbers, and the panels of its plot."""
    import serve_split
    import serve_tokens

    told, data, panels = ["# Starts of vLLM and tokens a second"], {}, []
    for state in states:
        found = read(state / "runs.jsonl")
        layers = found[0]["layers"]
        sizes = ", ".join(f"{k} {v}" for k, v in SIZES[layers].items())
        load = statistics.median(float(r["load"]) for r in found)
        told += [
            f"## Qwen3 with {layers} layers",
            f"{(state / 'conditions.md').read_text()}\n* {sizes}; {DTYPE}\n"
            "* vLLM's own layout: three processes, one OpenMP thread in the worker\n"
            f"* fresh processes, order rotated, medians; load average before a run, median {load:.1f}",
            "CPU seconds of all processes until the first answer, and until the first with log-probabilities, for which vLLM compiles a "
            "helper of its own where it may.  Imports are most of it.  The counts include both.  flagtree starts as `flagtree "
            "serve` starts vLLM: its garbage collector waits while it imports, and large blocks of memory lie on huge pages. `held` are "
            "`eager none` and `inductor warm` started so.",
            starts_table(found),
            same_ids(found),
            *serve_tokens.told(state),
            *serve_split.told(state),
        ]
        data[str(layers)] = {"starts": found, "tokens": read(state / serve_tokens.FILE), "split": read(state / serve_split.FILE)}
        labels = [s for s in STARTS if medians(found, s, "cpu")]
        none = [0.0] * len(labels)
        cpu = [_middle(found, s, "cpu") for s in labels]
        panels.append(Panel(f"{layers} layers: CPU s of a start", labels, {"all processes": cpu}, none))
        panels += serve_tokens.panel(state, layers)
    return "\n\n".join([*told, "Made by `python benchmarks/serve.py`.\n"]), data, panels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sets", type=int, default=4, help="of servers side by side")
    parser.add_argument("--layers", type=int, nargs="+", default=sorted(SIZES), choices=sorted(SIZES))
    parser.add_argument("--state", type=Path, default=Path("serve_state"), help="where checkpoints, bundles, caches and results lie")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job = json.loads(Path(options.child[0]).read_text())
        Path(options.child[1]).write_text(json.dumps(serve(**job)))
        return
    import serve_split  # it imports this module
    import serve_tokens

    if options.out:
        import matplotlib  # noqa: F401  # said now, not after an hour
    states = {layers: options.state.absolute() / str(layers) for layers in options.layers}
    for layers, state in states.items() if options.repeats else ():
        campaign(state, layers, options.repeats)
        serve_tokens.campaign(state, prepare(state, layers), options.sets)
        serve_split.campaign(state, prepare(state, layers), options.sets)
    text, data, panels = page([state for state in states.values() if read(state / "runs.jsonl")])
    print(text)
    if options.out:
        write(options.out, text, data)
        plot(options.out.with_suffix(".png"), "vLLM: starts and speed", "", panels, limit="", columns=2)


if __name__ == "__main__":
    main()
