"""What a device compiler left behind, looked at before it is believed: the container, the kernel's symbol, and what the file tells.

A file that is no binary of the chip, or that does not define the kernel, is a ToolchainError; nothing here executes or loads one.
Reads hostile bytes: every offset is checked.  Used by toolchain.last_step before a tier is raised.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from flagtree.errors import ToolchainError

# e_machine: NVIDIA's CUDA and AMD's GPUs as in LLVM's BinaryFormat/ELF.h; MetaX's as public reports of mxcc's output have it
MACHINES = {"cubin": 190, "hsaco": 224, "mcfatbin": 0xFD, "devbin": 0xFD}
OFFLOAD_BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"  # clang's "ClangOffloadBundler": magic, count, then (offset, size, length of id, id)
WRAPPED_BITCODE = b"\xde\xc0\x17\x0b"         # LLVM's bitcode wrapper, 0x0B17C0DE; mcModuleLoadData takes it (public reports)
_MOST = 1 << 16  # sections, symbols of one table and entries of a bundle: far above any kernel's
# EIATTR numbers of a cubin's .nv.info, as cuobjdump and public readers of it have them: (format 4, number, size, value)
_KPARAM_INFO, _REGCOUNT, _FRAME_SIZE = 0x17, 0x2F, 0x11


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    data: bytes
    link: int


def check(data: bytes, kind: str, function: str, where: str) -> dict[str, int]:
    """What the file tells of `function`: `arguments`, `registers`, `spills` (stack bytes a thread) for a cubin, nothing for others.

    `kind` is one of MACHINES.  ToolchainError when `data` is no binary of that kind or does not define the function.
    """
    try:
        if kind == "mcfatbin" and data.startswith(OFFLOAD_BUNDLE):
            data = _device_part(data)
        elif kind == "mcfatbin" and data.startswith(WRAPPED_BITCODE):
            if function.encode() not in data:
                raise ValueError(f"the bitcode does not name {function}")
            return {}
        machine, sections = _elf(data)
        if machine != MACHINES[kind]:
            raise ValueError(f"it is an ELF file for machine {machine:#x}, not {MACHINES[kind]:#x}")
        if function not in _defined(sections):
            raise ValueError(f"it does not define {function}")
        return _told(sections, function) if kind == "cubin" else {}
    except (ValueError, IndexError, OverflowError, struct.error) as error:
        why = f"{error}; {len(data)} bytes, beginning with {data[:8].hex(' ') or 'nothing'}"
        hint = "the bundle is as it was; run the tool by hand on the bundle's own files to see what it says"
        raise ToolchainError(f"the toolchain's result is no {kind} with this kernel", where=where, why=why, hint=hint) from None


def _elf(data: bytes) -> tuple[int, list[_Section]]:
    """(e_machine, sections) of a little-endian ELF64 file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it is no 64-bit ELF file")
    machine, table, size, count, names = struct.unpack_from("<18xH20xQ10xHHH", data)
    if not 0 < count < _MOST or size < 64:
        raise ValueError("its table of sections is damaged")
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + k * size) for k in range(count)]
    bodies = [b"" if kind == 8 else _slice(data, offset, length) for _, kind, _, _, offset, length, *_ in headers]  # 8 is SHT_NOBITS
    return machine, [_Section(_text(bodies[names], h[0]), body, h[6]) for h, body in zip(headers, bodies, strict=True)]


def _slice(data: bytes, offset: int, length: int) -> bytes:
    if offset + length > len(data):
        raise ValueError("it is cut off")
    return data[offset : offset + length]


def _text(table: bytes, offset: int) -> str:
    if offset >= len(table):
        raise ValueError("a name lies outside of its table")
    return table[offset : table.find(b"\0", offset)].decode("utf-8", "replace")


def _symbols(sections: list[_Section]) -> Iterator[tuple[int, str, int]]:
    """(number, name, section) of each symbol."""
    for section in sections:
        if section.name in (".symtab", ".dynsym"):
            for k in range(min(len(section.data) // 24, _MOST)):
                name, _, _, home, _, _ = struct.unpack_from("<IBBHQQ", section.data, 24 * k)
                yield k, _text(sections[section.link].data, name), home


def _defined(sections: list[_Section]) -> set[str]:
    return {name for _, name, home in _symbols(sections) if home}


def _told(sections: list[_Section], function: str) -> dict[str, int]:
    """Arguments, registers and stack of a kernel, where the cubin's .nv.info sections say them."""
    numbers = {k for k, name, _ in _symbols(sections) if name == function}
    told: dict[str, int] = {}
    for section in sections:
        if section.name == f".nv.info.{function}":
            told["arguments"] = sum(attribute == _KPARAM_INFO for attribute, _ in _attributes(section.data))
        elif section.name == ".nv.info":
            for attribute, value in _attributes(section.data):
                name = {_REGCOUNT: "registers", _FRAME_SIZE: "spills"}.get(attribute)
                if name and len(value) == 8 and struct.unpack("<II", value)[0] in numbers:
                    told[name] = struct.unpack("<II", value)[1]
    return told


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        layout, attribute, size = struct.unpack_from("<BBH", data, at)
        length = size if layout == 4 else 0  # the other formats keep their value in the place of the size
        yield attribute, data[at + 4 : at + 4 + length]
        at += 4 + length


def _device_part(data: bytes) -> bytes:
    """The image for MetaX's chip in a clang offload bundle."""
    at = len(OFFLOAD_BUNDLE)
    (count,) = struct.unpack_from("<Q", data, at)
    at += 8
    seen = []
    for _ in range(min(count, _MOST)):
        offset, size, length = struct.unpack_from("<QQQ", data, at)
        name = _slice(data, at + 24, length).decode("utf-8", "replace")
        if "mxc-metax" in name:
            return _slice(data, offset, size)
        seen.append(name)
        at += 24 + length
    raise ValueError(f"it is an offload bundle without MetaX's part; it has {', '.join(seen)[:200] or 'none'}")
