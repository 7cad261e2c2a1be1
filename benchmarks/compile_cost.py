"""What a compile costs: CPU seconds of `flagtree compile` per target, cold and warm, and by depth of the model.

Each line is one run in processes of its own with an empty home and store; CPU seconds are the command's and its children's.
usage: python benchmarks/compile_cost.py main_job | depth | for_vllm  (a table in Markdown on stdout; the results lie in
benchmarks/results/; for_vllm needs the extra `vllm`)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import ROOT, conditions, rows

TARGETS = ("cpu", "metax", "cuda:sm90", "cuda:sm80", "rocm:gfx942")
DEPTHS = (4, 36, 144)
SERVED = (
    ("qwen3", 4), ("qwen3", 36), ("qwen3", 144), ("qwen3", 36, "1,2"), ("minimax-m2", 4), ("minimax-m2", 62), ("step3_text", 8),
    ("step3_text", 61),
)  # fmt: skip  # model, layers, degrees of tensor parallelism
SUPPLIED = ("minimax-m2",)  # whose routing vLLM's CPU build lacks: tests/serve/supplied.py


@dataclass(frozen=True)
class Run:
    """`cpu` and `wall` in seconds, `memory` (the largest process) in MB."""

    cpu: float
    wall: float
    memory: float
    bundle: dict[str, Any]


def compile_in(home: Path, *arguments: str, path: Sequence[Path] = (ROOT,)) -> Run:
    """`flagtree compile ARGUMENTS --json` with its home and store below `home`; Python looks in `path`."""
    used, out = _used(home, [sys.executable, "-m", "flagtree", "compile", *arguments, "--json"], path)
    (bundle,) = json.loads(out)["bundles"]
    return Run(*used, bundle)


def _used(home: Path, command: Sequence[str], path: Sequence[Path]) -> tuple[tuple[float, float, float], bytes]:
    """CPU and wall seconds, MB of the largest process, and stdout.  SystemExit when the command fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGTREE_", "TRITON_"))}
    environment = {**clean, "HOME": str(home), "FLAGTREE_CACHE_DIR": str(home / "store"), "PYTHONPATH": os.pathsep.join(map(str, path))}
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        running = subprocess.Popen(command, env=environment, cwd=home, stdout=out, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        if running.returncode:
            raise SystemExit(f"exit code {running.returncode}: {' '.join(command)}")
        out.seek(0)
        return (used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024), out.read()


def main_job() -> str:
    """One target at a time, cold from an empty home, then warm from a new process."""
    lines = []
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as home:
            cold, warm = (compile_in(Path(home), "qwen3", "--target", target) for _ in range(2))
        parts = {part["name"]: part for part in cold.bundle["parts"]}
        assert not cold.bundle["cached"]
        assert warm.bundle["cached"]
        lines.append([
            target, f"{cold.cpu:.1f}", f"{cold.wall:.1f}", f"{warm.cpu:.2f}", f"{warm.wall:.2f}", f"{cold.memory:.0f}",
            cold.bundle["kernels"], ", ".join(cold.bundle["tiers"]),
            *(layer(parts[name]) for name in ("prefill", "decode")),
        ])  # fmt: skip
    header = ("target", "cold, CPU s", "cold, wall s", "warm, CPU s", "warm, wall s", "memory, MB", "kernels", "tier",
              "a prefill layer: launches; MB before and after", "a decode layer")  # fmt: skip
    return rows(header, lines)


def layer(part: dict[str, Any]) -> str:
    """Launches and bytes of one decoder layer."""
    return f"{part['launches_per_layer']}; {part['bytes_before_per_layer'] / 1e6:.1f} to {part['bytes_after_per_layer'] / 1e6:.1f}"


def depth() -> str:
    """The same model with more layers: the work is that of the layers traced, only the launch lists grow."""
    lines = []
    for layers in DEPTHS:
        with tempfile.TemporaryDirectory() as home:
            cold = compile_in(Path(home), "qwen3", "--target", "cpu", "--layers", str(layers))
            size = sum(p.stat().st_size for p in Path(cold.bundle["path"]).glob("launch/*.json"))
        calls = " and ".join(str(part["launches_total"] + part["totals"]["calls_extern"]) for part in cold.bundle["parts"])
        lines.append([layers, f"{cold.cpu:.1f}", f"{cold.memory:.0f}", cold.bundle["kernels"], calls, f"{size / 1e3:.0f}"])
    header = ("layers", "cold, CPU s", "memory, MB", "distinct kernels", "launches of a prefill and a decode", "launch lists, kB")
    return rows(header, lines)


def for_vllm() -> str:
    """Captured from vLLM's own model class at true widths into an empty store, then compiled from there."""
    lines = []
    for name, layers, *degrees in SERVED:
        with tempfile.TemporaryDirectory() as home:
            path = (ROOT, *(_supplied(Path(home)) if name in SUPPLIED else ()))
            degrees, model = degrees or ["1"], _text_of_step3(Path(home)) if name == "step3_text" else name
            capture = f"capture_ahead(server_model({model!r}, layers={layers}), [{degrees[0]}])"
            command = [sys.executable, "-c", f"from flagtree.capture.ahead import capture_ahead, server_model; {capture}"]
            (cpu, _, memory), _ = _used(Path(home), command, path)
            built = compile_in(Path(home), model, "--for", "vllm", "--layers", str(layers), "--tp", degrees[0], path=path)
        assert not built.bundle["cached"]
        parts = built.bundle["parts"]
        calls = " and ".join(str(part["launches_total"] + part["totals"]["calls_extern"]) for part in parts)
        lines.append([name, layers, *degrees, f"{cpu:.1f}", f"{memory:.0f}", f"{built.cpu:.1f}", f"{built.memory:.0f}",
                      built.bundle["kernels"], calls])  # fmt: skip
        print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
    header = ("model", "layers", "tensor parallel", "capture, CPU s", "memory, MB", "the rest, CPU s", "memory, MB",
              "distinct kernels", "launches of a graph")  # fmt: skip
    return rows(header, lines)


def _text_of_step3(home: Path) -> str:
    """Its decoder as a model of its own: the one that sees needs torchvision, of which there is no build for the CPU."""
    from flagtree.capture.model_spec import load_spec

    text = {**load_spec("step3").config["text_config"], "architectures": ["Step3TextForCausalLM"], "dtype": "bfloat16"}
    (home / "config.json").write_text(json.dumps(text))
    return str(home / "config.json")


def _supplied(home: Path) -> tuple[Path]:
    """A folder by which vLLM loads, as a plug-in, what the tests supply where its CPU build lacks it."""
    described = home / "supplied" / "test_bed-1.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: test-bed\nVersion: 1\n")
    (described / "entry_points.txt").write_text("[vllm.general_plugins]\ntest_bed = tests.serve.supplied:supply\n")
    return (described.parent,)


TABLES = {"main_job": ("The main job: `flagtree compile qwen3 --target T`, Qwen3-8B at full size", main_job),
          "depth": ("Compile cost by depth: `flagtree compile qwen3 --target cpu --layers N`", depth),
          "for_vllm": ("The graphs that vLLM asks for, ahead: `flagtree compile MODEL --for vllm --layers N`", for_vllm)}  # fmt: skip


def main(names: Sequence[str]) -> None:
    for name in names or ("depth", "main_job"):
        title, table = TABLES[name]
        facts = conditions()
        print(f"# {title}\n\n{facts}\n\n{table()}\n\nMade by `python benchmarks/compile_cost.py {name}`.")


if __name__ == "__main__":
    main(sys.argv[1:])
