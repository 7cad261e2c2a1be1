"""Fused kernels on the CPU: flagtree beside Inductor, eager and a copy of as many bytes, in one process.

    python benchmarks/kernels.py [--quick] [--cases rms_norm,softmax] [--dtype bf16] [--rows 1,512] [--widths 1024] [--threads 2]
                                 [--out benchmarks/results/kernels.md]

Two times for each case: `call`, the Python call of the compiled function with Dynamo's guards; and `kernel`, what the guards lead to:
the outputs' allocation and the generated code (Inductor's: the `call` of the module it generated).  Caches are fresh; results are
compared with eager's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure

DTYPES = ("fp32", "bf16")
CONTENDERS = ("flagtree", "inductor", "eager")
ROWS, WIDTHS = (1, 32, 512, 4096), (1024, 1027, 4096)
HEAD = 128  # rotary's; an odd width is made of heads that are not a multiple of a vector


def cases() -> dict[str, tuple[Callable[..., Any], Callable[[int, int, Any], tuple]]]:
    """name -> (what a model does, (rows, width, dtype) -> its inputs)."""
    import torch
    from torch.nn import functional as F

    def one(rows: int, width: int, dtype: Any) -> tuple:
        return (torch.randn(rows, width).to(dtype),)

    def two(rows: int, width: int, dtype: Any) -> tuple:
        return tuple(torch.randn(rows, width).to(dtype) for _ in range(2))

    def weighted(rows: int, width: int, dtype: Any) -> tuple:
        return (*one(rows, width, dtype), (torch.randn(width) * 0.1 + 1).to(dtype))

    def rms_norm(x, w):
        h = x.float()
        return w * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def add_rms_norm(x, r, w):
        s = x + r
        return s, rms_norm(s, w)

    def rotary(x, cos, sin):
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos + turned * sin

    def heads(rows: int, width: int, dtype: Any) -> tuple:
        size = HEAD if width % HEAD == 0 else 114  # 9 * 114 = 1026: the nearest width with an even, unaligned head
        angles = torch.outer(torch.arange(rows).float(), 10000 ** (-torch.arange(size).remainder(size // 2) / (size // 2)))
        return torch.randn(1, rows, width // size, size).to(dtype).transpose(1, 2), *(
            f(angles).to(dtype)[None, None] for f in (torch.cos, torch.sin))  # fmt: skip

    def channels(rows: int, width: int, dtype: Any) -> tuple:
        count = width // 128 if width % 128 == 0 else 13  # 13 * 79 = 1027
        return torch.randn(rows, count, width // count).to(dtype), *((torch.randn(count) * 0.1 + k).to(dtype) for k in (1, 0))

    return {
        "rms_norm": (rms_norm, weighted),
        "add_rms_norm": (add_rms_norm, lambda r, n, d: (*two(r, n, d), weighted(1, n, d)[1])),
        "rotary": (rotary, heads),
        "swiglu": (lambda gate, up: F.silu(gate) * up, two),
        "softmax": (lambda x: torch.softmax(x, -1), one),
        "layer_norm": (lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b), lambda r, n, d: (*weighted(r, n, d), weighted(1, n, d)[1])),
        "group_norm": (lambda x, w, b: F.group_norm(x, x.shape[1] // 4 if x.shape[1] % 4 == 0 else 1, w, b), channels),
        "cumsum": (lambda x: torch.cumsum(x, -1), one),
        "cross_entropy": (lambda x, t: F.cross_entropy(x.float(), t), lambda r, n, d: (*one(r, n, d), torch.randint(0, n, (r,)))),
    }


def compiled(function: Callable[..., Any], args: Sequence[Any], contender: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The compiled function's call on `args`, and the call behind the guards."""
    import torch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    from flagtree.runtime.compile import backend

    inner: list[tuple[Callable[..., Any], list[Any]]] = []

    def flagtree(module: Any, inputs: Any) -> Any:
        callee = backend(module, inputs)

        def first(*given: Any) -> Any:
            inner[:] = [(lambda values: callee(*values), list(given))]
            return callee(*given)

        return first

    def inductor(module: Any, inputs: Any, **options: Any) -> Any:
        def wrapped(*parts: Any, **more: Any) -> Any:
            graph = compile_fx_inner(*parts, **more)
            call = graph.current_callable

            def first(given: list[Any]) -> Any:
                inner[:] = [(call, list(given))]
                graph.current_callable = call
                return call(given)

            graph.current_callable = first
            return graph

        with torch._functorch.config.patch(enable_autograd_cache=False):  # what it keeps goes past the inner compile
            return compile_fx(module, inputs, inner_compile=wrapped)

    def copied() -> Callable[..., Any]:
        """Dynamo keeps what it compiled with the code object: each compiled function has one of its own."""
        return types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)

    torch.compile(copied(), backend={"flagtree": flagtree, "inductor": inductor}[contender], dynamic=False)(*args)
    ((call, given),) = inner  # the compiled function itself is left without what remembers
    whole = torch.compile(copied(), backend={"flagtree": backend, "inductor": "inductor"}[contender], dynamic=False)
    whole(*args)
    return (lambda: whole(*args)), (lambda: call(list(given)))


def traffic(args: Sequence[Any], results: Any) -> int:
    """Bytes that the case has to move: each input once in, each output once out."""
    outputs = results if isinstance(results, tuple) else (results,)
    return sum(t.numel() * t.element_size() for t in (*args, *outputs))


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record a case, type and shape."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    chosen = {name: case for name, case in cases().items() if not options.cases or name in options.cases}
    for width, rows, name, dtype in itertools.product(options.widths, options.rows, chosen, options.dtype):
        function, make = chosen[name]
        args = make(rows, width, torch.float32 if dtype == "fp32" else torch.bfloat16)
        want = function(*args)
        size = traffic(args, want)
        calls: dict[str, Callable[[], Any]] = {"eager call": lambda f=function, a=args: f(*a), "copy": measure.copier(size)}
        torch._dynamo.reset()
        for contender in CONTENDERS[:2]:
            whole, kernel = compiled(function, args, contender)
            tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-3}
            torch.testing.assert_close(whole(), want, **tolerance)
            calls |= {f"{contender} call": whole, f"{contender} kernel": kernel}
        times = measure.rotated(calls, options.repeats, clock, measure.SAMPLE_SECONDS if options.threads == 1 else 0.001)
        yield {"case": name, "dtype": dtype, "rows": rows, "width": width, "bytes": size,
               **{k: [t.median if options.threads == 1 else t.low, t.low, t.high] for k, t in times.items()}}  # fmt: skip


# -- the report --------------------------------------------------------------------------------------------------------
def gain(record: dict[str, Any], level: str) -> float:
    """How many times faster than Inductor."""
    return record[f"inductor {level}"][0] / record[f"flagtree {level}"][0]


def rate(record: dict[str, Any], contender: str) -> float:
    """GB/s of the bytes that have to move."""
    key = {"eager": "eager call", "copy": "copy"}.get(contender, f"{contender} kernel")
    return record["bytes"] / record[key][0] / 1e9


def report(records: Sequence[dict[str, Any]], options: argparse.Namespace, facts: str) -> str:
    """The Markdown page."""
    one = options.threads == 1
    unit = "CPU seconds of one thread; median" if one else f"wall seconds, {options.threads} threads, so of a loaded machine too; the least"
    large, single = [r for r in records if r["rows"] > 1], [r for r in records if r["rows"] == 1]
    lines = [f"# Fused kernels on the CPU, {options.threads} thread{'s' * (options.threads > 1)}", "", facts,
             f"* {unit} of {options.repeats} samples, order rotated, warm; freed memory is kept (`measure.keep_memory`)",
             "* `kernel`: behind Dynamo's guards, outputs allocated; `call`: the compiled function from Python",
             "* ratios are Inductor's time by flagtree's: above 1 flagtree is faster", ""]  # fmt: skip
    summary = []
    for name in dict.fromkeys(r["case"] for r in records):
        line: list[object] = [name]
        for dtype in options.dtype:
            gains = [gain(r, "kernel") for r in large if r["case"] == name and r["dtype"] == dtype]
            calls = [gain(r, "call") for r in single if r["case"] == name and r["dtype"] == dtype]
            line += [f"{of(found):.2f}" if found else "" for found, of in ((gains, measure.ratio), (gains, min), (calls, measure.ratio))]
        summary.append(line)
    header = ["Inductor / flagtree", *(f"{d}: {what}" for d in options.dtype for what in ("kernel, mean", "least", "call at 1 row"))]
    gains = [gain(r, "kernel") for r in large]
    if gains:
        lines += [f"Geometric mean over {len(gains)} kernels of 32 rows and more: **{measure.ratio(gains):.2f}** (goal 1.5); "
                  f"least {min(gains):.2f} (goal 1.0); {sum(g < 1 for g in gains)} below 1.0."]  # fmt: skip
    if single:
        calls = [gain(r, "call") for r in single]
        lines += [f"Geometric mean of the call at 1 row: **{measure.ratio(calls):.2f}**; least {min(calls):.2f} (goal 1.0); "
                  f"{sum(g < 1 for g in calls)} below 1.0."]  # fmt: skip
    lines += ["", measure.rows(header, summary), "", "Times in microseconds; `GB/s` and `copy` count the bytes that must move.", ""]
    detail = []
    for r in records:
        times = {k: f"{v[0] * 1e6:.1f}" for k, v in r.items() if isinstance(v, list)}
        ours, theirs = ([times[f"{c} {level}"] for level in ("kernel", "call")] for c in CONTENDERS[:2])
        detail.append([r["case"], r["dtype"], f"{r['rows']} x {r['width']}", ours[0], theirs[0], f"{gain(r, 'kernel'):.2f}",
                       ours[1], theirs[1], f"{gain(r, 'call'):.2f}", times["eager call"], f"{rate(r, 'flagtree'):.1f}",
                       f"{rate(r, 'copy'):.1f}"])  # fmt: skip
    header = ["case", "type", "rows x width", "kernel", "Inductor", "ratio", "call", "Inductor", "ratio", "eager", "GB/s", "copy"]
    lines += [measure.rows(header, detail), "", f"Made by `python benchmarks/kernels.py{' --threads 2' * (options.threads == 2)}`.", ""]
    return "\n".join(lines)


def pictures(records: Sequence[dict[str, Any]], path: Path, options: argparse.Namespace) -> None:
    """One file a type: bytes that must move by time, beside the copy's."""
    for dtype in options.dtype:
        panels = []
        for name in dict.fromkeys(r["case"] for r in records):
            chosen = [r for r in records if r["case"] == name and r["dtype"] == dtype and r["rows"] > 1]
            series = {c: [rate(r, c) for r in chosen] for c in reversed(CONTENDERS)}
            panels.append(measure.Panel(name, [f"{r['rows']}x{r['width']}" for r in chosen], series, [rate(r, "copy") for r in chosen]))
        if panels and panels[0].labels:
            title = f"Fused kernels in {dtype}, {options.threads} thread{'s' * (options.threads > 1)}: more is better"
            picture = path.with_name(f"{path.stem}_{dtype}.png")
            measure.plot(picture, title, "GB/s of the bytes that must move", panels, "copy (physical limit)")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one width, 1 and 512 rows, three samples")
    parser.add_argument("--cases", type=listed(str), default=[])
    parser.add_argument("--dtype", type=listed(str), default=list(DTYPES))
    parser.add_argument("--rows", type=listed(int), default=list(ROWS))
    parser.add_argument("--widths", type=listed(int), default=list(WIDTHS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--caches", type=Path, help="keep compiled code here from run to run, while working on the generator")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if unknown := [d for d in options.dtype if d not in DTYPES]:
        parser.error(f"unknown type {unknown[0]}: choose from {', '.join(DTYPES)}")
    if options.quick:
        options.rows, options.widths, options.repeats = [1, 512], [1024], 3
    return options


def main(arguments: Sequence[str]) -> None:
    options = parsed(arguments)
    with tempfile.TemporaryDirectory() as fresh:
        home = options.caches or Path(fresh)
        os.environ.update(FLAGTREE_CACHE_DIR=str(home / "flagtree"), TORCHINDUCTOR_CACHE_DIR=str(home / "inductor"),
                          TORCHINDUCTOR_COMPILE_THREADS="1", FLAGTREE_ON_ERROR="raise")  # fmt: skip
        sys.path.insert(0, str(measure.ROOT))
        measure.keep_memory()
        import torch

        if options.cases and (unknown := [c for c in options.cases if c not in cases()]):
            raise SystemExit(f"unknown case {unknown[0]}: choose from {', '.join(cases())}")
        facts, records = measure.conditions(), []
        with torch.no_grad(), contextlib.suppress(KeyboardInterrupt):  # an interrupted run reports what it has
            for record in measured(options):
                records.append(record)
                shape = f"{record['case']:14} {record['dtype']} {record['rows']:5} x {record['width']:5}"
                gains = f"kernel {gain(record, 'kernel'):5.2f}  call {gain(record, 'call'):5.2f}"
                share = f"of copy {rate(record, 'flagtree') / rate(record, 'copy'):5.2f}"
                print(f"{shape}  {gains}  {share}", file=sys.stderr, flush=True)
    order = list(cases())
    records.sort(key=lambda r: (order.index(r["case"]), options.dtype.index(r["dtype"]), r["rows"], r["width"]))
    text = report(records, options, facts)
    print(text)
    if options.out:
        measure.write(options.out, text, records)
        pictures(records, options.out, options)


if __name__ == "__main__":
    main(sys.argv[1:])
