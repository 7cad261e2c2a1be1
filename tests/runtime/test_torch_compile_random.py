"""Random programs under torch.compile: operators drawn from a table on a growing set of tensors, some written in place, equal to eager."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import SEED
from tests.runtime.equal_to_eager import check

Tensor = torch.Tensor
Program = list[tuple[str, int, int]]

# every operator keeps two dimensions and moderate values, so that any sequence of them is a program
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "abs": torch.abs,
    "square": lambda x: torch.tanh(x) ** 2,
    "half": lambda x: x.bfloat16(),
    "full": lambda x: x.float(),
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "row mean": lambda x: x - x.mean(-1, keepdim=True),
    "column maximum": lambda x: x.amax(0, keepdim=True) - x,
    "running sum": lambda x: torch.tanh(x.cumsum(-1)),
    "transpose": lambda x: x.t(),
    "transposed copy": lambda x: x.t().contiguous(),
    "flip": lambda x: x.flip(0),
    "rotate": lambda x: torch.cat((-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]), -1),
    "every other": lambda x: torch.cat((x[::2], x[1::2])),
    "pad": lambda x: F.pad(x, (1, 0))[:, :-1],
    "lower": lambda x: x.tril(),
    "where": lambda x: torch.where(x > 0.1, x, -0.5),
    "count": lambda x: x + (x > 0).sum(0),
    "best": lambda x: x * (x.argmax(-1, keepdim=True) + 1) / x.shape[-1],
    "sorted": lambda x: x.sort(-1)[0],
    "product": lambda x: torch.tanh(x @ x.t() @ x),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": lambda x, y: torch.tanh(x) * torch.tanh(y),
    "divide": lambda x, y: x / (y.abs() + 1),
    "maximum": torch.maximum,
    "choose": lambda x, y: torch.where(x > y, x, y),
    "broadcast": lambda x, y: x + y[:1] + y[:, :1],
}
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add_": lambda x, y: x.add_(y),
    "mul_": lambda x, y: x.mul_(0.5),
    "row": lambda x, y: x[0].copy_(y[-1]),
    "view": lambda x, y: x.view(-1)[1:].add_(1) if x.is_contiguous() else x.t().sub_(1),
    "columns": lambda x, y: x[:, ::2].mul_(-1),
    "relu_": lambda x, y: x.relu_(),
}


def run(program: Program, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Each step reads tensors by position among those made so far; a step that does not fit their shapes is passed over."""
    made = [x, y]
    for name, i, j in program:
        a, b = made[i % len(made)], made[j % len(made)]
        if name in UNARY:
            made.append(UNARY[name](a))
        elif a.shape != b.shape:
            continue
        elif name in BINARY:
            made.append(BINARY[name](a, b))
        elif a.shape == b.shape and a.untyped_storage()._cdata != b.untyped_storage()._cdata:
            WRITES[name](a, b)
    return (*made[2:][-4:], made[-1].abs().sum())


def draw(seed: int) -> Program:
    source = random.Random(SEED * 1_000_003 + seed)
    names = [*UNARY, *BINARY, *BINARY, *WRITES]
    return [(source.choice(names), source.randrange(99), source.randrange(99)) for _ in range(source.randint(3, 12))]


SHAPES = ((4, 6), (5, 5), (1, 7), (3, 33), (8, 16))


def examine(seed: int) -> None:
    program, shape = draw(seed), SHAPES[seed % len(SHAPES)]
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    check(lambda x, y: run(program, x, y), x, y, dynamic=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(40))
def test_random_program(seed: int) -> None:
    examine(seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40, 2000))
def test_random_program_of_the_campaign(seed: int) -> None:
    examine(seed)
