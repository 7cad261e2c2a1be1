"""Rewrites the constants of one line of LLVM IR into forms that LLVM 19 parses, with `bfloat` carried as `i16` bits.

Owns every spelling of a floating-point literal; the invariant is that the bits do not change.  `maca_ir` calls it for each line:
MetaX's compiler is an LLVM 19 (research on the SDK), while Triton 3.6 to 3.9 print the syntax of LLVM 22 to 24.
"""

from __future__ import annotations

import re
import struct

from flagtree.errors import ToolchainError

_HEX_DIGITS = {"half": 4, "bfloat": 4, "float": 8, "double": 16}
_MANTISSA = {"half": 10, "bfloat": 7, "float": 23, "double": 52}

# A name or a quoted string is matched first, so that `%inf` or "nan" is never taken for a literal.
_TOKEN = re.compile(
    r'(?P<skip>[%@!][\w.$-]+|"[^"]*")'
    r"|\b(?P<type>half|bfloat|float|double)\b"
    r"|(?<![\w.])(?P<literal>[+-]?(?:f0x[0-9A-Fa-f]+|0x[HR]?[0-9A-Fa-f]+|\d+\.\d*(?:e[+-]?\d+)?|inf\b|[qs]?nan\b(?:\(0x[0-9A-Fa-f]+\))?))"
)
_SPLAT = re.compile(r"splat \((\w+) ([^()]+)\)")
# What may be done with a bfloat when only its bits are carried.
_BFLOAT_MOVES = re.compile(
    r"\b(?:load|store|bitcast|extractelement|insertelement|extractvalue|insertvalue|select|phi|getelementptr|shufflevector|define|declare)\b"
    r"|@llvm\.amdgcn\.(?:mfma|fdot2)\b"
)


def lower_constants(line: str, where: str) -> str:
    """One line with LLVM 19 constants and no `bfloat`.

    Raises ToolchainError when the line computes in bfloat (only its bits can be moved) or holds a constant with no LLVM 19 spelling.
    """
    if "splat (" in line:
        line = _SPLAT.sub(lambda match: _spell_out(match, where), line)
    if "bfloat" in line and not _BFLOAT_MOVES.search(line):
        raise ToolchainError(
            "the MACA lowering met arithmetic in bfloat",
            where=where,
            why=f"line: {line.strip()}",
            hint="compute in float32 and round at the end",
        )
    seen = [""]

    def token(match: re.Match[str]) -> str:
        if match["type"]:
            seen[0] = match["type"]
            return "i16" if match["type"] == "bfloat" else match["type"]
        if match["skip"] is not None or not seen[0]:
            return match[0]
        return _literal(match["literal"], seen[0], where)

    return _TOKEN.sub(token, line)


def _spell_out(match: re.Match[str], where: str) -> str:
    """A splat as a vector; its length is that of the last vector type of the same element before it."""
    scalar_type, value = match.groups()
    counts = re.findall(rf"<(\d+) x {scalar_type}>", match.string[: match.start()])
    if not counts:
        raise ToolchainError("the MACA lowering cannot size a splat constant", where=where, why=f"line: {match.string.strip()}")
    return f"<{', '.join([f'{scalar_type} {value}'] * int(counts[-1]))}>"


def _literal(text: str, kind: str, where: str) -> str:
    """`text`, a constant of floating type `kind`, spelled for LLVM 19 (for bfloat: its bits as an integer)."""
    bits = _bits(text, kind)
    if bits is None:
        raise ToolchainError("a floating-point constant has no LLVM 19 spelling", where=where, why=f"{kind} {text}")
    if kind == "bfloat":
        return str(bits)
    if kind == "half":
        return f"0xH{bits:04X}"
    if "." in text and _bits(repr(float(text)), kind) == bits and float(text) == _value(bits, kind):
        return text  # an exact decimal reads better than its bits
    return f"0x{_as_double(bits) if kind == 'float' else bits:016X}"


def _bits(text: str, kind: str) -> int | None:
    """The bit pattern of a literal in its own type; None for an unknown spelling."""
    sign = text.startswith("-")
    body = text.lstrip("+-")
    width, mantissa = 4 * _HEX_DIGITS[kind], _MANTISSA[kind]
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    if body == "inf":
        bits = infinity
    elif body in ("nan", "qnan"):
        bits = infinity | (1 << (mantissa - 1))
    elif body.startswith("f0x"):
        if len(body) - 3 != _HEX_DIGITS[kind]:
            return None
        bits = int(body[3:], 16)
    elif body.startswith(("0xH", "0xR")):
        bits = int(body[3:], 16)
    elif body.startswith("0x"):
        bits = int(body[2:], 16)
        if kind != "double":  # old syntax writes a float constant as the double of the same value
            bits = _from_double(bits, kind)
    elif "nan" in body:
        return None
    else:
        bits = _encode(float(body), kind)
    return bits | (1 << (width - 1)) if sign else bits


def _encode(value: float, kind: str) -> int:
    """Round to nearest even, as LLVM reads a decimal constant."""
    if kind == "bfloat":
        bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    code, size = {"half": ("<e", "<H"), "float": ("<f", "<I"), "double": ("<d", "<Q")}[kind]
    packed: int = struct.unpack(size, struct.pack(code, value))[0]
    return packed


def _value(bits: int, kind: str) -> float:
    code, size = {"float": ("<f", "<I"), "double": ("<d", "<Q")}[kind]
    value: float = struct.unpack(code, struct.pack(size, bits))[0]
    return value


def _as_double(bits: int) -> int:
    """The double with the value of these float32 bits; NaN payloads are kept (a cast would quiet a signalling NaN)."""
    if (bits >> 23) & 0xFF == 0xFF:
        return (bits >> 31) << 63 | 0x7FF << 52 | (bits & 0x7FFFFF) << 29
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return _encode(value, "double")


def _from_double(bits: int, kind: str) -> int:
    if kind == "float" and (bits >> 52) & 0x7FF == 0x7FF:
        return (bits >> 63) << 31 | 0xFF << 23 | (bits >> 29) & 0x7FFFFF
    return _encode(_value(bits, "double"), kind)
