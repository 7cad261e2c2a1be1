"""Training under torch.compile: gradients, optimiser steps, and everything that a training loop may do around them, equal to eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flagtree.runtime.compile import backend
from tests.runtime.equal_gradients import check_gradients
from tests.runtime.equal_to_eager import compare
from tests.runtime.test_torch_compile_models import qwen3

_GENERATOR = torch.Generator().manual_seed(29)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf that asks for a gradient."""
    return torch.randn(shape, generator=_GENERATOR).to(dtype).requires_grad_()


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=_GENERATOR)


# -- operators -----------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """What a decoder layer does: norm, rotation of halves, attention written out, gating, residuals."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        angle = torch.outer(torch.arange(n), 1.0 / 10 ** (torch.arange(0, d // 4) / d)).repeat(1, 2)
        q, k = (t * angle.cos().to(t.dtype) + _rotated(t) * angle.sin().to(t.dtype) for t in (q, k))
        mask = torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)
        p = torch.softmax((q @ k.transpose(-1, -2)) * (d // 2) ** -0.5 + mask, -1)
        x = x + self.out((p @ v).transpose(1, 2).reshape(b, n, d))
        return x + F.silu(self.gate(x)) * self.up(x)


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def losses(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    kinds: tuple[dict[str, Any], ...] = ({}, {"ignore_index": 3, "reduction": "none"}, {"label_smoothing": 0.1, "reduction": "sum"})
    other = x.detach().roll(1, 0)
    return (
        *(F.cross_entropy(x, labels, **k) for k in kinds), F.nll_loss(x.log_softmax(-1), labels, ignore_index=0),
        F.mse_loss(x, other), F.huber_loss(x, other), F.smooth_l1_loss(x, other, beta=0.5), F.kl_div(x.log_softmax(-1), other.softmax(-1)),
        F.binary_cross_entropy_with_logits(x, other.sigmoid()),
    )  # fmt: skip


def slices(x: Tensor) -> tuple[Tensor, ...]:
    return (
        x[:, 2:-1:2] * 2, x[-3:], x[-100:1], x[:, 1], x[-1], x[:, -2:].square(), x.narrow(1, 1, 3).exp(), torch.stack((x[0], x[1]), 1),
        x.unfold(1, 3, 2).sum(-1), x.diagonal(), x.select_scatter(x[1] * 2, 0, 2), x.slice_scatter(x[:, :2] * 3, 1, 2, 6, 2),
    )  # fmt: skip


OPERATORS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "decoder layer": (Block(), (rand(2, 5, 16),)),
    "losses": (losses, (rand(9, 7), ints(7, 9))),
    "slices": (slices, (rand(5, 9),)),
    "embedding": (
        lambda w, i: (F.embedding(i, w), F.embedding(i, w, padding_idx=2), F.embedding(i[0], w, scale_grad_by_freq=True)),
        (rand(6, 4), ints(6, 3, 5)),
    ),
    "norms": (
        lambda x, w, b: (
            F.layer_norm(x, (6, 5), None, None), F.layer_norm(x, (5,), w[:5], b[:5]), F.group_norm(x, 3, w, b), F.group_norm(x, 2),
            F.batch_norm(x, None, None, w, b, training=True), F.rms_norm(x, (5,), w[:5]), F.instance_norm(x), F.normalize(x, dim=1),
        ),
        (rand(4, 6, 5), rand(6), rand(6)),
    ),
    "group norm of images": (nn.GroupNorm(2, 8), (rand(3, 8, 4, 5),)),
    "group norm, channels last": (nn.GroupNorm(4, 8), (rand(3, 8, 4, 5).detach().to(memory_format=torch.channels_last).requires_grad_(),)),
    "activations": (
        lambda x: (
            F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.mish(x), F.softplus(x), F.elu(x), F.selu(x), F.leaky_relu(x, 0.1),
            F.hardswish(x), F.hardsigmoid(x), F.hardtanh(x), F.relu6(x), F.logsigmoid(x), F.logsigmoid(x.t()), F.softsign(x),
            F.threshold(x, 0.1, 20), F.glu(x, -1), F.tanhshrink(x), F.celu(x),
            F.softshrink(x), F.hardshrink(x), x.sigmoid(), torch.tanh(x), F.prelu(x, x[0, :1]),
        ),
        (rand(3, 4),),
    ),
    "reductions": (
        lambda x: (
            x.sum(0), x.mean((0, 2)), x.amax(1), x.max(1)[0], x.prod(1), x.norm(dim=1), x.var(0), x.std(2), x.logsumexp(1), x.cumsum(1),
            x.softmax(1), x.log_softmax(0), x.min(), x.median(), x.cumprod(1),
        ),
        (rand(3, 4, 5),),
    ),
    "moves": (
        lambda x, i: (
            x.t().contiguous(), x.expand(2, 5, 4), x.repeat(2, 1), x.flip(0), x.roll(1, 1), x[i], x.gather(0, i[:, None].expand(-1, 4)),
            x.index_select(0, i), F.pad(x, (1, 2)), F.pad(x[None], (1, 1), mode="reflect"), x.scatter(0, i[:1, None].expand(1, 4), 2.0),
            x.index_add(0, i, x[: len(i)] * 2), x.tril(), torch.cat((x, x * 2, x[:1])), x.where(x > 0, -x), x.masked_fill(x > 0, 1.0),
            x.sort(0)[0], x.masked_select(x.detach() > -9).view(5, 4), x.as_strided((2, 2), (4, 1), 1), torch.einsum("ij,kj->ik", x, x),
        ),
        (rand(5, 4), ints(5, 4)),
    ),
    "numbers": (lambda x: (x**2, x.abs() ** 0.5, 2.0**x, x.reciprocal(), x.clamp(-0.5, 0.5), x.sign(), x.round(), torch.atan2(x, x + 1),
                           torch.lerp(x, x * 2, 0.3), torch.addcmul(x, x, x), x.erf(), x.log1p().nan_to_num(), x.fmod(0.7)), (rand(3, 5),)),
    "no rows": (lambda x, w: (F.layer_norm(x, (4,), w), x.softmax(-1), (x * w).sum(0)), (rand(0, 4), rand(4))),
    "one element": (lambda x, w: (F.layer_norm(x, (1,), w), x.softmax(-1), (x * w).sum(0)), (rand(1, 1), rand(1))),
    "transposed operands": (
        lambda x, w: (F.layer_norm(x, (3,), w), x.softmax(-1), x.log_softmax(0)),
        (rand(3, 5).detach().t().requires_grad_(), rand(3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    function, args = OPERATORS[name]
    check_gradients(function, *args)


HALF = ("decoder layer", "losses", "slices", "norms", "activations", "reductions", "embedding")


@pytest.mark.parametrize("name", HALF)
def test_operators_in_bfloat16(name: str) -> None:
    function, args = OPERATORS[name]
    own = [a.detach().bfloat16().requires_grad_() if a.is_floating_point() else a for a in args]
    check_gradients(copy.deepcopy(function).bfloat16() if isinstance(function, nn.Module) else function, *own)


@pytest.mark.parametrize("name", ["decoder layer", "losses", "slices", "embedding", "group norm of images", "reductions"])
def test_operators_with_symbolic_sizes(name: str) -> None:
    function, args = OPERATORS[name]
    check_gradients(function, *args, dynamic=True)


def test_sizes_that_only_torch_knows_to_be_equal_leave_an_extern() -> None:
    def halves(x: Tensor, w: Tensor) -> Tensor:
        doubled = torch.cat((F.glu(F.pad(x, (0, x.shape[1] % 2)), -1),) * 2, -1)[:, : x.shape[1]]
        return x * w + doubled

    check_gradients(halves, rand(4, 7), rand(7), dynamic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_keeps_its_running_statistics(dtype: torch.dtype, momentum: float | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(inplace=True), nn.BatchNorm2d(4, affine=False))
    check_gradients(model.to(dtype), rand(2, 3, 6, 6, dtype=dtype), rounds=2)


def test_batch_norm_with_frozen_statistics() -> None:
    check_gradients(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval(), rand(5, 4))


# -- what a program does around the operators ----------------------------------------------------------------------------
def in_place(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = x * 2
    h.add_(y).mul_(0.5)
    h[:, 1:].sub_(1)
    g = torch.sigmoid(y) + 0
    g[0] = h[1]
    return h.relu_(), g


def operand_written(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(y)
    x[0] += 1
    return x.sin() + y


def views(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x.view(-1), x[1:], x.t(), (x * y)[:, ::2], x, y.expand(2, *y.shape)


def inner_no_grad(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        scale = x.abs().amax() + 1
    h = x / scale * y.detach()
    return h, scale, h.detach() * 2, y * 3


def unused(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    wasted = (x @ y.t()).softmax(-1)
    return (x * y).sum(), wasted.argmax(-1), x.shape[0], None


def one_twice(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = torch.tanh(x + y)
    return h, h * h + x, h


def not_saved(x: Tensor, y: Tensor) -> Tensor:
    """Saved for backward before it is written: functionalisation must keep the old value."""
    h = x.exp()
    z = h.clone()
    z.add_(y)
    return z * h


SITUATIONS = (in_place, operand_written, views, inner_no_grad, unused, one_twice, not_saved)


@pytest.mark.parametrize("function", SITUATIONS, ids=lambda f: f.__name__)
def test_situations(function: Callable[..., Any]) -> None:
    check_gradients(function, rand(3, 4), rand(3, 4))


def test_a_gradient_for_one_operand_only() -> None:
    check_gradients(operand_written, rand(3, 4), rand(3, 4).detach())
    check_gradients(one_twice, rand(3, 4).detach(), rand(3, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    block = Block()
    blocks = nn.ModuleList([block, Block()])

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for one in self.blocks:
                x = checkpoint(one, x, use_reentrant=reentrant)  # type: ignore[assignment]
            return F.dropout(x, 0.25)

    check_gradients(Stack(), rand(2, 5, 16))


def test_checkpointing_recomputes_the_same_dropout() -> None:
    layer = nn.Linear(8, 8)

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return checkpoint(lambda x: F.dropout(F.gelu(self.layer(x)), 0.5), x, use_reentrant=False)

    check_gradients(Dropping(), rand(4, 8))


def test_gradients_accumulate() -> None:
    check_gradients(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.SiLU()), rand(5, 6), rounds=3)


def test_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    check_gradients(model, rand(5, 6).detach())
    check_gradients(model.requires_grad_(False), rand(5, 6))


class Tied(nn.Module):
    """The table of the embedding is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8, eps=1e-5)

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy((self.norm(self.embed(ids)) @ self.embed.weight.t()).view(-1, 11), ids.roll(-1, 1).view(-1))


def test_tied_embedding() -> None:
    check_gradients(Tied(), ints(11, 3, 7), rounds=2)


def test_two_backward_passes_over_one_graph() -> None:
    torch._dynamo.reset()
    model, x = Block(), rand(2, 5, 16)
    found = []
    for called in (model, torch.compile(model, backend=backend)):
        out = called(x).square().sum()
        first = torch.autograd.grad(out, [x, *model.parameters()], retain_graph=True)
        second = torch.autograd.grad(out * 2, [x, *model.parameters()])
        found.append((first, second))
    (want, doubled), (have, again) = found
    for a, b, c, d in zip(want, have, doubled, again):
        compare(a, b, a.double(), "first")
        compare(c, d, c.double(), "second")
        assert torch.equal(b * 2, d)


def test_a_batch_of_another_size_takes_the_same_graphs() -> None:
    torch._dynamo.reset()
    graphs = []

    def counted(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return backend(module, inputs)

    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Softmax(-1))
    compiled = torch.compile(copy.deepcopy(model), backend=counted)
    for rows in (3, 5, 8, 13):
        x = rand(rows, 6)
        for called in (model, compiled):
            called.zero_grad()
            called(x).square().sum().backward()
        for (name, a), b in zip(model.named_parameters(), compiled.parameters()):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=f"{rows} rows: {name}")
    assert len(graphs) == 2, "one static, one with a symbolic size"


def test_autocast() -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8)), rand(6, 16)
    exact = _stepped(copy.deepcopy(model).double(), None, lambda m: m(x.double()).square().mean())
    want, have = (
        _stepped(own, torch.compile(own, backend=backend) if compiled else own, lambda m: m(x).square().mean(), torch.bfloat16)
        for own, compiled in ((copy.deepcopy(model), False), (copy.deepcopy(model), True))
    )
    for k, (a, b, truth) in enumerate(zip(want, have, exact)):
        compare(a, b, truth.to(a.dtype).double() if a.dtype == torch.bfloat16 else truth, f"gradient {k}")


def _stepped(model: nn.Module, called: Any, loss: Callable[[Any], Tensor], autocast: torch.dtype | None = None) -> list[Tensor]:
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss(called or model)
    value.backward()  # type: ignore[no-untyped-call]
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# -- three steps of a small Qwen3 ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_steps_of_a_small_qwen3(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model, batches = qwen3(dtype).train(), [ints(97, 2, 9) for _ in range(3)]

    def trained(own: nn.Module, compiled: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
        called = torch.compile(own, backend=backend) if compiled else own
        optimiser = torch.optim.AdamW(own.parameters(), lr=1e-2)  # a smaller step leaves a bfloat16 weight of 1 as it is
        losses = []
        for ids in batches:
            loss = called(ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return losses, dict(own.named_parameters())

    exact, want, have = trained(copy.deepcopy(model).double()), trained(copy.deepcopy(model)), trained(copy.deepcopy(model), compiled=True)
    compare(torch.stack(want[0]), torch.stack(have[0]), torch.stack(exact[0]), "losses")
    before = dict(model.named_parameters())
    for name in want[1]:
        assert not torch.equal(before[name], have[1][name]), f"{name} was not trained"
        compare(want[1][name], have[1][name], exact[1][name], name)
