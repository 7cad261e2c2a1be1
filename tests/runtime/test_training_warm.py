"""A warm start of training: a new process takes forward and backward from the store; AOTAutograd runs, our compiler does not."""

from __future__ import annotations

from pathlib import Path

from tests.runtime.test_torch_compile_warm import GUARD, _python

PROGRAM = """
import copy, torch, torch.nn.functional as F
from torch import nn
from flagtree.runtime.compile import backend

torch.manual_seed(0)
model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.GELU())
compiled = torch.compile(copy.deepcopy(model), backend=backend)
for rows in (5, 7):
    x, labels = torch.randn(rows, 8), torch.randint(6, (rows,))
    for called in (model, compiled):
        called.zero_grad()
        F.cross_entropy(called(x), labels).backward()
    for a, b in zip(model.parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)
print("right")
"""
COMPILER_ONLY = GUARD[: GUARD.index("import torch._functorch")]


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    cold = _python(PROGRAM, tmp_path, PYTHONHASHSEED="1")
    assert cold.stdout == "right\n", cold.stderr
    warm = _python(COMPILER_ONLY + PROGRAM, tmp_path, PYTHONHASHSEED="2", FLAGTREE_CXX="/nonexistent/c++", PATH=str(tmp_path))
    assert warm.stdout == "right\n", warm.stderr
    blind = _python(COMPILER_ONLY + PROGRAM, tmp_path / "empty")
    assert blind.returncode != 0 and "imports flagtree.capture" in blind.stderr
