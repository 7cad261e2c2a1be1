"""A recording stand-in for MetaX's software: an SDK folder with `mxcc` and `llvm-link`, and a Python whose Triton has MetaX's backend.

Each call is one line of JSON in `record`; `behave` says what the tools do with a kernel.  The binaries are ELF files that define the
kernel and do nothing.  Where the true tool would look at its input, so does the stand-in: a wrong file is an error here too.
"""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METAX_ELF, CUDA_ELF = 0xFD, 190


def elf(symbol: str, machine: int = METAX_ELF, defined: bool = True) -> bytes:
    """A little-endian ELF64 file with a section .text and one symbol in it."""
    names = b"\0.text\0.symtab\0.strtab\0"
    strings = b"\0" + symbol.encode() + b"\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x12, 0, 1 if defined else 0, 0, 4)
    bodies = [b"", b"code", symbols, strings, names]
    kinds = [0, 1, 2, 3, 3]
    at = [0, 1, 7, 15, 15]
    offset, headers, data = 64, b"", b""
    for kind, name, body in zip(kinds, at, bodies, strict=True):
        headers += struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, len(body), 3 if kind == 2 else 0, 0, 1, 24 if kind == 2 else 0)
        data += body
        offset += len(body)
    head = b"\x7fELF\x02\x01" + bytes(10) + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, offset, 0, 64, 0, 0, 64, len(bodies), 4)
    return head + data + headers


def offload_bundle(*entries: tuple[str, bytes]) -> bytes:
    """Clang's container: magic, count, then (offset, size, length of id, id), then the images."""
    table = sum(24 + len(name) for name, _ in entries)
    at = 32 + table
    out = b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", len(entries))
    for name, image in entries:
        out += struct.pack("<QQQ", at, len(image), len(name)) + name.encode()
        at += len(image)
    return out + b"".join(image for _, image in entries)


_COMPILER = """#!{python}
import hashlib, json, os, re, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from vendor_sdk import elf
sdk = Path({sdk!r})
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("mxcc version 1.0.0 (stand-in)")
    sys.exit(0)
out = Path(arguments[arguments.index("-o") + 1])
source = next(Path(a) for a in arguments if a.endswith(".ll"))
text = source.read_text()
function = re.search(r"define metaxgpu_kernel void @(\\w+)", text)[1]
behaviour = json.loads((sdk / "behave.json").read_text())
with open(sdk / "record", "a") as record:
    record.write(json.dumps({{"tool": Path(sys.argv[0]).name, "process": os.getpid(), "arguments": arguments, "function": function,
                              "input": hashlib.sha256(source.read_bytes()).hexdigest()}}) + "\\n")
how = behaviour.get(function, behaviour.get("*", ""))
if how == "fail":
    sys.exit("error: cannot select: t12: f32 = fminimum")
if how == "hang":
    time.sleep(60)
if "-device-bin" not in arguments:
    assert "mxc-metax-macahca" in text, "the input is no MACA LLVM IR"
    out.write_text(text)
elif how == "nonsense":
    out.write_bytes(b"usage: mxcc [options] file...\\n" * 4)
elif how == "other symbol":
    out.write_bytes(elf("main"))
elif how == "other machine":
    out.write_bytes(elf(function, machine=62))
elif how != "silent":
    out.write_bytes(elf(function))
"""

_TRITON = {
    "__init__.py": """
__version__ = {version!r}
from .compiler import compile
from . import language
def jit(f=None, **options): return f or (lambda g: g)
""",
    "language/__init__.py": """
class _Any:
    def __call__(self, *a, **k): return a[0] if a else None
    def __getattr__(self, name): return _Any()
def __getattr__(name): return _Any()
""",
    "backends/__init__.py": """
class Compiler:
    @staticmethod
    def supports_target(target): return target.backend == {backend!r}
class Backend: compiler = Compiler
backends = {{"metax": Backend}}
""",
    "backends/compiler.py": """
from collections import namedtuple
GPUTarget = namedtuple("GPUTarget", "backend arch warp_size")
""",
    "compiler/__init__.py": """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.append({here!r})
from vendor_sdk import elf, offload_bundle
home = Path({home!r})
class AttrsDescriptor:
    def __init__(self, divisible_by_16=None, equal_to_1=None): self.divisible = list(divisible_by_16)
class ASTSource:
    def __init__(self, fn, signature, constants=None, attrs=None):
        self.name = fn.__name__
        self.said = {{"signature": list(map(list, signature.items())), "constants": constants,
                      "divisible": attrs.divisible if hasattr(attrs, "divisible") else sorted(k for (k,) in attrs)}}
        if {version!r}.startswith("3.1."):
            assert all(isinstance(k, int) for k in signature)
        self.text = "tt.func @%s(%s) {{tt.divisibility = 16 : i32}}" % (self.name, self.said["divisible"])
def compile(src, target=None, options=None):
    if isinstance(src, str):
        text = Path(src).read_text()
        said = {{"ttgir": text}}
        name = Path(src).stem
        assert "divisibility" not in text
    else:
        said, name, text = src.said, src.name, src.text
    how = json.loads((home / "behave.json").read_text())
    how = how.get(name, how.get("*", {{}}))
    with open(home / "record", "a") as record:
        record.write(json.dumps({{"function": name, "target": list(target), "options": options, **said,
                                  "cache": os.environ["TRITON_CACHE_DIR"].startswith("/")}}) + "\\n")
    if "raise" in how: raise RuntimeError(how["raise"])
    if "exit" in how: os._exit(how["exit"])
    if "sleep" in how: time.sleep(how["sleep"])
    arguments = how.get("arguments", 6)
    kinds = ", ".join(["ptr addrspace(1) nocapture align 16 %%%d" % k for k in range(arguments)])
    llir = "define metaxgpu_kernel void @%s(%s) #0 {{" % (name, kinds)
    image = how.get("image") or elf(how.get("symbol", name))
    if isinstance(image, str): image = image.encode()
    if how.get("bundle"): image = offload_bundle(("host-x86_64", b""), ("maca-mxc-metax-macahca--xcore1000", image))
    meta = SimpleNamespace(name=how.get("name", name), shared=how.get("shared", 96), num_warps=how.get("warps", options["num_warps"]))
    return SimpleNamespace(asm={{"ttgir": text, "llir": llir, "mcfatbin": image}}, metadata=meta)
""",
}


@dataclass(frozen=True)
class StandIn:
    """One of the two: `home` has `record` and `behave.json`.  `python`: the Python with MetaX's Triton, if it is that one."""

    home: Path
    python: str = ""

    def behave(self, **how: Any) -> None:
        """By function, or "every" for all: for the SDK a word, for Triton a mapping."""
        (self.home / "behave.json").write_text(json.dumps({("*" if k == "every" else k): v for k, v in how.items()}))

    def calls(self) -> list[dict[str, Any]]:
        """What was recorded since the last time that this was asked."""
        record = self.home / "record"
        lines = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


def make_sdk(home: Path) -> StandIn:
    """A folder for MACA_PATH."""
    tools = home / "mxgpu_llvm" / "bin"
    tools.mkdir(parents=True)
    for name in ("mxcc", "llvm-link"):
        (tools / name).write_text(_COMPILER.format(python=sys.executable, here=str(Path(__file__).parent), sdk=str(home)))
        (tools / name).chmod(0o755)
    made = StandIn(home)
    made.behave()
    return made


def make_triton(home: Path, version: str = "3.1.0", backend: str = "maca") -> StandIn:
    """A Python whose `triton` is the stand-in."""
    for name, text in _TRITON.items():
        file = home / "site" / "triton" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(version=version, backend=backend, home=str(home), here=str(Path(__file__).parent)))
    python = home / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{home / "site"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    made = StandIn(home, str(python))
    made.behave()
    return made
