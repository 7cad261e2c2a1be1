"""Cold and warm start of `torch.compile` on a small Qwen3: flagtree beside Inductor and eager, in one run.

    python benchmarks/start_up.py [--repeats 7] [--out benchmarks/results/start_up.md]

Each start is a fresh process with one thread; cold has empty caches.  CPU seconds count from after `import torch, transformers` and the
model's construction to the end of the first call, children included.  Order rotates from repeat to repeat; medians are reported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, os, resource, sys
import torch, transformers
torch.set_num_threads(1)
torch.manual_seed(0)
config = transformers.Qwen3Config(vocab_size=1000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=512, tie_word_embeddings=False)
model = transformers.Qwen3ForCausalLM(config).eval()
ids = torch.randint(0, 1000, (1, 64))
def spent():
    return sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
with torch.no_grad():
    want = model(ids, use_cache=False).logits
    before = spent()
    call = model if sys.argv[1] == "eager" else torch.compile(model, backend=sys.argv[1])
    have = call(ids, use_cache=False).logits
    first = spent() - before
    error = (have - want).abs().max().item()
print(json.dumps({"seconds": first, "error": error}))
"""


def start(backend: str, home: Path) -> dict[str, float]:
    """One fresh process; raises CalledProcessError when it fails."""
    env = {**os.environ, "HOME": str(home), "FLAGTREE_CACHE_DIR": str(home / "flagtree"), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
           "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CHILD, backend], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(repeats: int) -> dict[tuple[str, str], list[float]]:
    """CPU seconds by (backend, cold or warm)."""
    backends = ["eager", "flagtree", "inductor"]
    found: dict[tuple[str, str], list[float]] = {}
    for k in range(repeats):
        for backend in (*backends[k % 3 :], *backends[: k % 3]):
            home = Path(tempfile.mkdtemp())
            try:
                for state in ("cold", "warm"):
                    result = start(backend, home)
                    assert result["error"] < 1e-3, (backend, result)
                    found.setdefault((backend, state), []).append(result["seconds"])
            finally:
                shutil.rmtree(home)
    return found


def table(found: dict[tuple[str, str], list[float]], repeats: int) -> str:
    """Markdown: medians, ranges and ratios to Inductor."""
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    lines = [
        "# First call of a 4-layer, 1024-wide Qwen3 under torch.compile", "",
        f"* {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, {platform.machine()}, {versions}",
        f"* one thread; median of {repeats} fresh processes, order rotated; load average at the end {os.getloadavg()[0]:.1f}",
        "* CPU seconds, children included, from the built model to the end of the first call", "",
        "| | cold | range | Inductor / this | warm | range | Inductor / this |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for backend in ("eager", "flagtree", "inductor"):
        cells = [backend]
        for state in ("cold", "warm"):
            values, other = found[backend, state], statistics.median(found["inductor", state])
            middle = statistics.median(values)
            cells += [f"{middle:.2f}", f"{min(values):.2f} to {max(values):.2f}", f"{other / middle:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Made by `python benchmarks/start_up.py`.", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = table(measure(options.repeats), options.repeats)
    print(text)
    if options.out:
        options.out.write_text(text, "utf-8")
