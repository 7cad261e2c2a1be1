"""Kernels of a GPU target run by this processor through the real launcher: the executing driver, and images for it.

What is executed is the MACA lowering of a target's own TTIR (docs/emulator.md), so it proves the launch (arguments, grid, threads, shared
memory, variant, order) and the kernels' arithmetic, not what a vendor's compiler makes of them.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flagtree.ir.program import Program
from flagtree.runtime.driver import OpenDriver
from flagtree.runtime.gpu import Device, GpuLibrary
from flagtree.targets import find_target
from flagtree.toolchain import emulator, maca
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.emulator_session import current
from tests.runtime.stand_in import StandIn


@functools.cache
def driver() -> OpenDriver:
    """The executing driver under CUDA's names; one a process, since the emulated kernels' calls resolve to the first that is mapped."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or emulator.missing():
        pytest.skip(emulator.missing() or "no C compiler")
    runtime, source = Path(emulator.__file__).with_name("emulator_runtime.c"), Path(__file__).with_name("executing_driver.c")
    flags = ["-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", f'-DRUNTIME="{runtime}"']
    facts = find_target("cuda").driver
    assert facts is not None
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/executing.so"
        subprocess.run([compiler, *flags, "-o", path, str(source), "-lm", "-ldl"], check=True)
        return OpenDriver(replace(facts, libraries=(path,)))


@functools.cache
def shared_object(llir: bytes, function: str, signature: tuple[str, ...]) -> bytes:
    """MACA LLVM IR as the shared object that the emulator's own process would run."""
    kernel = emulator.load(llir.decode(), function, signature)
    kernel._load(current(), 120)
    return (current().folder / f"{kernel.key}.so").read_bytes()


def image(built: BuiltKernel, variant: str) -> bytes:
    """One variant as the executing driver loads it."""
    launch: Mapping = built.launch
    kinds = tuple(kind for _, kind in launch["signature"])
    nulls = launch["variants"][variant]["null_pointers"]
    code = shared_object(built.files[f"{variant}.llir"], launch["function"], kinds)
    return struct.pack("<8sQQQQ", b"EMULATED", len(code), len(kinds) + nulls, nulls, 64) + code


def library(kernels: Sequence[tuple[str, Program]], target: str, device: Device) -> GpuLibrary:
    """The kernels, generated for `target` and lowered for the emulator, as launches on `device`."""
    built = {b.digest: b for b in maca.build_for_emulation(list(dict(kernels).items()), find_target(target), 2)}
    return GpuLibrary(device, {d: b.launch for d, b in built.items()}, lambda digest, file: image(built[digest], file.split(".")[0]))


def device(route: str, compiled: Path) -> Device:
    """This processor as a CUDA device; tensors are the CPU's."""
    return StandIn(driver(), route, compiled)


def launches(device: Device) -> int:
    """How many kernels the executing driver has run."""
    return ctypes.c_int64.in_dll(device.driver.library, "launches").value
