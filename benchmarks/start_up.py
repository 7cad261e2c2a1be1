"""Cold and warm start of a small Qwen3: `torch.compile` with flagtree, with Inductor and eager, and a bundle that is loaded and called.

    python benchmarks/start_up.py [--repeats 7] [--out benchmarks/results/start_up.md]

Each number is CPU seconds of one thread, children included, in a fresh process.  `cold` has empty caches, `warm` those of the process
before; the order of the contenders rotates from repeat to repeat, medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, Panel, conditions, plot, rows, write

SIZES = {"vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": False}  # fmt: skip
TOKENS = 64
COMPILERS = ("eager", "flagtree", "inductor")
SERVED = ("eager", "inductor", "bundle")
Found = dict[tuple[str, str], list[float]]


def spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


# -- in the child ----------------------------------------------------------------------------------------------------
def compiled(model: Any, compiler: str) -> tuple[Any, list[float]]:
    """The model under one compiler, and where the CPU seconds of the compiler itself gather: Inductor's behind AOTAutograd; flagtree
    traces by itself, so all of its own.  flagtree's backend is imported here, as its entry point does where it is installed."""
    import torch

    own = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = spent()
            try:
                return function(*args, **kwargs)
            finally:
                own[0] += spent() - before

        return run

    if compiler == "eager":
        return model, own
    if compiler == "flagtree":
        from flagtree.runtime.compile import backend

        return torch.compile(model, backend=timed(backend)), own
    from torch._inductor import compile_fx

    compile_fx._compile_fx_inner = timed(compile_fx._compile_fx_inner)
    return torch.compile(model, backend="inductor"), own


def first_call(compiler: str) -> dict[str, float]:
    """From the built model to the end of the first call."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval()
    ids = torch.randint(0, SIZES["vocab_size"], (1, TOKENS))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        before = spent()
        call, own = compiled(model, compiler)
        have = call(ids, use_cache=False).logits
        return {"all": spent() - before, "own": own[0], "error": (have - want).abs().max().item()}


def answer(server: str, folder: str) -> dict[str, float]:
    """From `import torch` to the first logits, weights read from a file: `weights` is the part until they are there."""
    import torch

    torch.set_num_threads(1)
    before = spent()
    import safetensors.torch

    ids = torch.arange(TOKENS).reshape(1, TOKENS)
    weights = safetensors.torch.load_file(Path(folder, "weights.safetensors"))
    if server == "bundle":
        import flagtree

        bundle = flagtree.load(Path(folder, "bundle.ftb"), trust=Path(folder, "digest").read_text())
        part = bundle.parts["prefill"]
        read = spent()
        kinds = [f"{kind}_cache.{layer}" for kind in "kv" for layer in range(SIZES["num_hidden_layers"])]
        caches = {name: torch.zeros(1, SIZES["num_key_value_heads"], TOKENS, SIZES["head_dim"]) for name in kinds}
        (logits,) = part({**weights, **caches, "ids": ids, "start": torch.tensor([0]), "last": torch.tensor([TOKENS - 1])}).values()
    else:
        import transformers

        with torch.device("meta"):
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval()
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its table is no weight
        model.load_state_dict(weights, assign=True)
        read = spent()
        with torch.no_grad():
            call, _ = compiled(model, server)
            logits = call(ids, use_cache=False).logits[:, -1]
    seconds = spent() - before
    want = safetensors.torch.load_file(Path(folder, "want.safetensors"))["logits"]
    return {"all": seconds, "weights": read - before, "error": (logits - want).abs().max().item()}


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {"first_call": first_call, "answer": answer}


# -- in the parent ---------------------------------------------------------------------------------------------------
def start(home: Path, what: str, *arguments: str) -> dict[str, float]:
    """One fresh process; raises CalledProcessError when it fails, AssertionError for wrong logits."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGTREE_", "TORCHINDUCTOR_"))}
    env = {**clean, "HOME": str(home), "FLAGTREE_CACHE_DIR": str(home / "flagtree"), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
           "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, __file__, "--child", what, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("error", 0.0) < 1e-3, (what, arguments, found)
    print(what, arguments[0], *(f"{name} {seconds:.2f}" for name, seconds in found.items()), file=sys.stderr, flush=True)
    return found


def rotate(names: Sequence[str], k: int) -> Sequence[str]:
    return (*names[k % len(names) :], *names[: k % len(names)])


def measure_first_calls(repeats: int) -> Found:
    """CPU seconds by (compiler, "cold all", "cold own", "warm all" or "warm own")."""
    found: Found = {}
    for k in range(repeats):
        for compiler in rotate(COMPILERS, k):
            home = Path(tempfile.mkdtemp())
            try:
                for state in ("cold", "warm"):
                    for name, seconds in start(home, "first_call", compiler).items():
                        found.setdefault((compiler, f"{state} {name}"), []).append(seconds)
            finally:
                shutil.rmtree(home)
    return found


def measure_answers(repeats: int) -> Found:
    """CPU seconds by (server, all or weights); every cache is warm."""
    found: Found = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        _prepare(home)
        for server in SERVED:
            start(home, "answer", server, name)
        for k in range(repeats):
            for server in rotate(SERVED, k):
                for part, seconds in start(home, "answer", server, name).items():
                    found.setdefault((server, part), []).append(seconds)
    return found


def _prepare(folder: Path) -> None:
    """Weights, what eager makes of them, and the bundle of the same configuration, built by `flagtree compile`."""
    import safetensors.torch
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES)
    model = transformers.Qwen3ForCausalLM(config).eval()
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    with torch.no_grad():
        logits = model(torch.arange(TOKENS).reshape(1, TOKENS), use_cache=False).logits[:, -1]
    safetensors.torch.save_file({"logits": logits.contiguous()}, folder / "want.safetensors")
    text = json.dumps({**config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": "float32"})
    (folder / "config.json").write_text(text, "utf-8")
    command = [sys.executable, "-m", "flagtree", "compile", str(folder / "config.json"), "--target", "cpu", "--part", "prefill", "--json"]
    env = {**os.environ, "FLAGTREE_CACHE_DIR": str(folder / "flagtree"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--out", str(folder / "bundle.ftb")], env=env, capture_output=True, text=True, check=True)
    (folder / "digest").write_text(json.loads(done.stdout)["bundles"][0]["digest"])


def _cells(values: Sequence[float], other: Sequence[float]) -> list[str]:
    middle = statistics.median(values)
    base = statistics.median(other)
    return [f"{middle:.2f}", f"{min(values):.2f} to {max(values):.2f}", f"{base / middle:.1f}" if base and middle else ""]


def _table(found: Mapping[tuple[str, str], list[float]], names: Sequence[str], columns: Mapping[str, str]) -> str:
    """One line a contender; for each column its median, range and Inductor's median over it."""
    header = ["", *(cell for title in columns.values() for cell in (title, "range", "Inductor / this"))]
    return rows(header, [[n, *(c for key in columns for c in _cells(found[n, key], found["inductor", key]))] for n in names])


def _reached(calls: Found, answers: Found) -> str:
    """The goals of issue 4 beside what was measured: medians, Inductor's over ours."""

    def gain(found: Found, key: str, ours: str = "flagtree") -> float:
        return statistics.median(found["inductor", key]) / statistics.median(found[ours, key])

    return "\n".join([
        f"* cold, in all: **{gain(calls, 'cold all'):.1f}** times less than Inductor (goal 5); "
        f"the compiler's own share **{gain(calls, 'cold own'):.1f}** times less (or goal 12)",
        f"* warm, in all: **{gain(calls, 'warm all'):.1f}** times less (goal: below Inductor's)",
        f"* a bundle loaded and called: **{gain(answers, 'all', 'bundle'):.1f}** times less than Inductor's warm start (goal 5)",
    ])  # fmt: skip


def picture(calls: Found, answers: Found, path: Path) -> None:
    """Beside each start what no compiler behind Dynamo or loader can save: Dynamo's tracing, the reading of the weights."""

    def middle(found: Found, name: str, key: str) -> float | None:
        return statistics.median(found[name, key]) if (name, key) in found else None

    panels = []
    for state in ("cold", "warm"):
        keys = [f"{state} all", f"{state} own"]
        series = {name: [None if name == "eager" and "own" in key else middle(calls, name, key) for key in keys] for name in COMPILERS}
        traced = (middle(calls, "flagtree", keys[0]) or 0.0) - (middle(calls, "flagtree", keys[1]) or 0.0)
        panels.append(Panel(f"torch.compile, {state}", ["first call in all", "compiler's own share"], series, [traced, 0.0]))
    weights = middle(answers, "bundle", "weights") or 0.0
    labels = ["to the first logits", "of it until weights are there"]
    series = {name: [middle(answers, name, key) for key in ("all", "weights")] for name in SERVED}
    panels.append(Panel("from `import torch`, caches warm", labels, series, [weights, weights]))
    plot(path, "Start of a 4-layer, 1024-wide Qwen3: less is better", "CPU seconds", panels, "Dynamo's tracing; reading the weights")


def report(calls: Found, answers: Found, repeats: int) -> str:
    """The page in Markdown."""
    sizes = ", ".join(f"{k} {v}" for k, v in SIZES.items())
    return "\n\n".join([
        "# Start of a 4-layer, 1024-wide Qwen3",
        f"{conditions()}\n* one thread; median of {repeats} fresh processes, order rotated; CPU seconds, children included\n"
        f"* {sizes}; float32; {TOKENS} tokens, no cache",
        _reached(calls, answers),
        "## `torch.compile`: from the built model to the end of the first call",
        _table(calls, COMPILERS, {"cold all": "cold", "warm all": "warm"}),
        "## The compiler's own share of it",
        "Inductor's without AOTAutograd; flagtree traces by itself, so all since Dynamo has handed the graph over.  "
        "Warm, flagtree finds its result in its store; Inductor's share is not called at all: AOTAutograd's cache has what it made.",
        _table(calls, COMPILERS[1:], {"cold own": "cold", "warm own": "warm"}),
        "## From `import torch` to the first logits",
        "Every cache warm, weights read from one safetensors file.  `weights`: until the model, or the bundle, and its weights are there.",
        _table(answers, SERVED, {"all": "in all", "weights": "weights"}),
        "Made by `python benchmarks/start_up.py`.\n",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](*options.child[1:])))
        return
    calls, answers = measure_first_calls(options.repeats), measure_answers(options.repeats)
    text = report(calls, answers, options.repeats)
    print(text)
    if options.out:
        data = {"first_call": calls, "answer": answers}
        write(options.out, text, {name: {" ".join(key): v for key, v in found.items()} for name, found in data.items()})
        picture(calls, answers, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
