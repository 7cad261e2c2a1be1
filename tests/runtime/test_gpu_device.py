"""On a real GPU: what benchmarks/gpu_checks.py claims.  `pytest -m gpu`; nothing of it has run yet (docs/gpu.md).

Without a GPU the plain run sees that the benchmark says so in one line, and rehearses what of it needs none.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks


@pytest.mark.gpu
@pytest.mark.parametrize("claim", gpu_checks.CHECKS)
def test_on_a_gpu(claim: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    assert gpu_checks.CHECKS[claim](torch.device("cuda", torch.cuda.current_device()))


def test_without_a_gpu_the_benchmark_says_so(repository: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "benchmarks/gpu.py", "--out", "/nonexistent/gpu.md"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks/gpu.py needs a GPU that torch can use, and there is none here; nothing was measured\n"


@pytest.mark.parametrize("claim", ["each kernel equals eager", "misaligned inputs"])
def test_the_claims_hold_on_the_cpu_too(claim: str) -> None:
    """The functions of the claims are right: with the CPU for the device they pass, and see a wrong result."""
    assert gpu_checks.CHECKS[claim](torch.device("cpu"))
    with pytest.raises(AssertionError, match="error"):
        gpu_checks.equal(torch.full((8,), 1.01), torch.full((8,), 1.000001), torch.ones(8, dtype=torch.float64))
