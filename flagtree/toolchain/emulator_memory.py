"""The memory of one emulated run: the tensors' bytes in a file that the emulator's process maps between inaccessible pages.

The invariant: tensors that overlap here overlap there, every address keeps its remainder by 16, and the bytes around a tensor in its
pages hold a pattern that is checked afterwards.  `emulator` builds one Memory per run, and reads it back.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flagtree.errors import KernelFault, ToolchainError

if TYPE_CHECKING:
    import torch

PAGE = mmap.PAGESIZE
GUARD = 1 << 28  # bytes of inaccessible address space on each side of a tensor
PROMISED = 16  # bytes: the alignment that the aligned variant promises
_EMPTY = b"\xff"  # NaN in every float type, -1 in every integer type


@dataclass(frozen=True, slots=True)
class Region:
    """Arguments whose bytes overlap, as one range: at `start` of `size` bytes of pages at `offset` of the file."""

    members: tuple[int, ...]
    base: int  # address of the first byte in the caller's memory
    length: int
    offset: int
    size: int
    start: int


class Memory:
    """`placement`: "end" puts the last byte next to the guard (overruns fault), "start" the first (underruns fault).

    `exact`: no rounding to 16 bytes at the end, so that the first byte too far faults; only for variants that promise no alignment.
    """

    def __init__(self, path: Path, tensors: Sequence[torch.Tensor], placement: str, exact: bool) -> None:
        self.path, self.tensors, self.guard = path, list(tensors), GUARD
        for i, tensor in enumerate(self.tensors):
            if tensor.device.type != "cpu":
                raise ToolchainError(f"argument {i} of an emulated kernel is on {tensor.device}", hint="pass CPU tensors")
        self.regions: list[Region] = []
        offset = 0
        for members, low, high in self._overlaps():
            size = -(-(high - low + low % PROMISED) // PAGE) * PAGE if high > low else 0
            start = _start(high - low, size, low % PROMISED, placement, exact)
            self.regions.append(Region(tuple(members), low, high - low, offset, size, start))
            offset += size
        with path.open("wb") as file:
            file.truncate(max(offset, 1))
        self.write()

    def _overlaps(self) -> list[tuple[list[int], int, int]]:
        """(arguments, first address, end address) of each group that shares bytes, in order of the addresses."""
        spans = sorted((t.data_ptr(), t.data_ptr() + span_bytes(t), i) for i, t in enumerate(self.tensors))
        groups: list[tuple[list[int], int, int]] = []
        for low, high, i in spans:
            if groups and low < groups[-1][2] and high > low:
                members, first, end = groups[-1]
                groups[-1] = ([*members, i], first, max(end, high))
            else:
                groups.append(([i], low, high))
        return groups

    def slot(self, argument: int) -> tuple[int, int]:
        """(region, byte in the region's pages) where an argument's element 0 is."""
        for number, region in enumerate(self.regions):
            if argument in region.members:
                return number, region.start + (self.tensors[argument].data_ptr() - region.base if region.length else 0)
        raise KeyError(argument)

    def write(self) -> None:
        """The tensors' bytes into the file, the pattern around them."""
        import torch

        with self.path.open("r+b") as file:
            for region in self.regions:
                if not region.size:
                    continue
                image = torch.full((region.size,), _EMPTY[0], dtype=torch.uint8)
                for member in region.members:
                    tensor = self.tensors[member]
                    at = region.start + tensor.data_ptr() - region.base
                    image[at : at + span_bytes(tensor)] = flat_bytes(tensor)
                file.seek(region.offset)
                image.numpy().tofile(file)

    def read(self) -> list[bytes]:
        """The bytes of each region.  Raises KernelFault when the pattern around one was overwritten."""
        found = []
        data = self.path.read_bytes()
        for region in self.regions:
            pages = data[region.offset : region.offset + region.size]
            end = region.start + region.length
            for name, margin in (("before", pages[: region.start]), ("after", pages[end:])):
                if margin.strip(_EMPTY):
                    raise KernelFault(
                        f"an emulated kernel wrote {name} argument {' or '.join(map(str, region.members))}",
                        hint="a mask or an index is wrong",
                    )
            found.append(pages[region.start : end])
        return found

    def store(self, contents: Sequence[bytes]) -> None:
        """Put the bytes of each region (as `read` gives them) back into the tensors."""
        import torch

        for region, content in zip(self.regions, contents, strict=True):
            for member in region.members if content else ():
                tensor = self.tensors[member]
                at = tensor.data_ptr() - region.base
                flat_bytes(tensor).copy_(torch.frombuffer(bytearray(content[at : at + span_bytes(tensor)]), dtype=torch.uint8))

    def describe(self, address: int, starts: Sequence[int]) -> str:
        """Where an address lies, in terms of the arguments."""
        return describe_address(address, self.regions, starts, self.guard)


def describe_address(address: int, regions: Sequence[Region], starts: Sequence[int], guard: int) -> str:
    """Where an address lies: near which of `regions`, whose pages start at `starts` with `guard` inaccessible bytes around them."""
    for region, first in zip(regions, starts, strict=True):
        low = first + region.start
        high = low + region.length
        name = f"argument {' or '.join(map(str, region.members))} ({region.length} bytes)"
        if low - guard <= address < low:
            return f"{low - address} bytes before {name}"
        if high <= address < high + guard:
            return f"{address - high} bytes past the end of {name}"
    return f"address 0x{address:x}, near no argument"


def _start(length: int, size: int, remainder: int, placement: str, exact: bool) -> int:
    if not length:
        return 0
    if placement == "start":
        return 0 if exact else remainder
    if exact:
        return size - length
    start = (size - length) // PROMISED * PROMISED + remainder
    return start if start + length <= size else start - PROMISED


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element of a tensor, the holes of its strides included; 0 for an empty one."""
    if not tensor.numel():
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the span as a view."""
    import torch

    count = span_bytes(tensor) // tensor.element_size()
    return tensor.detach().as_strided((count,), (1,), tensor.storage_offset()).view(torch.uint8)
