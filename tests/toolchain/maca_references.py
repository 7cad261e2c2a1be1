"""Runs each kernel of maca_kernels in the emulator and compares it with PyTorch's own computation of the same thing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flagtree.toolchain import emulator

# the order in which the kernels of maca_kernels take their arguments; kept here so that no Triton is imported
SIGNATURES = {
    "norm_residual": (["*bf16"] * 4 + ["i32", "fp32", "i32"], 4),
    "silu_mul": (["*bf16", "*bf16", "i32"], 4),
    "sum_and_max": (["*fp32", "*fp32"], 4),
    "sum_and_max_f64": (["*fp64", "*fp64"], 2),
    "sum_and_max_i64": (["*i64", "*i64"], 8),
    "running_sum": (["*fp32", "*fp32"], 4),
    "arg_and_sort": (["*fp32", "*i32"], 4),
    "functions": (["*fp32", "*fp32"], 1),
    "gather": (["*fp32", "*i64", "*fp32", "i32"], 2),
    "histogram": (["*fp32", "*fp32", "i32"], 4),
    "transpose": (["*bf16", "*bf16"], 4),
    "product_bf16": (["*bf16", "*bf16", "*fp32"], 4),
    "product_int": (["*i8", "*i8", "*i32"], 4),
    "float8": (["*fp32", "*u8"], 2),
    "product_f16": (["*fp16", "*fp16", "*fp32"], 4),
}  # fmt: skip
ENTRY = {name: name.removesuffix("_f64").removesuffix("_i64").removesuffix("_bf16").removesuffix("_f16") for name in SIGNATURES}


def load(name: str, text: str) -> emulator.Emulated:
    return emulator.load(text, ENTRY[name], SIGNATURES[name][0])


def check(name: str, text: str, shared: int, order: str = "forward") -> emulator.Run:
    """Run kernel `name` of that MACA IR and assert that its numbers are PyTorch's."""
    torch.manual_seed(7)
    kernel, warps = load(name, text), SIGNATURES[name][1]

    def launch(grid: tuple[int, ...], *arguments: object) -> emulator.Run:
        return kernel.run(grid, warps, arguments, order=order, shared=shared)  # type: ignore[arg-type]

    dtype = {"sum_and_max_f64": torch.float64, "sum_and_max_i64": torch.int64}.get(name, torch.float32)
    return CHECKS[name.removesuffix("_f64").removesuffix("_i64")](launch, dtype)


Launch = Callable[..., emulator.Run]
CHECKS: dict[str, Callable[[Launch, torch.dtype], emulator.Run]] = {}


def _check(function: Callable[[Launch, torch.dtype], emulator.Run]) -> Callable[[Launch, torch.dtype], emulator.Run]:
    CHECKS[function.__name__] = function
    return function


@_check
def norm_residual(launch: Launch, _: torch.dtype) -> emulator.Run:
    rows, columns = 3, 1000
    x, r = torch.randn(rows, columns).bfloat16(), torch.randn(rows, columns).bfloat16()
    w, y, before = torch.randn(columns).bfloat16(), torch.empty(rows, columns, dtype=torch.bfloat16), r.clone()
    run = launch((rows,), x, r, w, y, columns, 1e-6, columns)
    h = (x + before).float()
    inverse = 1.0 / torch.sqrt((h.pow(2).mean(-1, keepdim=True) + 1e-6).double()).float()
    expected = (h * inverse).bfloat16() * w
    assert torch.equal(r, x + before)
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=0)
    assert (y != expected).float().mean() < 0.01  # the sum's order may move a rounding, now and then
    return run


@_check
def float8(launch: Launch, _: torch.dtype) -> emulator.Run:
    """Every byte's value, the middle between it and the next with its neighbours, numbers beyond the largest, NaN."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9)),
                   torch.tensor([449.0, 463.9, 464.0, 1e30, float("inf"), float("nan"), 1e-30])])  # fmt: skip
    x = torch.cat([x, -x, torch.zeros(1024 - 2 * len(x))])
    q = torch.full((1024,), 99, dtype=torch.uint8)
    run = launch((4,), x, q)
    expected = x.to(torch.float8_e4m3fn).view(torch.uint8)
    nan = (expected & 127) == 127
    assert torch.equal(q[~nan], expected[~nan]) and bool(((q[nan] & 127) == 127).all())
    return run


@_check
def silu_mul(launch: Launch, _: torch.dtype) -> emulator.Run:
    rows, columns = 2, 700
    x, y = torch.randn(rows, 2 * columns).bfloat16(), torch.empty(rows, columns, dtype=torch.bfloat16)
    run = launch((rows, -(-columns // 512)), x, y, columns)
    gate, up = x.float().chunk(2, -1)
    torch.testing.assert_close(y, (gate * torch.sigmoid(gate) * up).bfloat16(), rtol=2**-8, atol=1e-30)
    return run


@_check
def sum_and_max(launch: Launch, dtype: torch.dtype) -> emulator.Run:
    n = 512 if dtype is torch.float32 else 256
    x = torch.randn(n, dtype=dtype) if dtype.is_floating_point else torch.randint(-(2**62), 2**62, (n,))
    q = torch.empty(2, dtype=dtype)
    run = launch((1,), x, q)
    torch.testing.assert_close(q[0], x.sum(), rtol=1e-5 if dtype is torch.float32 else 1e-13, atol=0)
    assert q[1] == x.max()
    return run


@_check
def running_sum(launch: Launch, _: torch.dtype) -> emulator.Run:
    x, q = torch.randn(512), torch.empty(512)
    run = launch((1,), x, q)
    torch.testing.assert_close(q.double(), x.double().cumsum(0), rtol=0, atol=2e-5)
    return run


@_check
def arg_and_sort(launch: Launch, _: torch.dtype) -> emulator.Run:
    x, q = torch.randn(256) * 100, torch.empty(257, dtype=torch.int32)
    run = launch((1,), x, q)
    assert q[0] == x.argmax()
    assert torch.equal(q[1:], x.int().sort().values)
    return run


@_check
def functions(launch: Launch, _: torch.dtype) -> emulator.Run:
    x, q = torch.rand(256) * 3 + 1e-3, torch.empty(12, 256)
    x[5] = float("nan")
    run = launch((1,), x, q)
    root = torch.sqrt(x.double()).float()  # torch.sqrt of float32 is not correctly rounded on every CPU build
    expected = (
        1 / root, torch.erf(x), torch.tanh(x), torch.floor(x) + torch.ceil(x), torch.round(x), torch.isnan(x).float(), torch.log2(x),
        torch.fmod(x, 0.75), torch.clamp(x, 0.5, 1.5), torch.sin(x), torch.pow(x, 2.5), root,
    )  # fmt: skip
    for i, row in enumerate(expected):
        if i == 8:  # tl.clamp does not promise to propagate NaN
            row[5] = q[8, 5]
        exact = i in (0, 3, 4, 5, 7, 8, 11)
        torch.testing.assert_close(
            q[i], row, rtol=0 if exact else 3e-7, atol=0 if exact else 3e-7, equal_nan=True, msg=lambda m, i=i: f"row {i}: {m}"
        )
    return run


@_check
def gather(launch: Launch, _: torch.dtype) -> emulator.Run:
    x, index, q = torch.randn(50), torch.randint(-20, 70, (128,)), torch.empty(128)
    run = launch((1,), x, index, q, 50)
    inside = (index >= 0) & (index < 50)
    assert torch.equal(q, torch.where(inside, x[index.clamp(0, 49)], -1.0))
    return run


@_check
def histogram(launch: Launch, _: torch.dtype) -> emulator.Run:
    x, q = torch.randint(0, 9, (1000,)).float(), torch.zeros(8)
    run = launch((4,), x, q, 1000)
    assert torch.equal(q, x.view(-1, 8).sum(0))
    return run


@_check
def transpose(launch: Launch, _: torch.dtype) -> emulator.Run:
    x, q = torch.randn(64, 32).bfloat16(), torch.empty(32, 64, dtype=torch.bfloat16)
    run = launch((1,), x, q)
    assert torch.equal(q, x.T)
    return run


def _product(launch: Launch, dtype: torch.dtype) -> emulator.Run:
    a, b, c = torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype), torch.empty(32, 32)
    run = launch((1,), a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    return run


def _product_int(launch: Launch) -> emulator.Run:
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((32, 64), (64, 32)))
    c = torch.empty(32, 32, dtype=torch.int32)
    run = launch((1,), a, b, c)
    assert torch.equal(c, a.int() @ b.int())
    return run


CHECKS["product_int"] = lambda launch, _: _product_int(launch)
CHECKS["product_bf16"] = lambda launch, _: _product(launch, torch.bfloat16)
CHECKS["product_f16"] = lambda launch, _: _product(launch, torch.float16)
