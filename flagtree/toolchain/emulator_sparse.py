"""Memory of true size for one emulated kernel: tensors of any size, of which only the touched pages exist.

The invariant: what no one wrote is zero, and every page that is not can be named, so a write anywhere is seen.  One anonymous file in
memory, mapped here and by the emulator's process; `check` fills the elements that chosen blocks read and looks at all that changed.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flagtree.errors import ToolchainError
from flagtree.toolchain.emulator_memory import PAGE, Region, describe_address

if TYPE_CHECKING:
    import torch

GUARD = 1 << 35  # bytes; an offset that wrapped at 32 bits lies at most 2^31 elements of 8 bytes away, on either side
Pages = dict[int, bytes]  # place in the file -> bytes that are not all zero
_ZERO = bytes(PAGE)


class SparseMemory:
    """One buffer for each (elements, torch dtype), between inaccessible pages in the emulator's process.

    `shift`: elements by which each buffer stands behind the start of its first page; with 0 it starts there, and is divisible by 16.
    A context manager: the memory is gone when it is left.
    """

    def __init__(self, buffers: Sequence[tuple[int, torch.dtype]], shift: int = 0) -> None:
        import torch

        self.file = os.memfd_create("flagtree-emulated", os.MFD_CLOEXEC)
        self.regions: list[Region] = []
        self.tensors: list[torch.Tensor] = []  # one-dimensional, in order
        offset = 0
        for number, (elements, dtype) in enumerate(buffers):
            start = shift * dtype.itemsize
            length = elements * dtype.itemsize
            size = -(-(start + length) // PAGE) * PAGE if length else 0
            self.regions.append(Region((number,), 0, length, offset, size, start))
            offset += size
        try:
            os.ftruncate(self.file, max(offset, 1))
            for region, (elements, dtype) in zip(self.regions, buffers, strict=True):
                if not elements:
                    self.tensors.append(torch.empty(0, dtype=dtype))
                    continue
                mapped = mmap.mmap(self.file, region.size, offset=region.offset)
                self.tensors.append(torch.frombuffer(mapped, dtype=dtype, count=elements, offset=region.start))
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            what = "there is no address space for the tensors of an emulated kernel"
            raise ToolchainError(what, why=f"{offset} bytes: {error}") from error
        self.guard = GUARD
        self.path = f"/proc/{os.getpid()}/fd/{self.file}"

    def __enter__(self) -> SparseMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back; views of the tensors must not be used afterwards."""
        self.tensors.clear()
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def slot(self, argument: int) -> tuple[int, int]:
        """(region, byte in the region's pages) where an argument's element 0 is."""
        return argument, self.regions[argument].start

    def describe(self, address: int, starts: Sequence[int]) -> str:
        """Where an address lies, in terms of the arguments."""
        return describe_address(address, self.regions, starts, self.guard)

    def pages(self) -> Pages:
        """Every page that holds anything but zeros."""
        found: Pages = {}
        at, end = 0, os.fstat(self.file).st_size
        while at < end:
            try:
                at = os.lseek(self.file, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data behind this place
                    break
                raise
            hole = os.lseek(self.file, at, os.SEEK_HOLE)
            for place in range(at // PAGE * PAGE, hole, PAGE):
                page = os.pread(self.file, PAGE, place)
                if page != _ZERO[: len(page)]:
                    found[place] = page
            at = hole
        return found

    def restore(self, wanted: Mapping[int, bytes]) -> None:
        """Bring back what `pages` returned before."""
        for place in self.pages().keys() - wanted.keys():
            os.pwrite(self.file, _ZERO, place)
        for place, page in wanted.items():
            os.pwrite(self.file, page, place)

    def owner(self, place: int) -> int:
        """The number of the buffer whose pages hold a place of the file."""
        return next(i for i, r in enumerate(self.regions) if r.offset <= place < r.offset + r.size)
