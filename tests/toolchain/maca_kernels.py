"""Hand-written Triton kernels that exercise what the MACA lowering converts: lane exchanges of 32 and 64 bits, shared memory, matrix
instructions, atomics, masks, library functions.  Generated kernels have their own tests; these reach constructs those do not.

Run as a script, `python maca_kernels.py FOLDER` compiles all of them with that Python's Triton, so that several releases are tested.
"""

from __future__ import annotations

import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.language.extra import libdevice

C = "constexpr"


@triton.jit
def norm_residual(x, r, w, y, stride, eps, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    m = cols < N
    h = tl.load(x + row * stride + cols, mask=m, other=0.0).to(tl.float32) + tl.load(r + row * stride + cols, mask=m, other=0.0).to(
        tl.float32
    )
    h = h.to(tl.bfloat16).to(tl.float32)
    tl.store(r + row * stride + cols, h.to(tl.bfloat16), mask=m)
    inv = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=0) / N + eps))
    scaled = (h * inv).to(tl.bfloat16).to(tl.float32)
    tl.store(y + row * stride + cols, (scaled * tl.load(w + cols, mask=m, other=0.0).to(tl.float32)).to(tl.bfloat16), mask=m)


@triton.jit
def silu_mul(x, y, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = cols < D
    g = tl.load(x + row * 2 * D + cols, mask=m, other=0.0).to(tl.float32)
    u = tl.load(x + row * 2 * D + D + cols, mask=m, other=0.0).to(tl.float32)
    tl.store(y + row * D + cols, (g / (1.0 + tl.exp(-g)) * u).to(tl.bfloat16), mask=m)


@triton.jit
def sum_and_max(x, q, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.store(q, tl.sum(v, axis=0))
    tl.store(q + 1, tl.max(v, axis=0))


@triton.jit
def running_sum(x, q, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(q + i, tl.cumsum(tl.load(x + i), axis=0))


@triton.jit
def arg_and_sort(x, q, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(q, tl.argmax(v, axis=0))
    tl.store(q + 1 + i, tl.sort(v.to(tl.int32)))


@triton.jit
def functions(x, q, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(q + i, tl.rsqrt(v))
    tl.store(q + B + i, tl.erf(v))
    tl.store(q + 2 * B + i, libdevice.tanh(v))
    tl.store(q + 3 * B + i, tl.floor(v) + tl.ceil(v))
    tl.store(q + 4 * B + i, libdevice.rint(v))
    tl.store(q + 5 * B + i, libdevice.isnan(v).to(tl.float32))
    tl.store(q + 6 * B + i, tl.log2(v))
    tl.store(q + 7 * B + i, v % 0.75)
    tl.store(q + 8 * B + i, tl.clamp(v, 0.5, 1.5))
    tl.store(q + 9 * B + i, tl.sin(v))
    tl.store(q + 10 * B + i, libdevice.pow(v, 2.5))
    tl.store(q + 11 * B + i, tl.sqrt(v))


@triton.jit
def gather(x, index, q, N, B: tl.constexpr):
    i = tl.arange(0, B)
    at = tl.load(index + i)
    tl.store(q + i, tl.load(x + at, mask=(at >= 0) & (at < N), other=-1.0))


@triton.jit
def histogram(x, q, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(q + i % 8, tl.load(x + i, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def transpose(x, q, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    tl.store(q + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(tl.load(x + i * N + j)))


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, 32):
        kk = k + tl.arange(0, 32)
        acc = tl.dot(tl.load(a + m * K + kk[None, :]), tl.load(b + kk[:, None] * N + n), acc)
    tl.store(c + m * N + n, acc)


@triton.jit
def product_int(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    acc = tl.zeros((M, N), tl.int32)
    for k in range(0, K, 32):
        kk = k + tl.arange(0, 32)
        acc = tl.dot(tl.load(a + m * K + kk[None, :]), tl.load(b + kk[:, None] * N + n), acc, out_dtype=tl.int32)
    tl.store(c + m * N + n, acc)


@triton.jit
def float8(x, q, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(q + i, tl.load(x + i).to(tl.float8e4nv).to(tl.uint8, bitcast=True))


# name: (kernel, signature, constexprs, warps, grid argument positions promised to be multiples of 16)
KERNELS = {
    "norm_residual": (
        norm_residual,
        {"x": "*bf16", "r": "*bf16", "w": "*bf16", "y": "*bf16", "stride": "i32", "eps": "fp32", "N": "i32"},
        {"BLOCK": 1024},
        4,
    ),
    "silu_mul": (silu_mul, {"x": "*bf16", "y": "*bf16", "D": "i32"}, {"BLOCK": 512}, 4),
    "sum_and_max": (sum_and_max, {"x": "*fp32", "q": "*fp32"}, {"B": 512}, 4),
    "sum_and_max_f64": (sum_and_max, {"x": "*fp64", "q": "*fp64"}, {"B": 256}, 2),
    "sum_and_max_i64": (sum_and_max, {"x": "*i64", "q": "*i64"}, {"B": 256}, 8),
    "running_sum": (running_sum, {"x": "*fp32", "q": "*fp32"}, {"B": 512}, 4),
    "arg_and_sort": (arg_and_sort, {"x": "*fp32", "q": "*i32"}, {"B": 256}, 4),
    "functions": (functions, {"x": "*fp32", "q": "*fp32"}, {"B": 256}, 1),
    "gather": (gather, {"x": "*fp32", "index": "*i64", "q": "*fp32", "N": "i32"}, {"B": 128}, 2),
    "histogram": (histogram, {"x": "*fp32", "q": "*fp32", "N": "i32"}, {"B": 256}, 4),
    "transpose": (transpose, {"x": "*bf16", "q": "*bf16"}, {"M": 64, "N": 32}, 4),
    "product_bf16": (product, {"a": "*bf16", "b": "*bf16", "c": "*fp32"}, {"M": 32, "N": 32, "K": 64}, 4),
    "product_int": (product_int, {"a": "*i8", "b": "*i8", "c": "*i32"}, {"M": 32, "N": 32, "K": 64}, 4),
    "float8": (float8, {"x": "*fp32", "q": "*u8"}, {"B": 256}, 2),
    "product_f16": (product, {"a": "*fp16", "b": "*fp16", "c": "*fp32"}, {"M": 32, "N": 32, "K": 64}, 4),
}


def compile_kernel(name: str, aligned: bool = True) -> tuple[str, str, int]:
    """(MACA LLVM IR, TTIR, bytes of shared memory) of a kernel, by this process's Triton."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flagtree.toolchain import maca_backend

    maca_backend.register()
    function, signature, constants, warps = KERNELS[name]
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if aligned and kind.startswith("*")}
    source = ASTSource(function, signature={**signature, **dict.fromkeys(constants, C)}, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": False}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        built = triton.compile(source, target=GPUTarget("maca", 80, 64), options=options)
    return built.asm["llir"].decode(), built.asm["ttir"], built.metadata.shared


if __name__ == "__main__":
    for kernel in KERNELS:
        text, _, shared_bytes = compile_kernel(kernel)
        (Path(sys.argv[1]) / f"{kernel}.{shared_bytes}.ll").write_text(text)
