"""How each scalar operation, conversion and literal of the IR is spelled in C++ on vector registers.

A value of dtype d lives in a register type `register(d)`: half floats as f32 that is already rounded, narrow integers as
wrapped i32, b1 as an i32 mask.  `cpp_body` writes statements with these expressions; the functions named are in templates/cpp_*.h.
"""

from __future__ import annotations

import math
import struct

from flagtree.errors import CodegenError
from flagtree.ir.dtypes import DTYPES, round_e4m3
from flagtree.ir.program import Scalar

REGISTERS = {
    "f32": "f32", "bf16": "f32", "f16": "f32", "f8e4m3fn": "f32", "f64": "f64",
    "b1": "i32", "i8": "i32", "u8": "i32", "i16": "i32", "i32": "i32", "i64": "i64",
}  # fmt: skip
MEMORY = {"b1": "u8", "bf16": "u16", "f16": "u16", "f8e4m3fn": "u8"}  # element types in memory that differ from the dtype's name

BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
          "and": "&", "or": "|", "xor": "^"}  # fmt: skip
PREFIX = {"neg": "-", "not": "~"}
CALLS = {
    "floordiv": "divide_floor", "truncdiv": "divide_trunc", "mod": "modulo", "abs": "absolute", "min": "minimum", "max": "maximum",
    "sqrt": "square_root", "floor": "floor_of", "ceil": "ceil_of", "trunc": "trunc_of", "round": "round_even",
    "copysign": "copy_sign", "sign": "sign_of",
    **{n: n + "_of" for n in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "asin", "acos",
                              "atan", "sinh", "cosh", "erf", "erfc", "pow", "atan2")},
}  # fmt: skip
BOOLEAN = {  # on masks: true is -1
    "eq": "~({0} ^ {1})", "ne": "{0} ^ {1}", "lt": "~{0} & {1}", "le": "~{0} | {1}", "gt": "{0} & ~{1}", "ge": "{0} | ~{1}",
    "min": "{0} & {1}", "max": "{0} | {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}",
}  # fmt: skip
# where every lane holds the same: slow instructions on one of them
ALIKE = {"div": "quotient_alike({0}, {1})", "sqrt": "root_alike({0})", "rsqrt": "inverse_root_alike({0})"}
COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
# results that are representable when the operands are: no rounding
UNROUNDED = frozenset(("neg", "abs", "min", "max", "floor", "ceil", "trunc", "round", "copysign", "sign", "where", "fmod"))
UNWRAPPED = frozenset(("min", "max", "sign", "where", "and", "or", "xor", "shr", "mod", "fmod"))
BITCASTS = {
    ("f32", "i32"): "bits({0})", ("i32", "f32"): "floats({0})", ("f64", "i64"): "bits64({0})", ("i64", "f64"): "floats64({0})",
    ("bf16", "i16"): "bits({0}) >> 16", ("i16", "bf16"): "floats({0} << 16)",
    ("f16", "i16"): "widen_i16((i16v)narrow_f16({0}))", ("i16", "f16"): "widen_f16((u16v)narrow_i16({0}))",
    ("f8e4m3fn", "u8"): "widen_u8(narrow_f8e4m3fn({0}))", ("u8", "f8e4m3fn"): "widen_f8e4m3fn(narrow_u8({0}))",
    ("i8", "u8"): "wrap_u8({0})", ("u8", "i8"): "wrap_i8({0})",
}  # fmt: skip


def register(dtype: str) -> str:
    """Element type of the register that holds values of `dtype`; its vector type adds a "v"."""
    return REGISTERS[dtype]


def memory(dtype: str) -> str:
    """C++ element type of a buffer of `dtype`."""
    return MEMORY.get(dtype, dtype)


def round_to(value: float, dtype: str) -> float:
    """A literal rounded to `dtype` as PyTorch rounds it (double to f32, then to the half type)."""
    if dtype == "f8e4m3fn":
        return round_e4m3(value)
    if not math.isfinite(value) or dtype == "f64":
        return value
    try:
        single = struct.unpack("<f", struct.pack("<f", value))[0]
        if dtype == "f16":
            return struct.unpack("<e", struct.pack("<e", single))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    if dtype != "bf16":
        return single
    bits = struct.unpack("<I", struct.pack("<f", single))[0]
    return struct.unpack("<f", struct.pack("<I", ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000)))[0]


def literal(value: Scalar, dtype: str) -> str:
    """A literal of `dtype` as a scalar of its register type."""
    if DTYPES[dtype].is_float:
        number = round_to(float(value), dtype)
        suffix = "" if dtype == "f64" else "f"
        if math.isnan(number):
            return f"__builtin_nan{suffix}(\"\")"
        if math.isinf(number):
            return f"{'-' if number < 0 else ''}__builtin_inf{suffix}()"
        text = repr(number) if float(repr(number)) == number and abs(number) < 1e6 and number == int(number) else number.hex()
        return text + suffix
    if dtype == "b1":
        return "-1" if value else "0"
    bits = DTYPES[dtype].bits
    wrapped = int(value) & ((1 << bits) - 1)
    if DTYPES[dtype].kind == "int" and wrapped >> (bits - 1):
        wrapped -= 1 << bits
    if dtype == "i64":
        return f"i64({wrapped}ll)" if wrapped != -(2**63) else "i64(-9223372036854775807ll - 1)"
    return str(wrapped) if wrapped != -(2**31) else "(-2147483647 - 1)"


def splat(value: Scalar, dtype: str) -> str:
    """A literal in every lane."""
    text = literal(value, dtype)
    return f"splat({text})" if DTYPES[dtype].is_float or dtype == "i64" else f"splat(i32({text}))"


def rounded(text: str, dtype: str) -> str:
    """`text`, of the register type of `dtype`, rounded or wrapped to it."""
    if dtype in ("bf16", "f16", "f8e4m3fn"):
        return f"round_{dtype}({text})"
    return f"wrap_{dtype}({text})" if dtype in ("i8", "u8", "i16") else text


def cast(text: str, source: str, target: str) -> str:
    """A value conversion between dtypes."""
    if source == target:
        return text
    if target == "b1":
        return f"mask({text} != 0)"
    if source == "b1":
        text = f"({text} & 1)"
    a, b = register(source), register(target)
    if a != b:
        text = f"to_{b}({text})"
    narrow = source in ("i8", "u8") and target in ("i16", "f16")
    wider = (source in ("bf16", "f16") and target == "f32") or (source == "f8e4m3fn" and DTYPES[target].is_float)
    exact = source == "b1" or wider or narrow
    return text if exact else rounded(text, target)


def bitcast(text: str, source: str, target: str) -> str:
    """The same bits under another dtype; CodegenError for a pair of unlike widths."""
    if source == target:
        return text
    if (source, target) not in BITCASTS:
        raise CodegenError(f"cannot generate C++ for a bitcast from {source} to {target}")
    return BITCASTS[source, target].format(text)


def compute(op: str, dtype: str, args: tuple[str, ...], alike: bool = False) -> str:
    """One operation on operands of `dtype`: an expression of its result's register type (a mask for comparisons).  `alike`: vectors all,
    each the same in every lane."""
    if op in ("isnan", "isinf"):
        return f"mask({args[0]} != {args[0]})" if op == "isnan" else f"mask(absolute({args[0]}) == {literal(math.inf, dtype)})"
    if op == "where":
        return f"select({', '.join(args)})"
    if dtype == "b1":
        if op not in BOOLEAN:
            raise CodegenError(f"cannot generate C++ for '{op}' on b1")
        return BOOLEAN[op].format(*(a if a.isidentifier() else f"({a})" for a in args))
    if op in COMPARISONS:
        return f"mask({args[0]} {BINARY[op]} {args[1]})"
    if alike and op in ALIKE and DTYPES[dtype].is_float:
        text = ALIKE[op].format(*args)
    elif op in ("shl", "shr"):
        name = "shift_left" if op == "shl" else "shift_right"
        text = f"{name}({args[0]}, {args[1]}, {DTYPES[dtype].bits})"
    elif op == "rsqrt":
        text = f"1 / square_root({args[0]})"
    elif op == "fmod":
        text = f"{'fmod_of' if DTYPES[dtype].is_float else 'remainder_trunc'}({', '.join(args)})"
    elif op in BINARY:
        text = f"{args[0]} {BINARY[op]} {args[1]}"
    elif op in PREFIX:
        text = f"{PREFIX[op]}{args[0]}"
    elif op in CALLS:
        text = f"{CALLS[op]}({', '.join(args)})"
    else:
        raise CodegenError(f"cannot generate C++ for the operation '{op}'")
    keeps = UNROUNDED if DTYPES[dtype].is_float else UNWRAPPED
    return text if op in keeps else rounded(text, dtype)
