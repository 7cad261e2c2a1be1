"""The counts as gauges, in one process and gathered from several; needs the Prometheus client that comes with vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")

CODE = """
import sys, types
from flagtree.serve import metrics
from flagtree.serve.counts import COUNTS
metrics.publish()
assert "prometheus_client" not in sys.modules  # nothing outside of vLLM, and its client not before a count
sys.modules["vllm"] = types.ModuleType("vllm")
COUNTS.graphs_found, COUNTS.externs = int(sys.argv[1]), {"a": 2, "b": 3}
metrics.publish()
metrics.publish()
import os, prometheus_client
from prometheus_client import multiprocess
registry = prometheus_client.REGISTRY
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
print(prometheus_client.generate_latest(registry).decode())
"""


def answer(repository: Path, found: int, folder: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"} | {"PYTHONPATH": str(repository)}
    if folder is not None:
        env["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    done = subprocess.run([sys.executable, "-c", CODE, str(found)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_process(repository: Path) -> None:
    text = answer(repository, 4)
    assert 'flagtree_graphs_found{rank="0"} 4.0' in text
    assert 'flagtree_externs{rank="0"} 5.0' in text


def test_another_process_reads_them(repository: Path, tmp_path: Path) -> None:
    answer(repository, 7, tmp_path)
    other = "import prometheus_client\nfrom prometheus_client import multiprocess\nr = prometheus_client.CollectorRegistry()\n"
    other += "multiprocess.MultiProcessCollector(r)\nprint(prometheus_client.generate_latest(r).decode())"
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    text = subprocess.run([sys.executable, "-c", other], env=env, capture_output=True, text=True, check=True).stdout
    assert 'flagtree_graphs_found{rank="0"} 7.0' in text
