"""Kernels on this machine's CPU: which level it has, and a bundle's shared object mapped into this process.

The object is mapped from memory that holds exactly the checked bytes, after torch, so that both use torch's OpenMP.
No compiler, no search path, nothing executed before trust was checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import platform
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from flagtree.artifact.files import sha256
from flagtree.errors import BundleError, StoreError
from flagtree.settings import settings

# x86-64 psABI, "micro-architecture levels": the flags as Linux spells them in /proc/cpuinfo
_FEATURES = {
    "x86-64-v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
_libraries: dict[str, CpuLibrary] = {}
_mapped = itertools.count()


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels that this CPU executes, best first."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ("aarch64",)
    if machine not in ("x86_64", "amd64"):
        return ()
    have = _flags()
    if not have:  # no /proc: torch has asked the CPU; its words are AVX2 (a v3 machine) and AVX512 (v4)
        best = {"AVX512": 3, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
        return tuple(reversed(list(_FEATURES)[:best]))
    out: list[str] = []
    for level, needed in _FEATURES.items():
        if not needed <= have:
            break
        out.insert(0, level)
    return tuple(out)


def _flags() -> set[str]:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def best_level(available: Collection[str], where: str = "") -> str:
    """The best of a bundle's levels that this CPU executes; BundleError when there is none."""
    for level in levels():
        if level in available:
            return level
    raise BundleError(
        "the bundle has no code for this CPU",
        where=where,
        why=f"it has {', '.join(available) or 'none'}; this CPU executes {', '.join(levels()) or platform.machine()}",
        hint="compile it on a machine of this kind",
    )


class CpuLibrary:
    """A `prepare.Library` over a mapped shared object, which stays mapped until the process ends."""

    tensors, device = torch.device("cpu"), None  # kernels run when they are called

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        self.shared = _map(data, where)
        self._functions: dict[str, Callable[[int, int], object]] = {}

    def kernel(self, digest: str) -> Callable[[int, int], object]:
        """`void ft_<16 hex>(void *const *buffers, const int64_t *symbols)` of docs/architecture.md, "CPU kernels: ABI".
        The call releases Python's lock.  BundleError when the object lacks it."""
        if digest not in self._functions:
            try:
                function = self.shared[f"ft_{digest[:16]}"]
            except AttributeError:
                raise BundleError(f"the library lacks the kernel {digest[:16]}", where=self.where, hint="build it again") from None
            function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p), None
            self._functions[digest] = function
        return self._functions[digest]

    def launch(self, calls: Sequence[tuple[Callable[[int, int], object], int, int]], stream: int) -> list[Callable[[], object]]:
        """One closure a call of (function, address of the pointers, address of the symbols); `stream` means nothing here."""
        return [functools.partial(function, pointers, symbols) for function, pointers, symbols in calls]


def load_library(data: bytes, where: str = "") -> CpuLibrary:
    """Map a shared object whose bytes were checked and are trusted; the same bytes are mapped once a process."""
    key = sha256(data)
    if key not in _libraries:
        _libraries[key] = CpuLibrary(data, where)
    return _libraries[key]


def _map(data: bytes, where: str) -> ctypes.CDLL:
    """dlopen from anonymous memory where the system has it, else from a private file that is gone afterwards."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("flagtree", os.MFD_CLOEXEC)
        with contextlib.suppress(OSError):  # no /proc, or memory may not be executed: the file below decides
            try:
                _write_all(memory, data)
                return _dlopen(_fresh_path(memory))
            finally:
                os.close(memory)
    try:
        settings.cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix="map-", dir=settings.cache_dir) as folder:
            path = Path(folder) / "kernels.so"
            path.write_bytes(data)
            return _dlopen(str(path))
    except OSError as e:
        hint = "set FLAGTREE_CACHE_DIR to a folder from which programs may be executed"
        raise StoreError("cannot map the kernels", where=where, why=str(e), hint=hint) from None


def _fresh_path(handle: int) -> str:
    """A path to an open file that no earlier call has spelled: the loader takes a path that it knows for the library that it has, and
    the number of a closed file comes again.  The call's number is written in steps that lead nowhere, "/" for 0 and "/." for 1."""
    return "/proc/self/fd" + "".join("/." if bit == "1" else "/" for bit in f"{next(_mapped):b}") + f"/{handle}"


def _dlopen(path: str) -> ctypes.CDLL:
    # RTLD_LOCAL: two bundles may define one symbol; torch is imported above, so libgomp.so.1 is the one that torch loaded
    return ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
