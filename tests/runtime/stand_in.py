"""Stand-ins for a GPU: the recording driver compiled for a target's own function names, and a device over it.

The driver records and executes nothing; tensors are ordinary CPU tensors, which lend their addresses.  What runs of the package between
the launch list and the driver's functions is the real thing.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flagtree.codegen.launch import launch_list
from flagtree.ir.canonical import Isolated, digest, isolate
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Program
from flagtree.runtime import launcher, launcher_build
from flagtree.runtime.driver import OpenDriver
from flagtree.runtime.gpu import Device, GpuLibrary
from flagtree.targets import find_target
from flagtree.targets.base import Driver
from tests.runtime.conftest import kernels_of

ROUTES = ("compiled", "interpreted")
TARGETS = ("cuda:sm90", "rocm:gfx942", "metax")
POINTERS = {"f32": "*fp32", "bf16": "*bf16", "i64": "*i64"}


@functools.cache
def driver_bytes(target: str) -> bytes:
    """The recording driver with the function names of `target`'s driver, as a shared library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    facts = find_target(target).driver
    assert facts is not None
    defines = [f"-D{role.upper()}={name}" for role, name in facts.symbols.items()]
    defines += [f"-DSHARED_FREE={facts.shared_free}"] + ["-DERROR_RETURNED"] * facts.error_returned
    source = Path(__file__).with_name("recording_driver.c")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "driver.so"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-pthread", *defines, "-o", str(made), str(source)], check=True)
        return made.read_bytes()


def recording_facts(target: str, path: Path) -> Driver:
    """`target`'s driver facts that open a copy of the recording driver at `path`: each copy is loaded apart and records for itself."""
    path.write_bytes(driver_bytes(target))
    facts = find_target(target).driver
    assert facts is not None
    return replace(facts, libraries=(str(path),))


@functools.cache
def allow_fake_cuda() -> None:
    """Let this process trace fake CUDA tensors, whatever torch was built with."""
    if torch.backends.cuda.is_built():
        return
    compiler, home = shutil.which("c++") or shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        made, source = f"{folder}/guard.so", str(Path(__file__).with_name("device_guard.cpp"))
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}"]
        subprocess.run([compiler, *flags, "-o", made, source, "-lc10"], check=True)
        ctypes.CDLL(made)


_numbers = itertools.count()  # a library that is mapped must not be written over


class Recording:
    """An opened recording driver: what it was called with, and what it shall refuse next."""

    def __init__(self, target: str, folder: Path) -> None:
        self.driver = OpenDriver(recording_facts(target, folder / f"driver-{next(_numbers)}.so"))
        self.library = self.driver.library
        self.library.recorded.restype = ctypes.c_char_p
        self.has_contexts = "retain" in self.driver.facts.symbols

    def lines(self, *first: str) -> list[str]:
        """The calls so far, those whose first word is among `first`."""
        found = self.library.recorded().decode().splitlines()
        return [line for line in found if not first or line.split()[0] in first]

    def forget(self) -> None:
        self.library.forget()

    def refuse(self, role: str, code: int) -> None:
        self.library.fail(role.encode(), code)

    def describe(self, function: str, kinds: str) -> None:
        self.library.describe(function.encode(), kinds.encode())


class StandIn(Device):
    """A device whose tensors are the CPU's; the test says which stream is current and whether it is being captured."""

    def __init__(self, driver: OpenDriver, route: str, compiled: Path, ordinal: int = 0) -> None:
        function = driver.launch_function
        chosen: launcher.Route = launcher.Interpreted(function)
        if route == "compiled":
            chosen = launcher.Compiled(compiled, ctypes.cast(function, ctypes.c_void_p).value or 0)
        super().__init__(driver, ordinal, torch.device("cpu"), chosen)
        self.stream, self.captures = 0, False

    def queue(self) -> int:
        return self.stream

    def capturing(self) -> bool:
        return self.captures


@dataclass(frozen=True)
class Toy:
    """A program of kernels that were never compiled: launch list, launch records, and binaries that only name themselves."""

    launch: dict
    records: Mapping[str, dict[str, Any]]
    isolated: Mapping[str, tuple[Isolated, str]]

    def library(self, device: Device) -> GpuLibrary:
        return GpuLibrary(device, self.records, lambda digest, file: f"{digest[:8]}/{file}".encode(), "toy")

    def functions(self) -> dict[str, str]:
        """Kernel name to function name."""
        return {name: f"ft_{d[:16]}" for name, (_, d) in self.isolated.items()}


def toy(text: str, grids: Mapping[str, list], *, shared: int = 0, nulls: int = 2, threads: int = 128,
        variants: Iterable[str] = ("aligned", "generic")) -> Toy:  # fmt: skip
    """The program's launch list, with a launch record a kernel as a toolchain makes them; `grids` by kernel name."""
    program: Program = parse_program(re.sub(r"(kernel \w+ .*})$", r"\1 numerics(eager, contract=off, acc=f32)", text, flags=re.MULTILINE))
    isolated, records = {}, {}
    for kernel in kernels_of(program):
        alone = isolate(program, kernel)
        name = digest(alone.program)
        isolated[kernel.name] = (alone, name)
        signature = [[b.name, POINTERS[b.dtype]] for b in alone.program.buffers]
        signature += [[s.name, "i64" if s.hi > 2**31 - 1 else "i32"] for s in alone.program.symbols]
        promised = [b.name for b in alone.program.buffers] + [s.name for s in alone.program.symbols if s.multiple % 16 == 0]
        records[name] = {
            "function": f"ft_{name[:16]}", "grid": grids[kernel.name], "signature": signature, "threads": threads, "warps": threads // 32,
            "shared": shared, "variants": {
                v: {"file": f"{v}.bin", "requires": promised if v == "aligned" else [], "shared": shared, "null_pointers": nulls}
                for v in variants
            },
        }  # fmt: skip
    return Toy(launch_list(program, isolated), records, isolated)


def kinds_of(record: Mapping[str, Any]) -> str:
    """How the recording driver reads a kernel's arguments."""
    letters = {"i32": "i", "i64": "l"}
    nulls = next(iter(record["variants"].values()))["null_pointers"]
    return "".join(letters.get(kind, "p") for _, kind in record["signature"]) + "n" * nulls


def compile_launcher(folder: Path) -> Path:
    """launcher.c built as an installation builds it."""
    path = folder / "launcher.so"
    problem = launcher_build.build(path)
    assert not problem, problem
    return path
