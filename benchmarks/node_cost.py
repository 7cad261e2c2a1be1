"""What a compile costs by the number of ATen nodes: CPU seconds of graphs of five shapes, 1 000 to 16 000 nodes each.

    python benchmarks/node_cost.py [--repeats 3] [--sizes 1000 4000 16000] [--dynamo] [--out benchmarks/results/node_cost.md]

Each point is the median of fresh processes, sizes rotated.  Without --dynamo: from the FX graph to kernels' source and launch list
(normalise, lower, passes with verification after each, code generation), g++ left out.  With it: the first call under `torch.compile`,
split into Dynamo, ourselves and g++ (the children's time).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, conditions, rows, write

Shape = tuple[Callable[..., Any], list[tuple[int, ...]]]
ROW, MATRIX = (8, 64), (64, 64)


def chain(nodes: int) -> Shape:
    """Pointwise, each value read twice: fans out and never ends before the bound of one kernel."""

    def run(a: Any, b: Any) -> Any:
        for _ in range(nodes // 2):
            a = a + b
            b = b * 0.5
        return a, b

    return run, [ROW, ROW]


def norms(nodes: int) -> Shape:
    """Independent norm blocks."""

    def run(*inputs: Any) -> Any:
        return tuple(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * 1.5 for x in inputs)

    return run, [ROW] * (nodes // 6)


def deep(nodes: int) -> Shape:
    """Norm, gated products and residual, each layer of a width of its own: no layer equals another."""

    def run(x: Any, *weights: Any) -> Any:
        for gate, up, down in zip(weights[::3], weights[1::3], weights[2::3], strict=True):
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            linear = torch.nn.functional.linear
            x = x + linear(torch.nn.functional.silu(linear(h, gate)) * linear(h, up), down)
        return x

    widths = [65 + k for k in range(nodes // 11)]
    return run, [ROW, *(s for w in widths for s in ((w, 64), (w, 64), (64, w)))]


def wide(nodes: int) -> Shape:
    """One input is read by half of all nodes."""

    def run(x: Any) -> Any:
        return tuple((x * float(k)).sum(-1) for k in range(nodes // 2))

    return run, [ROW]


def in_place(nodes: int) -> Shape:
    """Updates of one state, whole and by rows."""

    def run(state: Any, rows_: Any) -> Any:
        for k in range(nodes // 4):
            state.mul_(0.5)
            state[k % 64].add_(rows_[k % 8])
        return state + 1

    return run, [MATRIX, ROW]


SHAPES: dict[str, Callable[[int], Shape]] = {f.__name__: f for f in (chain, norms, deep, wide, in_place)}


# -- in the child ----------------------------------------------------------------------------------------------------
def graph(shape: str, nodes: int) -> torch.fx.GraphModule:
    """The FX graph as Dynamo would hand it over, without Dynamo."""
    run, sizes = SHAPES[shape](nodes)
    out, mode = torch.fx.Graph(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    tracer = torch.fx.proxy.GraphAppendingTracer(out)
    inputs = []
    for k, size in enumerate(sizes):
        node = out.placeholder(f"x{k}")
        node.meta["example_value"] = mode.from_tensor(torch.empty(size))
        inputs.append(torch.fx.Proxy(node, tracer))
    results = run(*inputs)
    out.output(tuple(r.node for r in (results if isinstance(results, tuple) else (results,))))
    return torch.fx.GraphModule(torch.nn.Module(), out)


def alone(shape: str, nodes: int) -> dict[str, float]:
    """CPU seconds of ours from the FX graph to the launch list."""
    from flagtree.capture.normalise import normalise
    from flagtree.codegen.cpp import generate
    from flagtree.codegen.launch import launch_list
    from flagtree.ir.canonical import digest, isolate_all
    from flagtree.lower.decompositions import DECOMPOSITIONS
    from flagtree.lower.lowering import lower, lowers
    from flagtree.passes.pipeline import pipeline, run_pipeline
    from flagtree.targets import find_target

    module, target = graph(shape, nodes), find_target("cpu")
    started = time.process_time()
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    normal = normalise(module, [n.name for n in given], [n.meta["example_value"] for n in given], lowers, DECOMPOSITIONS)
    program, _ = run_pipeline(lower(normal.graph, shape, {}).program, pipeline(target), target)
    isolated = {kernel.name: (one, digest(one.program)) for kernel, one in isolate_all(program)}
    for source in {d: one.program for one, d in isolated.values()}.items():
        generate(source[1], source[0])
    launch_list(program, isolated)
    seconds = time.process_time() - started
    count = sum(n.op == "call_function" for n in normal.graph.nodes)
    return {"nodes": count, "ours": seconds}


def dynamo(shape: str, nodes: int) -> dict[str, float]:
    """CPU seconds of the first call under `torch.compile`: Dynamo, ours, and g++ as the children's."""
    from flagtree.runtime.compile import backend

    run, sizes = SHAPES[shape](nodes)
    inputs = [torch.randn(size) for size in sizes]
    within = [0.0, 0.0]

    def spent() -> tuple[float, float]:
        own, others = (sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own, others

    def timed(module: Any, values: Any) -> Any:
        before = spent()
        result = backend(module, values)
        within[:] = [w + now - then for w, now, then in zip(within, spent(), before, strict=True)]
        within.append(sum(n.op.startswith("call") for n in module.graph.nodes))
        return result

    before = spent()
    with torch.no_grad():
        torch.compile(run, backend=timed)(*inputs)
    whole = spent()[0] - before[0]
    return {"nodes": sum(within[2:]), "ours": within[0], "dynamo": whole - within[0], "g++": within[1]}


# -- in the parent ---------------------------------------------------------------------------------------------------
def start(kind: str, shape: str, nodes: int) -> dict[str, float]:
    """One point, in a fresh process with an empty store."""
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "HOME": home, "FLAGTREE_CACHE_DIR": f"{home}/store", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--child", kind, shape, str(nodes)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


Points = dict[str, dict[int, dict[str, float]]]


def measure(kind: str, sizes: Sequence[int], repeats: int, shapes: Sequence[str]) -> Points:
    """Medians by shape and asked size."""
    out: Points = {}
    for shape in shapes:
        found: dict[int, list[dict[str, float]]] = {n: [] for n in sizes}
        for k in range(repeats):
            for nodes in (*sizes[k % len(sizes) :], *sizes[: k % len(sizes)]):
                found[nodes].append(start(kind, shape, nodes))
        out[shape] = {n: {key: statistics.median(p[key] for p in points) for key in points[0]} for n, points in found.items()}
    return out


def table(points: Points) -> str:
    """For each shape and size: seconds, and the time of a node against that in the smallest graph."""
    lines = []
    for shape, by_size in points.items():
        least = next(iter(by_size.values()))
        for point in by_size.values():
            growth = point["ours"] / point["nodes"] / (least["ours"] / least["nodes"])
            others = [f"{point[key]:.1f}" for key in ("dynamo", "g++") if key in point]
            cells = [f"{point['ours']:.2f}", f"{point['ours'] / point['nodes'] * 1e6:.0f}", f"{growth:.2f}", *others]
            lines.append([shape.replace("_", " "), f"{point['nodes']:.0f}", *cells])
    more = [key for key in ("Dynamo, CPU s", "g++, CPU s") if any(len(line) > 5 for line in lines)]
    return rows(("graph", "nodes", "ours, CPU s", "us a node", "against the first", *more), lines)


def draw(path: Path, points: Points) -> None:
    """Microseconds a node over the number of nodes, one line a shape; flat is linear."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for shape, by_size in points.items():
        axis.plot([p["nodes"] for p in by_size.values()], [p["ours"] / p["nodes"] * 1e6 for p in by_size.values()], "o-", label=shape)
    axis.set(xscale="log", xlabel="ATen nodes", ylabel="CPU microseconds a node", title="Compile cost, g++ and Dynamo left out")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def report(kind: str, points: Points, repeats: int) -> str:
    """The page in Markdown."""
    what = "the first call under `torch.compile`" if kind == "dynamo" else "from the FX graph to source and launch list"
    shapes: Mapping[str, str] = {name: (f.__doc__ or "").rstrip(".") for name, f in SHAPES.items()}
    legend = "\n".join(f"* {name.replace('_', ' ')}: {shapes[name]}" for name in points)
    facts = f"{conditions()}\n* {what}; one thread, CPU seconds, median of {repeats} fresh processes with an empty store"
    made = "Made by `python benchmarks/node_cost.py" + (" --dynamo`." if kind == "dynamo" else "`.")
    return f"# Compile cost by the number of ATen nodes\n\n{facts}\n\n{legend}\n\n{table(points)}\n\n{made}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dynamo", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        kind, shape, nodes = options.child
        print(json.dumps({"alone": alone, "dynamo": dynamo}[kind](shape, int(nodes))))
        return
    kind = "dynamo" if options.dynamo else "alone"
    points = measure(kind, options.sizes, options.repeats, options.shapes)
    text = report(kind, points, options.repeats)
    print(text)
    if options.out:
        write(options.out, text, points)
        draw(options.out.with_suffix(".png"), points)


if __name__ == "__main__":
    main()
