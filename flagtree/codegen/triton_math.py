"""How accurate the functions of generated Triton kernels are: the stated error of each, in f32, against the exact value.

What templates/triton_math.py.j2 states beside each function, with the domain where it grows; tests/codegen/test_triton_math.py measures
it through the MACA lowering, whose exp2 is the C library's (at most 1 ULP).  `tl.exp` is exp2(x * log2(e)) on every GPU of Triton: the
rounding of that product moves the result by up to |x| * 2^-24 of itself, and log2(e) in f32 by half as much again.

pow is exp2(y * (e + log2(m))) with m in [0.707, 1.414]: log's 3 ULP of at most 0.347 are 3 * 2^-25, which move the result by
0.75 * 2^-23 * |y| of itself, so by 1.5 * |y| ULP at most; |y| is at most 400 where the result is neither 0 nor infinite and e is not 0.

sin, cos and tan take x to within pi/4 of a multiple n of pi/2, for every finite x.  Up to 2^20 in f64: n has 20 bits and the first part of
pi/2 33, so their product is exact, and what is lost beside the 86 bits of both parts is below 2^-65.  Beyond in integers, by the 96 bits of
2/pi that matter (Payne and Hanek, Radian reduction for trigonometric functions, SIGNUM 18 (1983)): what is lost is below 2^-60.  No f32 is
nearer to a multiple of pi/2 than 2^-30 of one (Muller, Elementary Functions, 3rd ed., section 11.3), so the rest is right to 2^-30 of
itself, and is rounded to f32 once; the polynomial of it adds less than an ULP.  tan divides one by the other: 2 + 2 + 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Error:
    """At most `ulp` + `slope` * |x| units in the last place of the larger of |result| and `floor`, for arguments |x| <= `limit`
    (|y| for a function of two arguments); farther out `ulp` + `beyond` * |x|."""

    ulp: float
    floor: float = 0.0
    slope: float = 0.0
    limit: float = float("inf")
    beyond: float = float("inf")


ERRORS: dict[str, Error] = {
    "exp": Error(2, slope=2), "exp2": Error(2), "expm1": Error(5, slope=2), "log": Error(3), "log2": Error(4), "log10": Error(4),
    "log1p": Error(5), "tanh": Error(3), "erf": Error(3), "erfc": Error(4, floor=1), "sin": Error(2),
    "cos": Error(2), "tan": Error(5), "asin": Error(4), "acos": Error(4, floor=0.01), "atan": Error(4),
    "sinh": Error(6, slope=2), "cosh": Error(4, slope=2), "pow": Error(3, limit=4, beyond=2), "atan2": Error(5),
}  # fmt: skip
