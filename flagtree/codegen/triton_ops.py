"""How each operation and combiner of the IR is spelled in triton.language, in the subset that Triton 3.1 to 3.9 share.

Invariant: an operation that the table calls exact gives the interpreter's bits (IEEE division and root, NaN-propagating
extrema, explicit rounding).  Place in the flow: codegen/triton.py asks for one expression a body op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flagtree.errors import CodegenError
from flagtree.ir.dtypes import DTYPES, round_e4m3
from flagtree.ir.ops import OPS
from flagtree.ir.program import Arg, Compute, Scalar

# in registers; a bool is an i1.  e4m3fn is its byte, converted by integer arithmetic: Triton has the type only from compute capability 8.9
# on, its release 3.1 not for 8.0, AMD's and MetaX's chips not at all
TYPES: dict[str, str] = {
    "b1": "tl.int1", "u8": "tl.uint8", "i8": "tl.int8", "i16": "tl.int16", "i32": "tl.int32", "i64": "tl.int64",
    "f16": "tl.float16", "bf16": "tl.bfloat16", "f32": "tl.float32", "f64": "tl.float64",
    "f8e4m3fn": "tl.uint8", "f8e5m2": "tl.float8e5",
}  # fmt: skip
# in memory; a bool is one byte
POINTERS: dict[str, str] = {
    "b1": "*i8", "u8": "*u8", "i8": "*i8", "i16": "*i16", "i32": "*i32", "i64": "*i64",
    "f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "f64": "*fp64", "f8e4m3fn": "*u8", "f8e5m2": "*fp8e5",
}  # fmt: skip
CONVERSIONS = ("f8e4m3fn_of", "f8e4m3fn_value")  # functions of templates/triton_math.py.j2 that `cast` and `literal` call
_SMALLEST_F32 = 2.0**-126  # triton.language types a literal below it, or above the largest f32, as f64
_LARGEST_F32 = 3.4028234663852886e38


def working_type(dtype: str) -> str:
    """Where arithmetic on `dtype` happens: narrow floats in f32 (one rounding of the exact result is the narrow result for
    + - * / and sqrt, as f32 has more than twice their precision), narrow integers in i32 (then wrapped)."""
    d = DTYPES[dtype]
    if d.is_float:
        return "f64" if d.bits == 64 else "f32"
    return "i64" if d.bits == 64 else "i32" if d.kind != "bool" else "b1"


def literal(value: Scalar, dtype: str) -> str:
    """A constant of exactly that type, whatever rule the Triton release has for literals."""
    d = DTYPES[dtype]
    if dtype == "f8e4m3fn":
        return f"tl.full((), {_e4m3_byte(float(value))}, tl.uint8)"
    if d.is_float:
        x = float(value)
        text = f'float("{x}")' if math.isinf(x) or math.isnan(x) else repr(x)
        plain = x == 0.0 or not math.isfinite(x) or _SMALLEST_F32 < abs(x) <= _LARGEST_F32
        if x == 0.0 and math.copysign(1.0, x) > 0 and dtype != "f32":
            return f"tl.full((), 0.0, {TYPES[dtype]})"
        if d.bits < 32:  # not every release makes a narrow constant
            return f"tl.full((), {text}, tl.float32).to({TYPES[dtype]})"
        return text if dtype == "f32" and plain else f"tl.full((), {text}, {TYPES[dtype]})"
    if d.kind == "bool":
        return f"tl.full((), {int(bool(value))}, tl.int1)"
    return str(int(value)) if dtype == "i32" else f"tl.full((), {int(value)}, {TYPES[dtype]})"


def _e4m3_byte(value: float) -> int:
    number = round_e4m3(value)
    if math.isnan(number):
        return 127
    fraction, exponent = math.frexp(abs(number))
    byte = int(abs(number) * 512) if abs(number) < 2**-6 else (exponent + 6 << 3) + int(fraction * 16) - 8
    return byte | (128 if math.copysign(1.0, number) < 0 else 0)


def cast(text: str, source: str, to: str) -> str:
    """Value conversion as ATen does it: round to nearest even, floats truncate to integers, anything but zero is true."""
    if source == to:
        return text
    if source == "f8e4m3fn":
        return cast(f"f8e4m3fn_value({text})", "f32", to)
    if to == "f8e4m3fn":
        return f"f8e4m3fn_of({cast(text, source, 'f32')})"
    if to == "b1":
        return f"({text} != {literal(0, source)})"
    narrow = DTYPES[source].is_float and DTYPES[to].is_float and DTYPES[source].bits == DTYPES[to].bits == 16
    if narrow or (source == "b1" and DTYPES[to].is_float) or (DTYPES[source].bits == 8 and DTYPES[source].is_float and to != "f32"):
        middle = "tl.int32" if source == "b1" else "tl.float32"
        return f"{_postfix(text)}.to({middle}).to({TYPES[to]})"
    return f"{_postfix(text)}.to({TYPES[to]})"


def _postfix(text: str) -> str:
    """`text` so that a method call may follow it."""
    whole = text.isidentifier() or closed(text) or text.startswith(("tl.", *(f"{name}(" for name in CONVERSIONS)))
    return text if whole else f"({text})"


def closed(text: str) -> bool:
    """Whether one pair of parentheses holds the whole text."""
    if not (text.startswith("(") and text.endswith(")")):
        return False
    depth = 0
    for k, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and k < len(text) - 1:
            return False
    return True


def bare(text: str) -> str:
    """`text` without a pair of parentheses around the whole of it."""
    return text[1:-1] if closed(text) else text


_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
          "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}  # fmt: skip
_INTEGER_CALLS = {
    "floordiv": "floor_div",
    "mod": "floor_mod",
    "truncdiv": "trunc_div",
    "fmod": "trunc_mod",
    "min": "int_min",
    "max": "int_max",
}
# f32 only, from templates/triton_math.py.j2
_CALLS = {"round": "round_even", "trunc": "trunc", "copysign": "copysign", "sign": "sign", "expm1": "expm1", "log": "log", "log2": "log2",
          "log10": "log10", "log1p": "log1p", "tan": "tan", "tanh": "tanh", "asin": "asin", "acos": "acos", "atan": "atan", "sinh": "sinh",
          "cosh": "cosh", "erf": "erf", "erfc": "erfc", "pow": "pow", "atan2": "atan2"}  # fmt: skip
_BUILTIN_F64 = {"log", "log2", "sin", "cos", "erf"}  # triton.language has them in f64, through the device's math library


class Speller:
    """Spells Compute ops over values of known dtypes; `need` is told each helper function that the text calls."""

    def __init__(self, dtypes: Mapping[str, str], need: Callable[[str], None]) -> None:
        self.dtypes, self.need = dtypes, need

    def operand(self, arg: Arg, dtype: str, to: str | None = None) -> str:
        """A value or literal of `dtype`, converted to `to`."""
        to = to or dtype
        if not isinstance(arg, str):
            return literal(arg, to)
        return cast(arg, self.dtypes[arg], to)

    def compute(self, op: Compute) -> str:
        """The expression of one op, of exactly the op's dtype.  CodegenError for what has no portable spelling."""
        if op.op == "cast":
            source = self._type_of(op)
            return self.operand(op.args[0], source, op.dtype)
        if op.op == "bitcast":
            return self._bitcast(op)
        if op.op == "where":
            c = self.operand(op.args[0], "b1")
            a, b = (self.operand(x, op.dtype) for x in op.args[1:])
            return f"tl.where({c}, {a}, {b})"
        dtype = op.dtype if OPS[op.op].result == "same" else self._type_of(op)
        work = working_type(dtype)
        text = self._spell(op, work, [self._term(a, op, dtype, work) for a in op.args])
        return text if OPS[op.op].result == "b1" else cast(text, work, op.dtype)

    def _term(self, arg: Arg, op: Compute, dtype: str, work: str) -> str:
        """An operand; a small integer beside a named i64 value needs no type of its own."""
        plain = work == "i64" and isinstance(arg, int) and abs(arg) < 2**31 and op.op in _INFIX and any(isinstance(a, str) for a in op.args)
        return str(int(arg)) if plain else self.operand(arg, dtype, work)

    def _type_of(self, op: Compute) -> str:
        named = next((a for a in op.args if isinstance(a, str)), None)
        if named is not None:
            return self.dtypes[named]
        first = op.args[0]
        return "b1" if isinstance(first, bool) else "i64" if isinstance(first, int) else "f64"

    def _bitcast(self, op: Compute) -> str:
        source = self._type_of(op)
        if DTYPES[source].bits != DTYPES[op.dtype].bits:
            raise CodegenError(f"a bitcast from {source} to {op.dtype} changes the width", where=op.name)
        return f"{_postfix(self.operand(op.args[0], source))}.to({TYPES[op.dtype]}, bitcast=True)"

    def _call(self, name: str, args: list[str]) -> str:
        self.need(name)
        return f"{name}({', '.join(args)})"

    def _spell(self, op: Compute, work: str, args: list[str]) -> str:
        name = op.op
        if name in _INFIX:
            return f"({args[0]} {_INFIX[name]} {args[1]})"
        if name == "abs":
            return f"tl.abs({args[0]})"
        if name == "not":
            return f"({args[0]} == {literal(0, work)})" if work == "b1" else f"(~{args[0]})"
        if work == "b1" and name in ("min", "max"):
            return f"({args[0]} {'&' if name == 'min' else '|'} {args[1]})"
        if not DTYPES[work].is_float:
            if name in _INTEGER_CALLS:
                return self._call(_INTEGER_CALLS[name], args)
            if name == "neg":
                return f"(0 - {args[0]})"
            if name == "sign":
                return f"tl.where({args[0]} > 0, {literal(1, work)}, tl.where({args[0]} < 0, {literal(-1, work)}, {literal(0, work)}))"
        else:
            text = self._float(name, work, args)
            if text:
                return text
        raise CodegenError(f"{name} on {op.dtype} has no portable spelling in Triton", where=op.name)

    def _float(self, name: str, work: str, args: list[str]) -> str:
        x = args[0]
        if name == "div":
            return self._divide(x, args[1], work)
        if name == "sqrt" or name == "rsqrt":
            root = f"tl.sqrt_rn({x})" if work == "f32" else f"tl.sqrt({x})"
            return root if name == "sqrt" else self._divide(literal(1, work), root, work)
        if name in ("min", "max"):
            return self._call(f"nan_{name}", args)
        if name == "neg":  # 0 - x would lose the sign of zero
            return f"({x} * {literal(-1, work)})"
        if name in ("exp", "exp2", "floor", "ceil"):
            return f"tl.{name}({x})"
        if name == "isnan":
            return f"({x} != {x})"
        if name == "isinf":
            return f"(tl.abs({x}) == {literal(math.inf, work)})"
        if work == "f64":
            return f"tl.{name}({x})" if name in _BUILTIN_F64 else ""
        if name in ("sin", "cos"):
            return self._call("sin_quarter", [x, "0" if name == "sin" else "1"])
        return self._call(_CALLS[name], args) if name in _CALLS else ""

    def _divide(self, a: str, b: str, work: str) -> str:
        return f"tl.div_rn({a}, {b})" if work == "f32" else f"({a} / {b})"


@dataclass(frozen=True, slots=True)
class Combination:
    """A combiner over working types: `function` combines two partial results, `identity` fills lanes outside the domain."""

    function: str
    types: tuple[str, ...]
    identity: tuple[str, ...]


def combination(combiner: str, dtypes: tuple[str, ...], accumulator: str) -> Combination:
    """The spelling of one Reduce or Scan over values that become `dtypes`; sums of narrow floats are kept in `accumulator`."""
    work = [working_type(t) for t in dtypes]
    if combiner in ("sum", "prod") and work[0] == "f32" and accumulator == "f64":
        work[0] = "f64"
    first = work[0]
    if first == "b1":
        work[0] = first = "i32"
    d = DTYPES[first]
    if d.is_float:
        low, high = literal(-math.inf, first), literal(math.inf, first)
    else:
        low, high = literal(-(2 ** (d.bits - 1)), first), literal(2 ** (d.bits - 1) - 1, first)
    zero, one = literal(0, first), literal(1, first)
    kind = "nan" if d.is_float else "int"
    if combiner in ("sum", "prod"):
        return Combination({"sum": "add", "prod": "prod"}[combiner], (first,), (zero if combiner == "sum" else one,))
    if combiner in ("max", "any"):
        return Combination(f"{kind}_max", (first,), (low if combiner == "max" else zero,))
    if combiner in ("min", "all"):
        return Combination(f"{kind}_min", (first,), (high if combiner == "min" else one,))
    if combiner in ("argmax", "argmin"):
        last = literal(2 ** (DTYPES[work[1]].bits - 1) - 1, work[1])
        return Combination(combiner, tuple(work), (low if combiner == "argmax" else high, last))
    if combiner in ("welford", "online_softmax") and all(t == "f32" for t in work):
        identity = (zero,) * 3 if combiner == "welford" else (low, zero)
        return Combination(combiner, tuple(work), identity)
    raise CodegenError(f"the combiner {combiner} over {', '.join(dtypes)} has no spelling in Triton")
