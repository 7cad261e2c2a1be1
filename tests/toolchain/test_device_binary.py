"""Binaries are believed only when they are binaries of the chip and define the kernel; damaged ones are one error, never a crash."""

from __future__ import annotations

import random

import pytest

from flagtree.errors import ToolchainError
from flagtree.targets import stock_triton
from flagtree.toolchain.device_binary import check
from tests.codegen.triton_kernels import GFX942, SM80, SM90, keyed
from tests.scheduled import build_triton
from tests.toolchain.vendor_sdk import CUDA_ELF, elf, offload_bundle

METAX = ("maca-mxc-metax-macahca--xcore1000", elf("ft_1"))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (elf("ft_1"), "mcfatbin"),
        (elf("ft_1"), "devbin"),
        (offload_bundle(("host-x86_64-unknown-linux", b""), METAX), "mcfatbin"),
        (b"\xde\xc0\x17\x0b" + bytes(16) + b"BC\xc0\xdeft_1", "mcfatbin"),
        (elf("ft_1", CUDA_ELF), "cubin"),
    ],
)
def test_what_a_loader_takes(data: bytes, kind: str) -> None:
    assert check(data, kind, "ft_1", "here") == {}


@pytest.mark.parametrize(
    ("data", "kind", "why"),
    [
        (b"usage: mxcc [options] file...", "mcfatbin", "no 64-bit ELF file; 29 bytes, beginning with 75 73 61 67"),
        (b"", "devbin", "0 bytes, beginning with nothing"),
        (elf("ft_1", machine=62), "devbin", "for machine 0x3e, not 0xfd"),
        (elf("ft_2"), "mcfatbin", "does not define ft_1"),
        (elf("ft_1", defined=False), "mcfatbin", "does not define ft_1"),
        (elf("ft_1")[:200], "mcfatbin", ""),
        (offload_bundle(("hip-amdgcn--gfx90a", elf("ft_1"))), "mcfatbin", "without MetaX's part; it has hip-amdgcn--gfx90a"),
        (offload_bundle(METAX)[:200], "mcfatbin", "cut off"),
        (b"\xde\xc0\x17\x0b" + bytes(16) + b"BC\xc0\xdeft_2", "mcfatbin", "does not name ft_1"),
        (offload_bundle(METAX), "devbin", "no 64-bit ELF"),
    ],
)
def test_what_is_refused(data: bytes, kind: str, why: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        check(data, kind, "ft_1", "here")
    assert why in caught.value.why and caught.value.where == "here" and caught.value.hint


def test_damage_is_an_error_and_never_a_crash() -> None:
    dice = random.Random(7)
    whole = offload_bundle(METAX)
    refused = 0
    for _ in range(4000):
        data = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.choice((0, 1, 127, 255, dice.randrange(256)))
        try:
            check(bytes(data[: dice.choice((len(data), dice.randrange(len(data))))]), "mcfatbin", "ft_1", "here")
        except ToolchainError:
            refused += 1
    assert 1000 < refused < 4000


@pytest.mark.skipif(bool(stock_triton.problem()), reason=stock_triton.problem() or "Triton is here")
def test_real_binaries_and_what_a_cubin_tells() -> None:
    """cuobjdump and the PTX said the same of these when they were built."""
    for target, kind in ((SM80, "cubin"), (SM90, "cubin"), (GFX942, "hsaco")):
        (built,) = build_triton([keyed("softmax")], target, 1)
        for name, variant in built.launch["variants"].items():  # type: ignore[attr-defined]
            told = check(built.files[variant["file"]], kind, str(built.launch["function"]), name)
            wanted = {k: built.facts[name][k] for k in ("registers", "spills")}  # type: ignore[index]
            arguments = len(built.launch["signature"]) + variant["null_pointers"]  # type: ignore[arg-type]
            assert told == ({**wanted, "arguments": arguments} if kind == "cubin" else {})
