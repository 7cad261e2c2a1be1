"""The scalar operations a kernel body may use: arity, result type, reference meaning and accuracy class.

One table serves verifier, interpreter, code generators and `verify`; each code generator keeps its own spelling under
the same names.  Meaning is PyTorch's on the same dtype: integer division floors, min and max propagate NaN,
comparison with NaN is false (`ne` true), shifts and integer overflow wrap.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Op:
    """`result`: "same" as the (equal) operand types, "b1", or "given" where the body op states it (cast, bitcast).

    `exact`: correctly rounded in every dtype, so that code generation must give the interpreter's bits.
    """

    name: str
    arity: int
    result: str = "same"
    exact: bool = False
    kinds: str = "fib"  # operand kinds it accepts: f(loat), i(nteger, signed or not), b(ool)


_OPS = (
    Op("add", 2, exact=True, kinds="fi"), Op("sub", 2, exact=True, kinds="fi"), Op("mul", 2, exact=True, kinds="fi"),
    Op("div", 2, exact=True, kinds="f"),        # true division
    Op("floordiv", 2, exact=True, kinds="i"),   # rounds to minus infinity; divisor 0 is undefined, as in ATen
    Op("mod", 2, exact=True, kinds="i"),        # Python's remainder: sign of the divisor
    Op("truncdiv", 2, exact=True, kinds="i"),   # rounds to zero
    Op("fmod", 2, exact=True, kinds="fi"),      # C's remainder: sign of the dividend
    Op("neg", 1, exact=True, kinds="fi"), Op("abs", 1, exact=True, kinds="fi"),
    Op("min", 2, exact=True), Op("max", 2, exact=True),          # NaN if either is NaN
    Op("sqrt", 1, exact=True, kinds="f"),
    Op("rsqrt", 1, exact=True, kinds="f"),      # 1 / sqrt(x), both rounded: what ATen's CPU code computes
    Op("floor", 1, exact=True, kinds="f"), Op("ceil", 1, exact=True, kinds="f"), Op("trunc", 1, exact=True, kinds="f"),
    Op("round", 1, exact=True, kinds="f"),      # half to even
    Op("copysign", 2, exact=True, kinds="f"), Op("sign", 1, exact=True, kinds="fi"),
    Op("exp", 1, kinds="f"), Op("exp2", 1, kinds="f"), Op("expm1", 1, kinds="f"),
    Op("log", 1, kinds="f"), Op("log2", 1, kinds="f"), Op("log10", 1, kinds="f"), Op("log1p", 1, kinds="f"),
    Op("sin", 1, kinds="f"), Op("cos", 1, kinds="f"), Op("tan", 1, kinds="f"), Op("tanh", 1, kinds="f"),
    Op("asin", 1, kinds="f"), Op("acos", 1, kinds="f"), Op("atan", 1, kinds="f"), Op("sinh", 1, kinds="f"), Op("cosh", 1, kinds="f"),
    Op("erf", 1, kinds="f"), Op("erfc", 1, kinds="f"), Op("pow", 2, kinds="f"), Op("atan2", 2, kinds="f"),
    Op("isnan", 1, "b1", True, "f"), Op("isinf", 1, "b1", True, "f"),
    Op("eq", 2, "b1", True), Op("ne", 2, "b1", True), Op("lt", 2, "b1", True),
    Op("le", 2, "b1", True), Op("gt", 2, "b1", True), Op("ge", 2, "b1", True),
    Op("and", 2, exact=True, kinds="ib"), Op("or", 2, exact=True, kinds="ib"), Op("xor", 2, exact=True, kinds="ib"),
    Op("not", 1, exact=True, kinds="ib"),       # bitwise on integers, logical on bool
    Op("shl", 2, exact=True, kinds="i"), Op("shr", 2, exact=True, kinds="i"),
    Op("where", 3, exact=True),                 # (b1, x, x)
    Op("cast", 1, "given", True),               # value conversion, round to nearest even; float to integer truncates
    Op("bitcast", 1, "given", True),
)  # fmt: skip
OPS: dict[str, Op] = {op.name: op for op in _OPS}


@dataclass(frozen=True, slots=True)
class Combiner:
    """An associative rule for Reduce and Scan over `arity` values at once.

    sum, prod: start at 0 and 1.  min, max: propagate NaN; an empty domain is an error.
    argmin, argmax: (value, index); the first index wins ties, the first NaN wins over all.
    any, all: bool.  welford: (mean, M2, count).  online_softmax: (max, sum of exp(x - max)).
    """

    name: str
    arity: int
    identity: tuple[float | int | bool | None, ...]


COMBINERS: dict[str, Combiner] = {
    c.name: c
    for c in (
        Combiner("sum", 1, (0,)),
        Combiner("prod", 1, (1,)),
        Combiner("min", 1, (None,)),
        Combiner("max", 1, (None,)),
        Combiner("any", 1, (False,)),
        Combiner("all", 1, (True,)),
        Combiner("argmin", 2, (None, 0)),
        Combiner("argmax", 2, (None, 0)),
        Combiner("welford", 3, (0, 0, 0)),
        Combiner("online_softmax", 2, (None, 0)),
    )
}
