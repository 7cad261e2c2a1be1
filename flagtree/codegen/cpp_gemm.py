"""C++ for the small matrix product that `ir.gemm` writes down: y[i, j] = sum over k of x[i, k] * w[j, k] (+ bias[j]), for a few rows i.

Every weight is read once, widened to f32 and multiplied into all rows with fused multiply-adds, which are exact at every level
(docs/cpu.md, "Templates").  `cpp.py` calls this for a kernel whose numerics allow contraction; the work is in templates/cpp_gemm.h.
"""

from __future__ import annotations

from typing import Any

from flagtree.codegen import cpp_ops as ops
from flagtree.errors import CodegenError
from flagtree.ir.gemm import has_bias, is_product
from flagtree.ir.program import Kernel, Program

PARTIALS = 16  # partial sums of a result
COLUMNS = 64  # columns that are one row of the walk: the share of a thread is a whole number of them
_STEP = {"f32": PARTIALS, "f16": PARTIALS, "bf16": 2 * PARTIALS}  # elements that one step of a tile takes


def context(program: Program) -> dict[str, Any]:
    """What templates/cpp_kernel.cpp.j2 needs, apart from names.  CodegenError for a kernel that is not such a product."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    dtype = program.buffers[0].dtype
    if dtype not in _STEP or not is_product(program):
        raise CodegenError("contraction is allowed for matrix products only", where=f"kernel {kernel.name}")
    symbols = [f"const i64 {s.name} = symbols[{k}];" for k, s in enumerate(program.symbols)]
    bias = has_bias(program)
    loaded = "load(bias, n)" if dtype == "f32" else f"widen_{dtype}(load(bias, n))"
    value = f"v + {loaded}" if bias else "v"
    value = value if dtype == "f32" else f"round_{dtype}({value})"
    y = len(program.buffers) - 1
    return {
        "widest": 4, "partials": PARTIALS, "clean_nans": 0, "symbols": symbols, "after": [],
        "definitions": [
            f"#define ELEMENT {ops.memory(dtype)}",
            f"#define TILE_DEPTH {_STEP[dtype]}",
            f"#define PART part_{dtype}",
            f"#define STORE(p, v, n, bias) store(p, narrow_{dtype}({value}), n)",
        ],
        "head": [
            *(f"const ELEMENT *const __restrict b{k} = (const ELEMENT *)buffers[{k}];" for k in range(y)),
            f"ELEMENT *const __restrict b{y} = (ELEMENT *)buffers[{y}];",
            *symbols,
        ],
        "decode": [],
        "body": [
            f"const i64 column = row * {COLUMNS}, columns = n1 - column < {COLUMNS} ? n1 - column : {COLUMNS};",
            f"gemm_columns(b0, n3, b1 + column * n2, n2, b{y} + column, n1, n0, columns, {'b2 + column' if bias else 'nullptr'});",
        ],
        "advance": [], "count": f"(n1 + {COLUMNS - 1}) / {COLUMNS}", "work": "n0 * n1 * n2", "threads": True,
    }  # fmt: skip
