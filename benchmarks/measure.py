"""Measuring for the benchmarks: contenders side by side in one process, rotated, in CPU seconds; conditions, tables and plots.

A number is the median of several samples; a sample is so many calls that the clock's grain does not show, and the contender that
goes first changes from sample to sample.  The copy of as many bytes runs among the contenders: the physical limit under equal conditions.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.004
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median sample, the least and the greatest."""

    median: float
    low: float
    high: float


def rotated(
    contenders: Mapping[str, Call], repeats: int = 7, clock: Callable[[], float] = time.thread_time, sample: float = SAMPLE_SECONDS
) -> dict[str, Timing]:
    """Seconds a call of each contender by `clock` (`time.thread_time` for one thread, `time.perf_counter` for several), warm."""
    counts = {name: _calls_per_sample(call, clock, sample) for name, call in contenders.items()}
    names = list(contenders)
    found: dict[str, list[float]] = {name: [] for name in names}
    for k in range(repeats):
        turn = k % len(names)
        for name in (*names[turn:], *names[:turn]):
            found[name].append(_sample(contenders[name], counts[name], clock))
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in found.items()}


def _sample(call: Call, count: int, clock: Callable[[], float]) -> float:
    call()  # what another contender left in the caches is not this one's
    started = clock()
    for _ in range(count):
        call()
    return (clock() - started) / count


def _calls_per_sample(call: Call, clock: Callable[[], float], sample: float) -> int:
    call()
    count, spent = 1, _sample(call, 1, clock)
    while spent * count < sample / 4:
        count *= 4
        spent = _sample(call, count, clock)
    return max(1, round(sample / spent))


def copier(size: int) -> Call:
    """A copy that moves `size` bytes in all, half of them read and half written."""
    import torch

    source = torch.zeros(max(1, size // 2), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def keep_memory() -> None:
    """glibc keeps freed blocks of any size, for all contenders alike: else a call that returns a large tensor is mostly page faults,
    which every allocator of a real server avoids.  Elsewhere nothing changes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is not given back


def ratio(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


# -- reports ---------------------------------------------------------------------------------------------------------
def rows(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    ruled = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in ruled)


def conditions() -> str:
    """Date, commit, machine, load and versions as a Markdown list."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    present = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers") if name in present}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    changed = subprocess.run(["git", "status", "--porcelain", "flagtree"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    load = os.getloadavg()[0]
    return "\n".join([
        f"* {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, commit {commit}{' with changes' if changed else ''}",
        f"* {os.cpu_count()} cores, {model}; load average at the start {load:.1f}; where it is above 0 other work shared the machine",
        f"* Python {platform.python_version()}, {', '.join(f'{n} {v}' for n, v in versions.items())}",
    ])  # fmt: skip


def write(path: Path, text: str, data: Any) -> None:
    """The report `path` (Markdown) and, beside it, its numbers as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Panel:
    """One picture: `series` maps a contender to a value a label (None: not measured); `limit` is the physical limit a label."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    limit: Sequence[float]


COLOURS = {"eager": "#9a9a9a", "inductor": "#d1812a", "flagtree": "#2166ac", "bundle": "#4393c3"}


def plot(path: Path, title: str, unit: str, panels: Sequence[Panel], limit: str = "copy", columns: int = 3) -> None:
    """Panels of grouped bars, three in a row, the physical limit as a black line over each group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in panels if panel.labels]  # of a partial run
    height = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(4.6 * columns, 2.6 * height + 1), squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes.flat, strict=False):
        width = 0.8 / len(panel.series)
        for k, (name, values) in enumerate(panel.series.items()):
            places = [x - 0.4 + (k + 0.5) * width for x in range(len(values))]
            axis.bar(places, [math.nan if v is None else v for v in values], width, label=name, color=COLOURS.get(name))
        left, right = ([x + side for x in range(len(panel.labels))] for side in (-0.45, 0.45))
        axis.hlines(panel.limit, left, right, color="black", linewidth=1.4, label=limit)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xticks(range(len(panel.labels)), panel.labels, rotation=45, ha="right", fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel(unit, fontsize=8)
    legend = {name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    wide = min(len(legend), 2 * columns)
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=wide, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
