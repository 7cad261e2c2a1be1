"""torch.compile on single operators and small compositions: results, layouts and writes equal to eager's, static and symbolic sizes.

Many operators share one graph, as each graph costs a C++ compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.runtime.equal_to_eager import check

inf, nan = float("inf"), float("nan")
SPECIAL = torch.tensor([[1.0, nan, -inf], [inf, 0.0, -0.0], [3.0, 3.0, -2.0]])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[Callable[..., Any], tuple[Any, ...]]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=_GENERATOR).to(dtype)


def ints(lo: int, hi: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(lo, hi, shape, generator=_GENERATOR).to(dtype)


_GENERATOR = torch.Generator().manual_seed(11)

# -- pointwise ---------------------------------------------------------------------------------------------------------
UNARY = [
    "abs",
    "neg",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tan",
    "tanh",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "erf",
    "erfc",
    "floor",
    "ceil",
    "trunc",
    "round",
    "sigmoid",
    "sign",
    "reciprocal",
    "square",
    "isnan",
    "isinf",
    "isfinite",
    "relu",
    "frac",
    "signbit",
    "lgamma",
    "logical_not",
    "nan_to_num",
    "asinh",
    "acosh",
    "isneginf",
]
INTEGER_UNARY = [
    "abs",
    "neg",
    "exp",
    "log",
    "sqrt",
    "sin",
    "tanh",
    "floor",
    "sigmoid",
    "sign",
    "reciprocal",
    "square",
    "isnan",
    "isfinite",
    "relu",
    "logical_not",
]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "pow",
    "minimum",
    "maximum",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "atan2",
    "copysign",
    "fmod",
    "remainder",
    "floor_divide",
    "logical_and",
    "logical_or",
    "logical_xor",
    "hypot",
    "fmin",
    "fmax",
    "xlogy",
]
OPERANDS = {
    "f32": rand(3, 7), "bf16": rand(3, 7, dtype=torch.bfloat16), "f16": rand(3, 7, dtype=torch.float16), "f64": rand(3, 7).double(),
    "i64": ints(1, 9, 3, 7) * torch.tensor([1, -1, 1, -1, 1, -1, 1]), "i32": ints(1, 9, 3, 7, dtype=torch.int32),
    "i8": ints(1, 9, 3, 7, dtype=torch.int8), "u8": ints(1, 9, 3, 7, dtype=torch.uint8), "b1": rand(3, 7) > 0,
    "f32 0-d": torch.tensor(2.5), "i64 0-d": torch.tensor(3), "f64 0-d": torch.tensor(2.5).double(),
}  # fmt: skip
PAIRS = (
    ("f32", "f32"), ("bf16", "f32"), ("f16", "bf16"), ("i64", "f32"), ("i64", "bf16"), ("i32", "i64"), ("u8", "i8"), ("b1", "f32"),
    ("b1", "i32"), ("f32", "f32 0-d"), ("bf16", "f32 0-d"), ("i64", "f32 0-d"), ("f32", "i64 0-d"), ("bf16", "f64 0-d"), ("f64", "f32"),
)  # fmt: skip


def supported(names: list[str], *args: Any) -> Callable[..., Any]:
    """One function that applies every operator that eager has for these operand types."""
    functions = []
    for name in names:
        try:
            getattr(torch, name)(*args)
        except (RuntimeError, TypeError):
            continue
        functions.append(getattr(torch, name))
    assert functions
    return lambda *xs: tuple(f(*xs) for f in functions)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary(dtype: torch.dtype) -> None:
    x = rand(5, 7, dtype=dtype)
    check(supported(UNARY, x), x)


def test_unary_special_values() -> None:
    check(supported(UNARY, SPECIAL), SPECIAL)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_unary_integers(dtype: torch.dtype) -> None:
    x = ints(0 if dtype is torch.uint8 else -4, 5, 3, 5, dtype=dtype)
    check(supported(INTEGER_UNARY, x), x)


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_binary_promotes(pair: tuple[str, str]) -> None:
    x, y = (OPERANDS[name] for name in pair)
    check(supported(BINARY, x, y), x, y)


@pytest.mark.parametrize("name", ["f32", "bf16", "i64", "i32"])
def test_binary_with_python_numbers(name: str) -> None:
    x = OPERANDS[name]
    functions = [(getattr(torch, f), s) for f in BINARY for s in (2, -3, 2.5) if _works(getattr(torch, f), x, s)]
    check(lambda x: tuple(f(x, s) for f, s in functions), x)
    check(lambda x: (2 - x, 2 / x, 2.5 + x, True + x, 7 // x, 7 % x), x)


def _works(function: Callable[..., Any], *args: Any) -> bool:
    try:
        function(*args)
    except (RuntimeError, TypeError):
        return False
    return True


@pytest.mark.parametrize("number", [2, -3, 2.5])
def test_number_arguments_of_a_dynamic_graph(number: float) -> None:
    check(lambda x, s: (x + s, x % s, x * s), rand(3, 4), number, dynamic=True)


# -- everything else: name to (function, arguments) ----------------------------------------------------------------------
CASES: dict[str, Case] = {
    "products with a bias": (
        lambda b, x, y: (torch.addmm(b[0], x[0, 0], y[0, 0]), b.repeat(2, 1, 1).baddbmm(x.flatten(0, 1), y.flatten(0, 1), alpha=2)),
        (rand(3, 1, 5), rand(3, 2, 3, 4), rand(3, 2, 4, 5)),
    ),
    "activations": (
        lambda x: (
            F.gelu(x),
            F.gelu(x, approximate="tanh"),
            F.silu(x),
            F.mish(x),
            F.softplus(x),
            F.elu(x),
            F.selu(x),
            F.leaky_relu(x, 0.1),
            F.hardswish(x),
            F.hardsigmoid(x),
            F.hardtanh(x),
            F.relu6(x),
            F.logsigmoid(x),
            F.softsign(x),
            F.threshold(x, 0.1, 20),
            F.glu(x, -1),
        ),
        (rand(3, 4) * 4,),
    ),
    "activations bf16": (
        lambda x: (
            F.gelu(x),
            F.gelu(x, approximate="tanh"),
            F.silu(x),
            F.mish(x),
            F.softplus(x),
            F.elu(x),
            F.hardswish(x),
            F.logsigmoid(x),
        ),
        (rand(3, 40, dtype=torch.bfloat16) * 4,),
    ),
    "integer division": (
        lambda x: (
            x // 3,
            x // -3,
            x % 3,
            x % -3,
            x / 3,
            torch.div(x, 3, rounding_mode="trunc"),
            torch.div(x, -3, rounding_mode="floor"),
            torch.fmod(x, 3),
            torch.remainder(x, -3),
            x << 1,
            x >> 1,
            x & 3,
            x | 5,
            x ^ 7,
            ~x,
        ),
        (ints(-8, 9, 3, 5),),
    ),
    "unsigned wraps": (lambda x: (x + 200, x * 100, x - 5, -x, x.sum(), x.amax(1)), (ints(0, 255, 3, 5, dtype=torch.uint8),)),
    "float division": (lambda x: (x // 0.7, x % 0.7, torch.div(x, 0.7, rounding_mode="trunc"), torch.fmod(x, 0.7)), (rand(3, 40) * 9,)),
    "powers": (lambda x: (x**2, x**3, x**4, x.abs() ** 0.5, x**-1, x**-2, x.abs() ** 1.7, x**0, 2.0**x, x.abs() ** x), (rand(3, 40),)),
    "bool": (
        lambda x: (~x, x & x, x ^ x, x.float() + x, x + x, x * x, x.any(), x.all(0), x.sum(), x.int(), x.cumsum(0)),
        (rand(3, 4) > 0,),
    ),
    "where": (
        lambda x, y: (
            torch.where(x > 0, x, y),
            torch.where(x > 0, x, 1.0),
            torch.where(x > 0, 1, 0),
            x.masked_fill(x > 0, -inf),
            x.where(x > 0, y.bfloat16()),
        ),
        (rand(4, 5), rand(4, 5)),
    ),
    "clamp": (
        lambda x, y, z, i: (
            x.clamp(y, z),
            x.clamp(min=y),
            x.clamp(max=z),
            i.clamp(-1, 2),
            i.clamp(min=0.5),
            x.bfloat16().clamp(min=y),
            i.clamp(0, 1.5),
        ),
        (rand(4, 5), rand(5) - 1, rand(4, 1) + 1, ints(-5, 5, 3, 4)),
    ),
    "clamp NaN": (lambda x, y: (x.clamp(min=y), x.clamp(y, y), x.clamp(-1, 1)), (SPECIAL, SPECIAL.flip(0))),
    "ternary": (
        lambda x, y, z: (
            torch.addcmul(x, y, z, value=0.5),
            torch.addcdiv(x, y, z, value=2),
            torch.lerp(x, y, 0.3),
            torch.lerp(x, y, z.sigmoid()),
            x.add(y, alpha=3),
            x.sub(y, alpha=0.1),
            torch.rsub(x, y, alpha=2),
        ),
        (rand(3, 4), rand(3, 4), rand(3, 4)),
    ),
    "casts": (lambda x: (x.int(), x.long(), x.bool(), x.bfloat16().float(), x.half(), x.double(), x.to(torch.int8)), (rand(3, 4) * 3,)),
    # -- reductions
    "reductions": (
        lambda x: (
            x.sum(),
            x.sum(0),
            x.sum(-1, keepdim=True),
            x.mean(),
            x.mean((0, 2)),
            x.amax(1),
            x.amin(),
            x.prod(1),
            x.norm(dim=1),
            x.var(),
            x.std(1),
            x.var(1, unbiased=False),
            x.max(),
            x.logsumexp(1),
            x.argmax(),
            x.argmax(1),
            x.max(1),
            x.min(1),
            torch.std_mean(x, 1),
        ),
        (rand(3, 4, 5),),
    ),
    "reductions bf16": (
        lambda x: (
            x.sum(),
            x.sum(0),
            x.mean(-1),
            x.amax(1),
            x.var(1),
            x.std(1),
            x.logsumexp(1),
            x.max(1),
            x.cumsum(1),
            x.sum(1, dtype=torch.float32),
        ),
        (rand(3, 40, 5, dtype=torch.bfloat16),),
    ),
    "reductions of integers": (
        lambda x: (
            x.sum(),
            x.sum(0),
            x.amax(1),
            x.max(),
            x.prod(),
            x.any(1),
            x.all(),
            x.argmax(0),
            x.cumsum(0),
            x.float().mean(),
            x.max(1),
        ),
        (ints(-4, 5, 3, 5),),
    ),
    "reductions of NaN and infinities": (
        lambda x: (
            x.sum(0),
            x.amax(1),
            x.amin(0),
            x.argmax(1),
            x.argmin(1),
            x.max(1),
            x.min(0),
            x.logsumexp(1),
            x.softmax(1),
            x.cumsum(1),
            x.mean(1),
            x.var(1),
            x.any(1),
            x.all(0),
            x.max(),
            x.nansum(),
            x.nanmean(1),
        ),
        (SPECIAL,),
    ),
    "ties": (
        lambda x: (x.argmax(1), x.argmin(1), x.max(1), x.min(1), x.max(0), x.argmax()),
        (torch.tensor([[1.0, 3, 3, 1], [nan, 2, nan, 1], [0, 0, 0, 0]]),),
    ),
    "long rows": (lambda x: (x.softmax(1), x.sum(1), x.sum(0), x.cumsum(1), F.layer_norm(x, (517,)), x.amax(0)), (rand(7, 517),)),
    "no elements": (
        lambda x: (
            x.sum(),
            x.sum(0),
            x.sum(1),
            x + 1,
            x.mean(),
            x.t(),
            x.view(-1),
            torch.cat([x, x]),
            x.softmax(1),
            x.cumsum(1),
            x.prod(),
            x.any(),
        ),
        (rand(0, 4),),
    ),
    "empty rows": (lambda x: (x.sum(), x.sum(0), x.sum(1), x + 1, x.mean(1), x.any(1), x.var(1), x.logsumexp(1)), (rand(4, 0),)),
    "one element": (lambda x: (x.sum(0), x.mean(1), x.softmax(1), x.cumsum(1), x.var(1), x.argmax(1), x.max(1), x.t() + x), (rand(1, 1),)),
    "no dimension": (
        lambda x: (
            x + 1,
            x.sum(),
            x.mean(),
            x.softmax(0),
            x.cumsum(0),
            x.argmax(),
            x.max(),
            x.view(1),
            x.expand(3),
            x.clamp(0, 1),
            x.any(),
        ),
        (torch.tensor(2.5),),
    ),
    # -- layouts
    "transposed": (lambda x: (x + 1, x * x, x.sum(0), x.contiguous(), x.reshape(-1), x.exp()), (rand(3, 4).t(),)),
    "strided": (lambda x: (x + 1, x.sum(0), x.clone(), x.softmax(1), x.reshape(-1)), (rand(6, 8)[::2, ::3],)),
    "expanded": (lambda x: (x + 1, x.sum(0), x.clone(), x.contiguous(), x.reshape(-1)), (rand(3, 1).expand(3, 5),)),
    "permuted": (lambda x: (x + 1, x.clone(), x.sum(1), x.permute(2, 0, 1) * 2, F.layer_norm(x, (4,))), (rand(2, 3, 4).permute(1, 0, 2),)),
    "channels_last": (
        lambda x, y: (
            x + 1,
            x.mean((2, 3)),
            x.contiguous(),
            x.clone(),
            x * x.sum(1, keepdim=True),
            x + y,
            y + x,
            torch.zeros_like(x),
            torch.cat([x, x], 1),
        ),
        (rand(2, 3, 5, 4).to(memory_format=torch.channels_last), rand(2, 3, 5, 4)),
    ),
    "views": (
        lambda x: (
            x.view(2, 3, 4).transpose(0, 1).reshape(3, 8) + 1,
            x.as_strided((2, 2), (1, 2), 1) + 1,
            x[..., None],
            x[-1],
            x[::2],
            x.t(),
            x.unbind(0),
        ),
        (rand(6, 4),),
    ),
    "moves": (
        lambda x: (
            x.flip(0),
            x.roll(1, 1),
            x.repeat(2, 3),
            x.repeat_interleave(2, 0),
            x.unfold(1, 2, 1),
            x.diagonal(),
            x.split(2, 1),
            x.tril(),
            x.triu(1),
        ),
        (rand(4, 6),),
    ),
    "cat, stack, pad": (
        lambda x, y, e: (
            torch.cat([x, y]),
            torch.cat([x, y.bfloat16(), x]),
            torch.stack([x, x + 1], 1),
            torch.cat([x, e]),
            F.pad(x, (1, 2)),
            F.pad(x, (1, 2, 0, 3), value=3.0),
            F.pad(x, (-1, 1)),
            F.pad(x, (1, 1), mode="reflect"),
            F.pad(x.long(), (1, 0), value=-100),
        ),
        (rand(3, 4), rand(2, 4), rand(0, 4)),
    ),
    "index and gather": (
        lambda x, i, j: (
            x[i],
            x[:, i],
            x[i, i],
            x.gather(1, j),
            x.long().gather(1, j),
            x.index_select(0, i),
            x[x > 0].sum(),
            F.one_hot(j, 5),
            x.scatter(1, j, 2.0),
        ),
        (rand(5, 5), torch.tensor([0, 4, -1]).remainder(5), ints(0, 5, 5, 3)),
    ),
    "creation": (
        lambda x: (
            torch.arange(5),
            torch.arange(2, 9, 3),
            torch.arange(0, 1, 0.25),
            torch.arange(5, 0, -1),
            torch.linspace(0, 1, 5),
            torch.eye(3),
            torch.full((2,), 7),
            torch.arange(x.shape[0]) + x[:, 0],
            torch.tensor([1, 2, 3]) + x[0, 0],
            x.new_zeros(x.shape[0] + 1),
            x / x.shape[0],
            x.shape[0] * 2,
        ),
        (rand(4, 6),),
    ),
    # -- externs and what no program carries
    "externs": (
        lambda x: (x.topk(2), x.sort(-1, descending=True), x.argsort(1), x.median(), x.cummax(1), x.cumprod(1), x.logcumsumexp(1)),
        (rand(4, 6),),
    ),
    "sizes from data": (lambda x: (x.unique(), x.nonzero(), (x > 1).nonzero(), x[x > 1] + 1), (ints(0, 4, 12),)),
    "complex": (lambda x: (torch.view_as_real(torch.fft.rfft(x + 1)) * 2, torch.fft.fft(x).abs() + 1), (rand(4, 8),)),
    "complex argument": (lambda x, y: (x * 2, x.real + y, x.conj() * x), (torch.complex(rand(3, 4), rand(3, 4)), rand(3, 4))),
    "rare element types": (
        lambda x: (x.to(torch.uint16), x.to(torch.float8_e4m3fn).float() + 1, x.view(torch.int32) + 1),
        (rand(3, 4).abs(),),
    ),
    "cond": (lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x * 2,)) + 1, (rand(3, 4),)),
    "checkpoint": (lambda x: torch.utils.checkpoint.checkpoint(lambda y: y.sin().exp(), x, use_reentrant=False), (rand(3, 4),)),
    "random numbers": (
        lambda x: (torch.rand_like(x) + x, torch.randn(3) + 1, torch.bernoulli(x.sigmoid()), torch.randperm(5), x.clone().normal_()),
        (rand(3, 40),),
    ),
    "numbers out": (lambda x: (None, x + 1, 3, "a", x.shape[0] + 1, x * x.sum().item()), (rand(3, 4),)),
    # -- writes and aliases
    "operands returned": (lambda x, y: (x, y, x + y, x.view(-1), x.t()), (rand(3, 4), rand(3, 4))),
    "in place, promoted": (lambda x, y: x.add_(y), (rand(3, 4, dtype=torch.bfloat16), rand(3, 4))),
    "in place, chained": (lambda x: x.add_(1).mul_(2).div_(3).sub_(1).pow_(2), (rand(3, 4),)),
    "in place through views": (lambda x: (x.view(-1)[2:].add_(1), x.t().mul_(2), x[0].zero_(), x)[3], (rand(3, 4),)),
    "in place, read at moved points": (lambda x: (x.add_((x * 2).t()), x.sub_((x * 2).flip(0)))[1], (rand(5, 5),)),
    "in place, one row into another": (lambda x: (x[0].add_(x[1]), x[1].add_(x[0]), x[:, 0].copy_(x[:, 1]), x)[3], (rand(3, 5),)),
    "in place on a temporary": (
        lambda x: (lambda y: (y.relu_(), y[:, ::2].add_(1), y[0].mul_(3), y.add_(x), y.sum(0)))(x.exp()),
        (rand(3, 5),),
    ),
    "in place, softmax": (lambda x: (x.sub_(x.amax(1, keepdim=True)).exp_(), x.div_(x.sum(1, keepdim=True)))[1], (rand(3, 5),)),
    "read before the write": (lambda x: (lambda y, s: (x.add_(s), y * 2 + x, y.sum()))(x + 0, x.sum()), (rand(3, 4),)),
    "negation in place": (lambda x: (lambda m: (m.logical_not_(), m.sum(1)))(x != x), (SPECIAL,)),
    "swap": (lambda x, y: (lambda t: (x.copy_(y), y.copy_(t)))(x.clone())[0], (rand(9), rand(9))),
    "copy between overlapping views": (lambda x: (x[1:].copy_(x[:-1].clone()), x + 1)[1], (rand(9),)),
    "set items": (
        lambda x, y, i: (x.__setitem__(slice(1, 3), y), x.__setitem__(x > 1, 0.5), x.__setitem__(i, y), x * 2)[3],
        (rand(6, 4), rand(2, 4), torch.tensor([1, 3])),
    ),
    "cache": (
        lambda k, v, p: (k.index_copy_(1, p, v), k.copy_(k.index_copy(1, p + 1, v)), k.sum())[2],
        (rand(2, 9, 4), rand(2, 1, 4), torch.tensor([3])),
    ),
}
_BASE = rand(20)
CASES |= {
    "one tensor twice": (lambda x, y: (x + y, x.add_(1), x * y), (_BASE[:12], _BASE[:12])),
    "overlapping operands": (lambda x, y: (x * y, x + 1), (_BASE[:12], _BASE[4:16])),
    "overlapping operands, written": (lambda x, y: (x.add_(1), x * y), (_BASE[:12], _BASE[4:16])),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name: str) -> None:
    function, args = CASES[name]
    check(function, *args)


DYNAMIC = (
    "products with a bias",
    "reductions", "views", "moves", "cat, stack, pad", "index and gather", "creation", "no elements", "one element", "transposed", "cond",
    "in place through views", "in place on a temporary", "overlapping operands, written", "sizes from data", "cache", "numbers out",
    "operands returned",
)  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_equals_eager_with_symbolic_sizes(name: str) -> None:
    function, args = CASES[name]
    check(function, *args, dynamic=True)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x.sum(0))
        self.calls += 1
        return x * self.total + self.calls


@pytest.mark.parametrize(
    "module",
    [
        Counter(),
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).train(),
        nn.Dropout(0.5).eval(),
        nn.Sequential(nn.Dropout(0.5), nn.GELU()).train(),
    ],
    ids=["buffers", "batch norm in training", "dropout, eval", "dropout, training"],
)
def test_modules_with_state(module: nn.Module) -> None:
    check(module, rand(6, 4))


def test_no_warning_reaches_the_user(recwarn: pytest.WarningsRecorder) -> None:
    check(lambda x: x.view(-1, 2).expand(3, -1, -1).reshape(-1, 2) + torch.arange(2), rand(6, 4), dynamic=True)
    assert [str(w.message) for w in recwarn if "create_node" in str(w.message)] == []
