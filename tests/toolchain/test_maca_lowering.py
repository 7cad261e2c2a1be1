"""The MACA lowering: hand-written kernels through Triton to MACA LLVM IR, executed in the emulator against PyTorch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flagtree.errors import ToolchainError
from flagtree.toolchain import emulator
from tests.toolchain import maca_references as references

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())
HERE = Path(__file__).parent
# Pythons with other Triton releases, in which the same kernels are compiled: FLAGTREE_TEST_TRITON_PYTHONS=.triton36/bin/python
OTHERS = [p for p in os.environ.get("FLAGTREE_TEST_TRITON_PYTHONS", "").split(os.pathsep) if p]
NAMES = list(references.SIGNATURES)


@pytest.fixture(scope="module", params=[sys.executable, *(OTHERS or [pytest.param("", marks=pytest.mark.skip(
    reason="FLAGTREE_TEST_TRITON_PYTHONS names no Python with another Triton release"))])])  # fmt: skip
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """Name to (MACA LLVM IR, bytes of shared memory), compiled in a fresh process."""
    folder = tmp_path_factory.mktemp("kernels")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "TRITON_CACHE_DIR": str(folder / "cache")}
    subprocess.run([request.param, str(HERE / "maca_kernels.py"), str(folder)], check=True, env=environment)
    return {p.name.split(".")[0]: (p.read_text(), int(p.name.split(".")[1])) for p in folder.glob("*.ll")}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_pytorchs_in_every_order(compiled: dict[str, tuple[str, int]], name: str) -> None:
    for order in ("forward", "reverse", "random:1", "random:2"):
        run = references.check(name, *compiled[name], order)
    uses_shared = "addrspace(3)" in compiled[name][0].split("define", 1)[1]
    assert run.blocks and (run.barriers or not uses_shared)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_macas(compiled: dict[str, tuple[str, int]], name: str) -> None:
    text, _ = compiled[name]
    assert 'target triple = "mxc-metax-macahca"' in text and "define metaxgpu_kernel void @" in text
    assert not re.search(r"amdgcn|amdgpu|bfloat|f0x|asm |/\w+/", text)
    called = set(re.findall(r"call [^@\n]*@([\w.]+)\(", text))
    declared = set(re.findall(r"^(?:declare|define) [^@\n]*@([\w.]+)\(", text, re.M))
    assert called <= declared


@pytest.mark.parametrize("name", ["norm_residual", "sum_and_max", "transpose", "product_bf16"])
def test_deleting_a_barrier_is_seen(compiled: dict[str, tuple[str, int]], name: str) -> None:
    """Each barrier that is not merely redundant changes a number or leaves poison in some order."""
    text, shared = compiled[name]
    barrier = "  call void @llvm.mxc.barrier()\n"
    seen = []
    for i in range(text.count(barrier)):
        parts = text.split(barrier)
        broken = barrier.join(parts[: i + 1]) + barrier.join(["", *parts[i + 1 :]])[len(barrier) :]
        assert broken.count(barrier) == text.count(barrier) - 1
        try:
            for order in ("forward", "reverse", "random:1"):
                references.check(name, broken, shared, order)
        except (AssertionError, ToolchainError):
            seen.append(i)
    assert seen, "no missing barrier was seen"


def test_swapped_matrix_operands_are_seen(compiled: dict[str, tuple[str, int]]) -> None:
    text, shared = compiled["product_bf16"]
    swapped = re.sub(r"(@llvm\.mxc\.mma[\w.]*\(<4 x half> )(%[\w.]+)(, <4 x half> )(%[\w.]+)", r"\1\4\3\2", text)
    with pytest.raises(AssertionError):
        references.check("product_bf16", swapped, shared)


def test_llvm_19_parses_it(compiled: dict[str, tuple[str, int]], tmp_path: Path) -> None:
    """Real LLVM 19 takes every file, once the calling convention that only MetaX's fork knows is left out."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("the wheel ziglang==0.14.1 (LLVM 19) is not installed")
    for name, (text, _) in compiled.items():
        text = text.replace("metaxgpu_kernel ", "").replace('target triple = "mxc-metax-macahca"\n', "")
        text = re.sub(r"target datalayout = .*\n", "", re.sub(r' "target-(?:cpu|features)"="[^"]*"', "", text))
        path = tmp_path / f"{name}.ll"
        path.write_text(text)
        command = [
            sys.executable,
            "-m",
            "ziglang",
            "clang",
            "-cc1",
            "-triple",
            "x86_64-unknown-linux-gnu",
            "-x",
            "ir",
            "-emit-llvm",
            "-o",
            os.devnull,
        ]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"


def test_registration_leaves_a_vendors_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends import backends

    from flagtree.toolchain import maca_backend

    vendor = object()
    monkeypatch.setitem(backends, "maca", vendor)
    maca_backend.register()
    assert backends["maca"] is vendor
    monkeypatch.delitem(backends, "maca")
    monkeypatch.setattr(triton, "__version__", "3.11.0")
    with pytest.raises(ToolchainError, match=r"not tested with Triton 3\.11\.0"):
        maca_backend.register()
    assert "maca" not in backends


def test_limits_are_checked() -> None:
    pytest.importorskip("triton")
    from flagtree.toolchain.maca_backend import MacaOptions

    with pytest.raises(ToolchainError, match="num_warps=16"):
        MacaOptions(num_warps=16)
    with pytest.raises(ToolchainError, match="num_ctas=2"):
        MacaOptions(num_ctas=2)
    assert torch is not None
