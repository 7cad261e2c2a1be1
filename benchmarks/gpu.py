"""The GPU path, measured on a GPU: one command that writes benchmarks/results/gpu.md and gpu.json.

    python benchmarks/gpu.py [--quick] [--bundles FOLDER] [--out benchmarks/results/gpu.md]

Correctness first (benchmarks/gpu_checks.py), then each kernel of Qwen3-8B beside eager and Inductor in one process: device time by CUDA
graph replay with inputs that do not stay in the cache, the share of a copy's bandwidth measured in the same run, and the time of one
call from Python.  Then the true cost of a launch, and, with --bundles, a bundle that was built elsewhere:

    flagtree compile qwen3 --layers 3 --target cuda:sm90 --target cpu --out FOLDER       (on any machine; no GPU, no weights)

is loaded in a process in which Triton cannot be imported, and its logits are compared with those of the CPU's bundle.  Needs no network.
Without a GPU it says so in one line and exits with 2; `--rehearse` then runs what needs none of a GPU, on the CPU, with tiny sizes: a
rehearsal of this file, whose numbers mean nothing and are written nowhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_checks
import measure

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("eager", "inductor", "flagtree")
TOKENS = (1, 32, 512, 4096)
COLD_BYTES = 512 << 20  # several times the last level cache of any device so far: inputs rotate through as many bytes
REPEATS, CALLS = 9, 2000


class GraphTimer:
    """Device time: calls on rotating inputs are captured into one CUDA graph, whose replays are timed by events."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds a call, one number a replay."""
        import torch

        for call in calls[:2]:
            call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        out = []
        for _ in range(REPEATS + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            out.append(start.elapsed_time(end) / 1000 / len(calls))
        del kept
        return out[2:]


class WallTimer:
    """The rehearsal's: wall seconds of the CPU."""

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        out = []
        for _ in range(3):
            start = time.perf_counter()
            for call in calls:
                call()
            out.append((time.perf_counter() - start) / len(calls))
        return out


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def from_python(call: Callable[[], object], device: Any, count: int) -> float:
    """Wall seconds a call as a program makes it, guards and launch, the device kept busy: the longer of host and device."""
    call()
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait(device)
    return (time.perf_counter() - start) / count


def contender(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    from flagtree.runtime.compile import backend

    return function if name == "eager" else torch.compile(function, backend=backend if name == "flagtree" else name, dynamic=False)


def kernels(device: Any, timer: Any, tokens: Sequence[int], cold: int, count: int) -> list[dict[str, Any]]:
    """One record a case and size: seconds of each contender, device and from Python, and of the copy of as many bytes."""
    import torch

    out = []
    for name, (function, make) in gpu_checks.cases().items():
        for n in tokens:
            torch._dynamo.reset()
            first = make(n, device)
            results = gpu_checks.leaves(function(*first))
            size = sum(t.numel() * t.element_size() for t in (*first, *results))
            sets = [first, *(make(n, device) for _ in range(min(64, cold // size)))]
            source = torch.empty(max(1, size // 2), dtype=torch.uint8, device=device)
            copies = [(source.clone(), source.clone()) for _ in sets]
            calls: dict[str, list[Callable[[], object]]] = {"copy": [lambda a=a, b=b: b.copy_(a) for a, b in copies]}
            whole: dict[str, float] = {}
            for kind in CONTENDERS:
                call = contender(kind, function)
                gpu_checks.equal(call(*first), function(*first), function(*gpu_checks.doubled(first)))
                calls[kind] = [lambda call=call, args=args: call(*args) for args in sets]
                whole[kind] = from_python(calls[kind][0], device, count)
            found = {kind: timer.seconds(c) for kind, c in calls.items()}
            out.append({"case": name, "tokens": n, "bytes": size, "sets": len(sets), "device": found, "call": whole})
            say(f"{name}, {n} tokens: " + ", ".join(f"{k} {1e6 * statistics.median(v):.1f} us" for k, v in found.items()))
    return out


def launch_cost(device: Any, count: int) -> dict[str, float]:
    """Wall seconds of one launch of a kernel that has next to nothing to do, by each route, with the device kept busy."""
    import ctypes

    import torch

    from flagtree.runtime import gpu, launcher, launcher_build
    from flagtree.runtime.launch import Executable

    found: dict[str, float] = {}
    x = torch.zeros(1, gpu_checks.HEAD, device=device)
    callee = compiled_callee(lambda t: t * 2 + 1, x)
    with tempfile.TemporaryDirectory() as folder:
        target = gpu.target_name(device)
        assert target is not None
        here = gpu.find_device(target, device)
        usual = here.route
        routes: dict[str, Any] = {"ctypes": launcher.Interpreted(here.driver.launch_function)}
        built = Path(folder) / "launcher.so"
        problem = launcher_build.build(built)
        if not problem:
            routes["C"] = launcher.Compiled(built, ctypes.cast(here.driver.launch_function, ctypes.c_void_p).value or 0)
        for name, route in routes.items():
            here.route = route
            run = Executable(callee.launch, callee.executable.prepared.library).bind({})
            kept = run([x])  # the launches below write it again
            (frame,) = run._frames.values()
            with here.here():
                found[name] = from_python(frame.steps[-1], device, count)
            del kept
        here.route = usual
    found["torch, y = x * 2"] = from_python(lambda: torch.mul(x, 2, out=x), device, count)
    return found


def compiled_callee(function: Callable[..., Any], *args: Any) -> Any:
    """What torch.compile runs behind its guards."""
    import torch

    from flagtree.runtime.compile import backend

    kept: list[Any] = []

    def keep(module: Any, inputs: Any) -> Any:
        kept.append(backend(module, inputs))
        return kept[0]

    torch._dynamo.reset()
    torch.compile(function, backend=keep, dynamic=False)(*args)
    return kept[0]


# -- a bundle from elsewhere -----------------------------------------------------------------------------------------
CONSUMER = """
import json, re, sys, time
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers"):
            raise ImportError(f"{name} is not for this process")
sys.meta_path.insert(0, NoTriton())
import torch, flagtree
path, digest, kind, out = sys.argv[1:]
device = torch.device(kind)
started = time.perf_counter()
bundle = flagtree.load(path, trust=digest)
loaded = time.perf_counter() - started
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
torch.manual_seed(0)
def made(text, sizes):
    name, shape = re.fullmatch(r"(\\w+)\\[(.*)\\]", text).groups()
    return torch.randn([sizes.get(s) or int(s) for s in shape.split(", ")], dtype=torch.float32).mul_(0.02).to(DTYPES[name])
part = bundle.parts["prefill"]
weights = {n: made(d, {}).to(device) for n, d in sorted(part.weights.items())}
sizes = {"batch": 2, "context": 64}
states = {n: torch.zeros_like(made(d, sizes)).to(device) for n, d in sorted(part.states.items())}
ids = torch.randint(0, 1000, (2, 48)).to(device)
start = torch.zeros(2, dtype=torch.int64, device=device)
(logits,) = part.bind(weights)({"ids": ids, "start": start, "last": start + 47, **states}).values()
step = bundle.parts["decode"].bind(weights)
seconds, all_logits = [], [logits.float().cpu()]
for k in range(12):
    at = start + 48 + k
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    (logits,) = step({"ids": ids[:, :1].contiguous(), "start": at, **states}).values()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
    all_logits.append(logits.float().cpu())
torch.save(torch.stack(all_logits), out)
print(json.dumps({"load": loaded, "decode": sorted(seconds)[len(seconds) // 2], "triton": "triton" in sys.modules}))
"""


def bundles(folder: Path, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Load the bundle of each kind ("cpu", "cuda") in a process of its own; {kind: what it told, "error": …}."""
    import torch

    sys.path.insert(0, str(ROOT))
    from flagtree.artifact.bundle import open_bundle

    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as out:
        for kind, place in kinds.items():
            path = next(p for p in sorted(folder.iterdir()) if open_bundle(p).manifest.target.split(":")[0] == kind)
            digest, result = open_bundle(path).digest, f"{out}/{kind}.pt"
            command = [sys.executable, "-c", CONSUMER, str(path), digest, place, result]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the bundle {path} failed: {done.stderr[-2000:]}")
            told[kind] = json.loads(done.stdout.splitlines()[-1]) | {"bundle": path.name, "digest": digest}
            told[kind]["logits"] = torch.load(result)
    first, *others = (t.pop("logits") for t in told.values())
    scale = first.square().mean().sqrt().item()
    for other in others:
        told["error"] = (first - other).square().mean().sqrt().item() / scale
    return told


# -- the report ------------------------------------------------------------------------------------------------------
def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def report(data: Mapping[str, Any]) -> str:
    """The page."""
    lines = ["# Kernels of Qwen3-8B on a GPU", "", measure.conditions(), f"* {data['device']}", ""]
    lines += ["## Right", "", measure.rows(("claim", "seen"), data["checks"].items()), ""]
    table, ratios = [], []
    for record in data["kernels"]:
        middle = {kind: statistics.median(v) for kind, v in record["device"].items()}
        ratios.append(middle["inductor"] / middle["flagtree"])
        table.append((
            record["case"], record["tokens"], *(us(middle[k]) for k in (*CONTENDERS, "copy")),
            f"{middle['copy'] / middle['flagtree']:.0%}",
            f"{record['bytes'] / middle['copy'] / 1e9:.0f}", f"{ratios[-1]:.2f}", *(us(record["call"][k]) for k in CONTENDERS),
        ))  # fmt: skip
    header = ("kernel", "tokens", *(f"{k}, us" for k in (*CONTENDERS, "copy")), "share of the copy", "copy GB/s", "Inductor / flagtree",
              *(f"call {k}, us" for k in CONTENDERS))  # fmt: skip
    lines += ["## Fast", "", measure.rows(header, table), "", f"Geometric mean of Inductor / flagtree: {measure.ratio(ratios):.2f}.", "",
              "Device times are medians of CUDA graph replays over inputs that rotate through more than the caches hold; `call` is a call",
              "from Python with the device kept busy, so the longer of host and device.", ""]  # fmt: skip
    if data["launch"]:
        lines += ["## One launch", "", measure.rows(("route", "us"), ((k, us(v)) for k, v in data["launch"].items())), ""]
    if data["bundles"]:
        told = data["bundles"]
        both = [told["cpu"], told["cuda"]]
        seen = f"differ by {told['error']:.2e} of their root mean square; Triton was imported: {told['cuda']['triton']}."
        table = [(t["bundle"], f"{t['load']:.2f}", f"{1e3 * t['decode']:.2f}") for t in both]
        lines += ["## A bundle from elsewhere", "", f"Logits of two bundles of one model with the same random weights {seen}", ""]
        lines += [measure.rows(("bundle", "load, s", "decode step, ms"), table), ""]
    return "\n".join([*lines, "Made by `python benchmarks/gpu.py`.", ""])


def run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        say("benchmarks/gpu.py needs a GPU that torch can use, and there is none here; nothing was measured")
        return 2
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    checks = {}
    for name, check in gpu_checks.CHECKS.items():
        if options.rehearse and name not in gpu_checks.REHEARSED:
            continue
        checks[name] = check(device)
        say(f"{name}: {checks[name]}")
    if options.rehearse:
        records, launch, told = kernels(device, WallTimer(), (3,), 1, 1), {}, None
        described = "a rehearsal on the CPU: no number here means anything"
    else:
        tokens, count = (TOKENS[:2], CALLS // 10) if options.quick else (TOKENS, CALLS)
        records = kernels(device, GraphTimer(device), tokens, COLD_BYTES, count)
        launch = launch_cost(device, count)
        told = bundles(options.bundles, {"cpu": "cpu", "cuda": "cuda"}) if options.bundles else None
        described = f"{torch.cuda.get_device_name(device)}, driver and runtime CUDA {torch.version.cuda}"
    data = {"device": described, "checks": checks, "kernels": records, "launch": launch, "bundles": told}
    text = report(data)
    print(text)
    if not options.rehearse:
        measure.write(options.out, text, data)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes, fewer calls")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without a GPU: what this file can do there; writes nothing")
    parser.add_argument("--bundles", type=Path, metavar="FOLDER", help="a folder with a bundle for the CPU and one for this GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.md")
    raise SystemExit(run(parser.parse_args()))
