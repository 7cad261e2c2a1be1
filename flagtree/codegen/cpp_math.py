"""How accurate the C++ prelude's functions are: the stated bound of each, in units in the last place of the result's type.

The bound is against the exact value, over every f32 argument (denormals, huge, inf and NaN included); tests/codegen/test_cpp_math.py
measures it.  f64 goes through libm, whose own bounds (glibc manual, "Known Maximum Errors") are at most 2.
"""

from __future__ import annotations

ULP: dict[str, float] = {
    "exp": 1.0, "exp2": 1.25, "expm1": 1.75, "log": 1.0, "log2": 1.5, "log10": 2.0, "log1p": 1.25,
    "tanh": 1.5, "erf": 1.25, "sin": 0.55, "cos": 0.55,
    # by libm in f64, rounded once to f32
    "tan": 0.51, "asin": 0.51, "acos": 0.51, "atan": 0.51, "sinh": 0.51, "cosh": 0.51, "erfc": 0.51, "pow": 0.51, "atan2": 0.51,
}  # fmt: skip
