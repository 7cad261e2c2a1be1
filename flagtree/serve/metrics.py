"""The counts of this process as Prometheus gauges in the registry that vLLM's `/metrics` answers from.

One gauge a count, labelled with the rank.  The registry is the process's own; the counts of workers in other processes reach the server
through the files of PROMETHEUS_MULTIPROC_DIR, where that is set before the start, and by RPC in any case (serve/worker.py).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from flagtree.serve.counts import COUNTS, Counts

GAUGES: dict[str, tuple[str, Callable[[Counts], int]]] = {
    "flagtree_graphs_found": ("Graphs and operators answered from a bundle", lambda c: c.graphs_found),
    "flagtree_graphs_missing": ("Graphs and operators that no bundle had", lambda c: c.graphs_missing),
    "flagtree_graphs_compiled": ("Graphs and operators built at the start", lambda c: c.graphs_compiled),
    "flagtree_kernels": ("Distinct generated kernels of the graphs", lambda c: c.kernels),
    "flagtree_launches": ("Generated kernels launched in one run of each graph", lambda c: c.launches),
    "flagtree_externs": ("Calls to libraries in one run of each graph", lambda c: sum(c.externs.values())),
    "flagtree_operators_replaced": ("Single operators of the server that kernels answer for", lambda c: sum(c.operators.values())),
    "flagtree_compilations_since_start": ("What torch compiled after the model first ran", lambda c: c.compilations),
}


def publish() -> None:
    """Set every gauge to what is counted now.  Does nothing outside of vLLM; imports its client at the first count, never earlier, since
    vLLM decides before that whether several processes share one registry."""
    if "vllm" not in sys.modules:
        return
    rank = str(torch.distributed.get_rank()) if torch.distributed.is_available() and torch.distributed.is_initialized() else "0"
    for name, gauge in _gauges().items():
        gauge.labels(rank=rank).set(GAUGES[name][1](COUNTS))


@functools.cache
def _gauges() -> dict[str, Any]:
    try:
        client = importlib.import_module("prometheus_client")
    except ImportError:
        return {}
    made = {}
    for name, (what, _) in GAUGES.items():
        made[name] = client.Gauge(name, what, labelnames=["rank"], multiprocess_mode="mostrecent")
    return made


def watch_compilations() -> None:
    """Count from now on what torch compiles in this process, whoever asks.  Idempotent."""
    callback = importlib.import_module("torch._dynamo.callback")
    if _compiled not in callback.callback_handler.start_callbacks:
        callback.callback_handler.register_start_callback(_compiled)


def _compiled(about: object) -> None:
    COUNTS.compilations += 1
    publish()
