"""A warm start of torch.compile: in a new process it runs from the store, without our compiler, AOTAutograd or a C++ compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# a program of several kinds of graph: static, with symbolic sizes, with a constant of its own, with a write into an argument
PROGRAM = """
import torch
from flagtree.runtime.compile import backend

def norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) + torch.tensor([1.0, 2.0])[0]

def update(x, y):
    x.add_(y)
    return x[1:], x.sum(0), x.shape[0] * 2

torch.manual_seed(0)
with torch.no_grad():
    compiled = torch.compile(norm, backend=backend)
    for rows in (3, 5, 8):
        x, w = torch.randn(rows, 16), torch.randn(16)
        torch.testing.assert_close(compiled(x, w), norm(x, w))
    compiled = torch.compile(update, backend=backend, dynamic=True)
    for rows in (2, 6):
        x, y = torch.randn(rows, 4), torch.randn(rows, 4)
        want, have = x.clone(), x.clone()
        for a, b in zip(update(want, y), compiled(have, y)):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(want, have)
print("right")
"""

SIZES = """
import torch
from flagtree.runtime.compile import backend

def halves(x):
    n = x.shape[0]
    return x[: n // 2] + x[n // 2 :] if n % 2 == 0 else x.flip(0)[: n - 1] * 2

with torch.no_grad():
    compiled = torch.compile(halves, backend=backend, dynamic=True)
    for n in ORDER:
        x = torch.arange(float(n * 3)).view(n, 3)
        torch.testing.assert_close(compiled(x), halves(x))
print("right")
"""

# nothing of ours beyond the runtime, no sympy asked for by us, no AOTAutograd
GUARD = """
import builtins, sys
OURS = ("capture", "ir", "lower", "passes", "codegen", "toolchain")
real = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if name.startswith(tuple(f"flagtree.{p}" for p in OURS)):
        raise AssertionError(f"{importer} imports {name}")
    if importer.startswith("flagtree") and name.split(".")[0] in ("sympy", "networkx", "jinja2", "triton"):
        raise AssertionError(f"{importer} imports {name}")
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
import torch._functorch.aot_autograd as aot
def entered(*args, **kwargs):
    raise AssertionError("AOTAutograd is entered")
aot.aot_module_simplified = aot.create_aot_dispatcher_function = entered
"""


def _python(program: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process with the store in `cache`; `environment` on top of the test's own."""
    env = {**os.environ, "FLAGTREE_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120, check=False)


# no index expression says the size of the result, so no program carries the graph
REFUSED = """
import torch
from flagtree.runtime.compile import backend

def resized(x):
    return torch.nn.functional.interpolate(x[None, None], scale_factor=(x.shape[0] / 3, 1.5)) * 2

with torch.no_grad():
    compiled = torch.compile(resized, backend=backend, dynamic=True)
    for rows in (6, 9):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), resized(x), rtol=0, atol=0)
print("right")
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Path:
    """A store that has run the program once."""
    cache = tmp_path_factory.mktemp("warm") / "a störe"
    cold = _python(PROGRAM, cache, PYTHONHASHSEED="1")
    assert cold.stdout == "right\n", cold.stderr
    return cache


def test_runs_without_the_compiler(warm: Path) -> None:
    done = _python(GUARD + PROGRAM, warm, PYTHONHASHSEED="2")
    assert done.stdout == "right\n", done.stderr


def test_guard_is_not_blind(tmp_path: Path) -> None:
    done = _python(GUARD + PROGRAM, tmp_path)
    assert done.returncode != 0 and "imports flagtree.capture" in done.stderr


def test_runs_without_a_cxx_compiler(warm: Path, tmp_path: Path) -> None:
    done = _python(PROGRAM, warm, FLAGTREE_CXX="/nonexistent/c++", PATH=str(tmp_path))
    assert done.stdout == "right\n", done.stderr


def test_cold_without_a_cxx_compiler_names_what_was_looked_for(tmp_path: Path) -> None:
    done = _python(PROGRAM, tmp_path / "store", FLAGTREE_CXX="/nonexistent/c++", PATH=str(tmp_path), FLAGTREE_ON_ERROR="extern")
    assert done.returncode != 0
    assert "ToolchainError" in done.stderr and "/nonexistent/c++" in done.stderr, done.stderr
    done = _python(PROGRAM, tmp_path / "store", PATH=str(tmp_path), FLAGTREE_ON_ERROR="extern")
    assert done.returncode != 0
    assert all(name in done.stderr for name in ("ToolchainError", "g++", "clang++", "FLAGTREE_CXX")), done.stderr


def test_damaged_entry_is_compiled_again(tmp_path: Path) -> None:
    cache = tmp_path / "store"
    assert _python(SIZES.replace("ORDER", "(4, 8)"), cache).stdout == "right\n"
    damaged = list(cache.rglob("kernels.so"))
    assert damaged
    for path in damaged:
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:100])
    again = _python(SIZES.replace("ORDER", "(4, 8)"), cache)
    assert again.stdout == "right\n", again.stderr


def test_a_hit_guards_as_the_first_compilation_did(tmp_path: Path) -> None:
    """Sizes outside the recorded conditions are compiled for themselves, also where the first graph came from the store."""
    for order in ("(4, 8)", "(4, 7, 6)", "(9, 4)"):
        done = _python(SIZES.replace("ORDER", order), tmp_path)
        assert done.stdout == "right\n", (order, done.stderr)


def test_a_refused_graph_is_not_traced_again(tmp_path: Path) -> None:
    """The refusal is kept like a launch list, said again at each start, and listed by `flagtree explain extern`."""
    reason = "no program carries this graph: size "
    cold = _python(REFUSED, tmp_path)
    assert cold.stdout == "right\n" and reason in cold.stderr, cold.stderr
    warm = _python(GUARD + REFUSED, tmp_path, FLAGTREE_DEBUG="1")
    assert warm.stdout == "right\n" and reason in warm.stderr and "from the store" in warm.stderr, warm.stderr
    listed = _python("import sys; sys.argv = ['flagtree', 'explain', 'extern']; from flagtree.cli.app import main; main()", tmp_path)
    assert reason in listed.stdout, listed.stderr


def test_internal_failure_goes_on_eagerly_and_leaves_a_reproducer(tmp_path: Path) -> None:
    broken = """
import flagtree.capture.dynamo as d
def fail(*a, **k): raise ValueError("a bug")
d.compile_graph = fail
"""
    done = _python(broken + PROGRAM, tmp_path, FLAGTREE_ON_ERROR="extern")
    assert done.stdout == "right\n", done.stderr
    assert "ValueError: a bug" in done.stderr and "reproducer" in done.stderr
    folder = Path(done.stderr.split("the reproducer is in ")[1].splitlines()[0])
    assert (folder / "graph.txt").exists()
