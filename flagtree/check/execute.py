"""One built kernel executed on given operands: natively at each level that this CPU has, or its GPU code in the emulator.

Every level, and every variant, must give the same bits: a difference is an error here, never an average.  What could not be executed
is `Unexecuted` with the reason.  Used by check/certify.py only.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from flagtree.check.inputs import Operand
from flagtree.errors import FlagtreeError
from flagtree.runtime.cpu import CpuLibrary, levels, load_library
from flagtree.targets.base import Target
from flagtree.toolchain import cxx, emulator
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.emulator_memory import PROMISED

EMULATED = "maca-ir (emulated)"
EMULATED_FOR_ANOTHER = "same TTIR through MACA lowering; ptx/hsaco not executed"
EMULATED_TTIR = "same TTIR through MACA lowering; the chip's own compiler has not run"
VARIANTS = ("aligned", "generic")
Route = Callable[[Sequence[Operand], Sequence[int]], None]
SECONDS = 120.0  # limit of one emulated run


class Unexecuted(FlagtreeError):
    """Nothing here can execute a kernel; `why` is what the certificate says."""


class Differs(FlagtreeError):
    """Two ways to run one kernel gave different bits."""


class Executor:
    """Runs kernels of one target.  `ways(built)` says how a kernel is executed, `run` does it in all those ways."""

    def __init__(self, built: Sequence[BuiltKernel], target: Target, libraries: Mapping[str, bytes] | None = None) -> None:
        """`libraries`: a bundle's shared objects by level, which are what runs then; without them the kernels' objects are linked."""
        present = [b for b in built if any(f"{level}.o" in b.files for level in levels())]
        self.linked = libraries is None
        self.libraries: dict[str, CpuLibrary] = {
            level: load_library(data, f"lib/{level}.so") for level in levels() if (data := (libraries or {}).get(level)) is not None
        }
        for level in levels() if self.linked else ():
            objects = [(b.digest, b.files[f"{level}.o"]) for b in present if f"{level}.o" in b.files]
            if objects:
                self.libraries[level] = load_library(cxx.link(objects, level), "kernels under test")
        needs_emulator = any(self.variants(b) for b in built)
        self.no_emulator = emulator.missing() if needs_emulator else ""
        self.uses_emulator = needs_emulator and not self.no_emulator
        reach = target.probe()
        another = EMULATED_FOR_ANOTHER if reach.tier == "binary" else EMULATED_TTIR
        self.emulated = EMULATED if needs_emulator and reach.executes == "emulator" else another

    def versions(self) -> dict[str, str]:
        """Of the tools that made what runs."""
        linked = self.libraries and self.linked
        found = {"c++": cxx.find_compiler().version} if linked or self.uses_emulator else {}
        if self.uses_emulator:
            found["triton"] = importlib.metadata.version("triton")
        return found

    @staticmethod
    def variants(built: BuiltKernel) -> list[str]:
        return [v for v in VARIANTS if f"{v}.llir" in built.files]

    def levels(self, built: BuiltKernel) -> list[str]:
        return [level for level in self.libraries if f"{level}.o" in built.files]

    def ways(self, built: BuiltKernel | None) -> list[str]:
        """How a kernel is executed.  Raises Unexecuted."""
        if built is None:
            raise Unexecuted("the kernel is not executed", why="it was not built in a form that runs here")
        if found := self.levels(built):
            return [f"native {level}" for level in found]
        if not self.variants(built):
            here = ", ".join(levels()) or "no known level"
            raise Unexecuted("the kernel is not executed", why=f"its files are {', '.join(sorted(built.files))}; this CPU executes {here}")
        if self.no_emulator:
            raise Unexecuted("the kernel is not executed", why=self.no_emulator)
        return [self.emulated]

    def run(self, built: BuiltKernel, operands: Mapping[str, Operand], symbols: Mapping[str, int]) -> dict[str, Operand]:
        """The operands after the kernel.  Raises Differs, or ToolchainError for what the emulator found."""
        out: dict[str, Operand] | None = None
        first = ""
        for way, execute in self._routes(built, operands, symbols):
            here = {name: operand.clone() for name, operand in operands.items()}
            execute(list(here.values()), list(symbols.values()))
            if out is not None:
                self._same(out, here, first, way)
            else:
                out, first = here, way
        assert out is not None
        return out

    def _routes(self, built: BuiltKernel, operands: Mapping[str, Operand], symbols: Mapping[str, int]) -> list[tuple[str, Route]]:
        """Every way to run the kernel on these operands, all of which must give the same bits; a device that is here adds its own."""
        if native := self.levels(built):
            return [(level, partial(self._native, built.digest, level)) for level in native]
        tensors = {name: operand.tensor.data_ptr() for name, operand in operands.items()}
        fitting = [v for v in self.variants(built) if fits(built, v, {**tensors, **symbols})]
        return [(variant, partial(self._emulate, built, variant)) for variant in fitting]

    def _native(self, digest: str, level: str, operands: Sequence[Operand], symbols: Sequence[int]) -> None:
        self.native(digest, level, [o.tensor for o in operands], symbols)

    def native(self, digest: str, level: str, tensors: Sequence[torch.Tensor], symbols: Sequence[int]) -> None:
        """Call the kernel's code of one level on b0, b1, … and the values of n0, n1, …"""
        pointers = (ctypes.c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))
        numbers = (ctypes.c_int64 * max(1, len(symbols)))(*symbols)
        self.libraries[level].kernel(digest)(ctypes.addressof(pointers), ctypes.addressof(numbers))

    def _emulate(self, built: BuiltKernel, variant: str, operands: Sequence[Operand], symbols: Sequence[int]) -> None:
        emulator.execute_built(built, variant, [o.tensor for o in operands], symbols, seconds=SECONDS)

    def _same(self, first: Mapping[str, Operand], second: Mapping[str, Operand], one: str, other: str) -> None:
        """Equal bits; a NaN is one value, whose sign and payload IEEE 754 leaves to the instruction that makes it."""
        for name, operand in first.items():
            if differing := different(operand.memory, second[name].memory):
                why = f"buffer {name}: {differing} elements of {operand.memory.numel()} differ"
                raise Differs(f"{one} and {other} give different bits", why=why)


def different(a: torch.Tensor, b: torch.Tensor) -> int:
    """The number of elements of other bits, where not both are NaN."""
    size = a.element_size()
    unequal = (a.view(torch.uint8).view(-1, size) != b.view(torch.uint8).view(-1, size)).any(1)
    return int((unequal & ~((a != a) & (b != b))).sum()) if bool(unequal.any()) else 0


def fits(built: BuiltKernel, variant: str, values: Mapping[str, int]) -> bool:
    """Would the launcher choose the variant for these addresses and symbols?"""
    variants: Mapping[str, Mapping[str, Sequence[str]]] = built.launch["variants"]  # type: ignore[assignment]
    return all(values.get(name, 0) % PROMISED == 0 for name in variants[variant]["requires"])
