"""What flagtree did in this process since it started: graphs found and missing, kernels, externs, compilations.

Counted, never estimated; each rank counts for itself.  `report` is what the log line and `serve/worker.py` show.
"""

from __future__ import annotations

import logging
import resource
import sys
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Counts:
    """`doors`: what we took over, by door.  `graphs_found`: answered from a bundle; `graphs_missing`: not; `graphs_compiled`: built by
    us at start, which needs `strict` off.  `kernels`: distinct generated kernels of the graphs; `launches` and `externs`: of one run of
    each.  `operators`: vLLM's single operators that we replaced, by name, with the number of instances; `aside`: what we left to
    others, with the reason.  `compilations`: what torch compiled in this process after the first of our graphs ran, whoever asked."""

    doors: dict[str, str] = field(default_factory=dict)
    graphs_found: int = 0
    graphs_missing: int = 0
    graphs_compiled: int = 0
    loaded_warm: int = 0
    kernels: int = 0
    launches: int = 0
    externs: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)
    aside: dict[str, str] = field(default_factory=dict)
    compilations: int = 0

    def took_over(self, door: str, what: str) -> None:
        """Say once, in the log of this process, what a door of ours answers."""
        if self.doors.get(door) != what:
            self.doors[door] = what
            logger().info("flagtree: %s: %s", door, what)

    def stepped_aside(self, name: str, why: str) -> None:
        """Say once what is left to others, and why."""
        if self.aside.get(name) != why:
            self.aside[name] = why
            logger().info("flagtree: %s is left alone: %s", name, why)

    def add_graph(self, summary: dict[str, Any], kernels: int) -> None:
        """A graph that runs from a bundle: `summary` as of `artifact.bundle.summarise`."""
        self.kernels += kernels
        self.launches += summary["launches"]
        for extern in summary["externs"]:
            self.externs[extern["callee"]] = self.externs.get(extern["callee"], 0) + extern["count"]


COUNTS = Counts()
COMPILER = ("capture", "ir", "lower", "passes", "codegen", "toolchain")


def report() -> dict[str, Any]:
    """Plain JSON data about this process: our counts, what torch and vLLM compiled, and what was imported."""
    modules = sys.modules
    metrics = modules.get("torch._inductor.metrics")
    dynamo = modules.get("torch._dynamo.utils")
    counter = getattr(modules.get("vllm.compilation.counter"), "compilation_counter", None)
    used = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "flagtree": asdict(COUNTS),
        "compiler_imported": sorted(m for m in modules if m.startswith("flagtree.") and m.split(".")[1] in COMPILER),
        "dynamo": {k: {str(n): int(v) for n, v in c.items()} for k, c in dynamo.counters.items() if c} if dynamo else {},
        "inductor_kernels": getattr(metrics, "generated_kernel_count", 0),
        "vllm": {k: v for k, v in vars(counter).items() if isinstance(v, int)} if counter is not None else {},
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "child_cpu_seconds": round(children.ru_utime + children.ru_stime, 2),
    }


def logger() -> logging.Logger:
    """Where a server's log goes: below vLLM's own logger, which has a handler and a level, in its processes."""
    return logging.getLogger("vllm.flagtree" if "vllm" in sys.modules else "flagtree")


def line() -> str:
    """The log line at start."""
    c = COUNTS
    externs = sum(c.externs.values())
    graphs = f"{c.graphs_found} graphs found, {c.graphs_missing} missing, {c.graphs_compiled} compiled, {c.compilations} since the start"
    return f"{graphs}; {c.kernels} kernels in {c.launches} launches, {externs} externs; {sum(c.operators.values())} operators replaced"
