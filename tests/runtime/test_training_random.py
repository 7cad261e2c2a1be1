"""Random programs forward and backward under torch.compile: gradients with respect to two operands and a weight equal eager's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import SEED
from tests.runtime.equal_gradients import check_gradients
from tests.runtime.test_torch_compile_random import BINARY, UNARY, WRITES, Program

Tensor = torch.Tensor

# what the table for results lacks: operators with a backward formula of their own; two dimensions and moderate values stay
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda x: x.bfloat16() if x.dtype != torch.float64 else x,  # the exact run stays exact
    "full": lambda x: x.float() if x.dtype != torch.float64 else x,
    "log_softmax": lambda x: torch.tanh(F.log_softmax(x, -1)),
    "column softmax": lambda x: x.softmax(0),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-3),
    "deviation": lambda x: x / (x.var(-1, keepdim=True) + 1),
    "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "log sigmoid": F.logsigmoid,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "clamp": lambda x: x.clamp(-0.6, 0.7),
    "every third": lambda x: torch.cat((x[:, ::3], x[:, 1::3], x[:, 2::3]), -1),
    "one row": lambda x: x + x[-1],
    "one column": lambda x: x * torch.tanh(x[:, 0:1]),
    "halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "gather": lambda x: x.gather(-1, x.argsort(-1)),
    "rows twice": lambda x: x.repeat(2, 1)[::2],
    "largest": lambda x: x - x.max(-1, keepdim=True)[0],
    "root": lambda x: torch.sqrt(x * x + 0.1),
    "power": lambda x: (x.abs() + 0.2) ** 1.5 / 2,
    "roll": lambda x: x.roll(1, -1),
    "expand": lambda x: x.mean(0, keepdim=True).expand_as(x) - x,
    "detached": lambda x: x * x.detach().sigmoid(),
    "masked": lambda x: x.masked_fill(x > 0.5, 0.25),
    "glu": lambda x: F.glu(torch.cat((x, x * 2), -1), -1),
}
LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted norm": lambda x, w: F.layer_norm(x, x.shape[-1:], w),
    "scaled": lambda x, w: x * w,
    "shifted": lambda x, w: x + w.to(x.dtype),
    "swiglu": lambda x, w: F.silu(x) * (x * w),
    "rms weighted": lambda x, w: w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-3)),
}


def run(program: Program, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Each step reads tensors by position among those made so far; a write goes to a copy; what does not fit is passed over."""
    made = [x, y]
    for name, i, j in program:
        a, b = made[i % len(made)], made[j % len(made)]
        if name in LINEAR and a.shape[-1] == w.shape[0]:
            made.append(LINEAR[name](a, w if a.dtype == w.dtype or name != "weighted norm" else w.to(a.dtype)))
        elif name in UNARY or name in SMOOTH:
            made.append((UNARY | SMOOTH)[name](a))
        elif name in BINARY and a.shape == b.shape:
            made.append(BINARY[name](a, b))
        elif name in WRITES and a.shape == b.shape:
            copied = a.clone()
            WRITES[name](copied, b)
            made.append(copied)
    return (*made[2:][-3:], made[-1].abs().sum())


def draw(seed: int) -> Program:
    source = random.Random(SEED * 1_000_033 + seed)
    names = [*UNARY, *SMOOTH, *LINEAR, *LINEAR, *BINARY, *BINARY, *WRITES]
    # later steps rather read what was made last, so that chains of gradients become long
    return [(source.choice(names), max(0, k + 1 - source.randrange(3)), source.randrange(99)) for k in range(source.randint(4, 14))]


SHAPES = ((4, 6), (5, 5), (1, 7), (3, 33), (8, 16))


def examine(seed: int) -> None:
    program, shape = draw(seed), SHAPES[seed % len(SHAPES)]
    generator = torch.Generator().manual_seed(seed)
    x, y, w = (torch.randn(s, generator=generator, requires_grad=True) for s in (shape, shape, shape[-1:]))
    check_gradients(lambda x, y, w: run(program, x, y, w), x, y, w, dynamic=seed % 4 == 0)


@pytest.mark.parametrize("seed", range(12))
def test_random_program(seed: int) -> None:
    examine(seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(12, 1000))
def test_random_program_of_the_campaign(seed: int) -> None:
    examine(seed)
