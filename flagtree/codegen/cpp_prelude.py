"""The C++ prelude: fragments of templates/cpp_*.h, of which a kernel's source gets exactly those that it names.

A fragment is included when an identifier it defines occurs in the kernel or in an included fragment; order is that of the files.
So a source stays short and compiles in well under a second without including any header.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

FILES = ("cpp_vectors.h", "cpp_scalar_ops.h", "cpp_math.h", "cpp_reduce.h", "cpp_gemm.h", "cpp_pairs.h", "cpp_attention.h",
         "cpp_attention_pairs.h")  # fmt: skip
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_MARK = re.compile(r"^//@ (.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Fragment:
    """`names` it defines, its text and every identifier that it uses."""

    names: frozenset[str]
    text: str
    uses: frozenset[str]


@functools.cache
def fragments() -> tuple[Fragment, ...]:
    """All fragments in file order."""
    folder = Path(__file__).parent / "templates"
    out = []
    for name in FILES:
        parts = _MARK.split((folder / name).read_text(encoding="utf-8"))[1:]
        for names, text in zip(parts[::2], parts[1::2], strict=True):
            uses = frozenset(_IDENTIFIER.findall(re.sub(r"//[^\n]*", "", text)))
            out.append(Fragment(frozenset(names.split()), text.strip("\n"), uses))
    return tuple(out)


def prelude(code: str) -> str:
    """The fragments that `code` needs, themselves complete, "base" always first."""
    wanted = set(_IDENTIFIER.findall(code)) | {"base"}
    chosen: set[int] = set()
    grown = True
    while grown:
        grown = False
        for i, fragment in enumerate(fragments()):
            if i not in chosen and fragment.names & wanted:
                chosen.add(i)
                wanted |= fragment.uses
                grown = True
    return "\n".join(fragments()[i].text for i in sorted(chosen)) + "\n"
