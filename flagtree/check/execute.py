"""One built kernel executed on given operands: natively at each level that this CPU has, or its GPU code in the emulator.

Every level, and every variant, must give the same bits: a difference is an error here, never an average.  What could not be executed
is `Unexecuted` with the reason.  Used by check/certify.py only.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Mapping, Sequence

import torch

from flagtree.check.inputs import Operand
from flagtree.errors import FlagtreeError
from flagtree.runtime.cpu import CpuLibrary, levels, load_library
from flagtree.targets.base import Target
from flagtree.toolchain import cxx, emulator
from flagtree.toolchain.base import BuiltKernel

EMULATED = "maca-ir (emulated)"
EMULATED_FOR_ANOTHER = "same TTIR through MACA lowering; ptx/hsaco not executed"
VARIANTS = ("aligned", "generic")
SECONDS = 120.0  # limit of one emulated run


class Unexecuted(FlagtreeError):
    """Nothing here can execute a kernel; `why` is what the certificate says."""


class Differs(FlagtreeError):
    """Two ways to run one kernel gave different bits."""


class Executor:
    """Runs kernels of one target.  `ways(built)` says how a kernel is executed, `run` does it in all those ways."""

    def __init__(self, built: Sequence[BuiltKernel], target: Target) -> None:
        present = [b for b in built if any(f"{level}.o" in b.files for level in levels())]
        self.libraries: dict[str, CpuLibrary] = {}
        for level in levels():
            objects = [(b.digest, b.files[f"{level}.o"]) for b in present if f"{level}.o" in b.files]
            if objects:
                self.libraries[level] = load_library(cxx.link(objects, level), "kernels under test")
        needs_emulator = any(self._variants(b) for b in built)
        self.no_emulator = emulator.missing() if needs_emulator else ""
        self.uses_emulator = needs_emulator and not self.no_emulator
        own = needs_emulator and target.probe().executes == "emulator"
        self.emulated = EMULATED if own else EMULATED_FOR_ANOTHER

    def versions(self) -> dict[str, str]:
        """Of the tools that made what runs."""
        found = {"c++": cxx.find_compiler().version} if self.libraries or self.uses_emulator else {}
        if self.uses_emulator:
            found["triton"] = importlib.metadata.version("triton")
        return found

    @staticmethod
    def _variants(built: BuiltKernel) -> list[str]:
        return [v for v in VARIANTS if f"{v}.llir" in built.files]

    def _levels(self, built: BuiltKernel) -> list[str]:
        return [level for level in self.libraries if f"{level}.o" in built.files]

    def ways(self, built: BuiltKernel | None) -> list[str]:
        """How a kernel is executed.  Raises Unexecuted."""
        if built is None:
            raise Unexecuted("the kernel is not executed", why="it was not built in a form that runs here")
        if found := self._levels(built):
            return [f"native {level}" for level in found]
        if not self._variants(built):
            here = ", ".join(levels()) or "no known level"
            raise Unexecuted("the kernel is not executed", why=f"its files are {', '.join(sorted(built.files))}; this CPU executes {here}")
        if self.no_emulator:
            raise Unexecuted("the kernel is not executed", why=self.no_emulator)
        return [self.emulated]

    def run(self, built: BuiltKernel, operands: Mapping[str, Operand], symbols: Mapping[str, int]) -> dict[str, Operand]:
        """The operands after the kernel.  Raises Differs, or ToolchainError for what the emulator found."""
        native = self._levels(built)
        out: dict[str, Operand] | None = None
        for way in native or self._variants(built):
            here = {name: operand.clone() for name, operand in operands.items()}
            if native:
                self._native(built.digest, way, list(here.values()), list(symbols.values()))
            else:
                self._emulate(built, way, list(here.values()), list(symbols.values()))
            if out is not None:
                self._same(out, here, (native or self._variants(built))[0], way)
            out = here if out is None else out
        assert out is not None
        return out

    def _native(self, digest: str, level: str, operands: Sequence[Operand], symbols: Sequence[int]) -> None:
        pointers = (ctypes.c_void_p * max(1, len(operands)))(*(o.tensor.data_ptr() for o in operands))
        numbers = (ctypes.c_int64 * max(1, len(symbols)))(*symbols)
        self.libraries[level].kernel(digest)(ctypes.addressof(pointers), ctypes.addressof(numbers))

    def _emulate(self, built: BuiltKernel, variant: str, operands: Sequence[Operand], symbols: Sequence[int]) -> None:
        emulator.execute_built(built, variant, [o.tensor for o in operands], symbols, seconds=SECONDS)

    def _same(self, first: Mapping[str, Operand], second: Mapping[str, Operand], one: str, other: str) -> None:
        for name, operand in first.items():
            a, b = (o.memory.view(torch.uint8) for o in (operand, second[name]))
            if not torch.equal(a, b):
                why = f"buffer {name}: {int((a != b).sum())} bytes of {a.numel()} differ"
                raise Differs(f"{one} and {other} give different bits", why=why)

