"""torch.compile on models: building blocks in three element types, a small Qwen3 with and without a KV cache, and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flagtree.runtime.compile import Callee, backend
from tests.runtime.equal_to_eager import check, compare

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class NormedPerceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, flat = self.head(self.embed(ids)).view(-1, 50), labels.view(-1)
        kinds: tuple[dict[str, Any], ...] = ({}, {"ignore_index": 3, "reduction": "none"}, {"label_smoothing": 0.1, "reduction": "sum"})
        return tuple(F.cross_entropy(logits, flat, **k) for k in kinds)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    n = q.shape[-2]
    mask = torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1)
    return torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + mask, -1) @ v


def residual_norm(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x + y
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x, w * h.to(x.dtype), F.rms_norm(x, (64,), w)


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)).eval()


def block(name: str, dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    labels = torch.randint(0, 50, (3, 7))
    blocks: dict[str, Callable[[], tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]] = {
        "LayerNorm, GELU MLP": lambda: (NormedPerceptron().eval().to(dtype), (rand(3, 9, 32),)),
        "attention": lambda: (attention, (rand(2, 4, 7, 8), rand(2, 4, 7, 8), rand(2, 4, 7, 8))),
        "convolution": lambda: (convolution().to(dtype), (rand(2, 3, 8, 8),)),
        "convolution, channels_last": lambda: (
            convolution().to(dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
            (rand(2, 3, 8, 8).to(memory_format=torch.channels_last),),
        ),
        "embedding, cross-entropy": lambda: (Classifier().to(dtype), (labels, labels.flip(0))),
        "RMSNorm, residual": lambda: (residual_norm, (rand(3, 5, 64), rand(3, 5, 64), rand(64))),
        "GroupNorm": lambda: (nn.GroupNorm(2, 8).eval().to(dtype), (rand(2, 8, 5, 5),)),
        "losses": lambda: (
            lambda x, y: (F.mse_loss(x, y), F.l1_loss(x, y), F.huber_loss(x, y), F.normalize(x)),
            (rand(3, 40), rand(3, 40)),
        ),
    }
    return blocks[name]()


BLOCKS = (
    "LayerNorm, GELU MLP", "attention", "convolution", "convolution, channels_last", "embedding, cross-entropy", "RMSNorm, residual",
    "GroupNorm", "losses",
)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, dtype: torch.dtype) -> None:
    function, args = block(name, dtype)
    check(function, *args, dynamic=dtype is torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("widths", [(16, 16, 16, 16), (24, 40), (33, 31, 64), (8, 100, 20)], ids=str)
def test_rows_that_are_joined_from_pieces(widths: tuple[int, ...], dtype: torch.dtype) -> None:
    """As in the patch merging of Swin: a row is walked piece by piece, and what it keeps between sweeps lies side by side."""
    pieces = [torch.randn(3, n).to(dtype) for n in widths]
    weight, bias = (torch.randn(sum(widths)).to(dtype) for _ in range(2))

    def joined(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        row = torch.cat([p + p for p in given], -1)
        return F.layer_norm(row, row.shape[-1:], weight, bias), torch.softmax(row.flip(0) * 2, -1)

    check(joined, *pieces)


# -- Qwen3 ---------------------------------------------------------------------------------------------------------------
def qwen3(dtype: torch.dtype = torch.float32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    configuration = transformers.Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(configuration).eval().to(dtype)


class Counted:
    """The registered function, keeping what it returned."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(backend(module, inputs))
        return self.graphs[-1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_qwen3_prefill_at_four_lengths_takes_two_graphs(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model, counted = qwen3(dtype), Counted()
    exact, compiled = copy.deepcopy(model).double(), torch.compile(model, backend=counted)
    with torch.no_grad():
        for length in (5, 9, 17, 33):
            ids = torch.randint(0, 97, (2, length))
            compare(model(ids).logits, compiled(ids).logits, exact(ids).logits, f"length {length}")
    assert len(counted.graphs) <= 2
    calls = [s["extern"] for s in _launch(counted.graphs[-1])["steps"] if "extern" in s]
    kinds = {"aten.linear.default", "aten.scaled_dot_product_attention.default", "aten.embedding.default", "aten.index.Tensor"}
    assert set(calls) <= kinds and len(calls) <= 22  # 15 linear, 2 attention, 1 embedding, 4 for the mask


def _launch(callee: Callee) -> Any:
    return callee.launch


@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_qwen3_writes_the_same_48_tokens(cache: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch._dynamo.reset()
    model, prompt = qwen3(), torch.randint(0, 97, (1, 7))

    def greedy(run: Callable[..., Any]) -> list[int]:
        room = {"max_cache_len": 64} if cache == "StaticCache" else {}
        past, ids, tokens, position = getattr(transformers, cache)(config=model.config, **room), prompt, [], 0
        for _ in range(48):
            positions = torch.arange(position, position + ids.shape[1])[None]
            logits = run(input_ids=ids, past_key_values=past, use_cache=True, position_ids=positions).logits
            position += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
        return tokens

    counted = Counted()
    with torch.no_grad():
        assert greedy(torch.compile(model, backend=counted)) == greedy(model)
    assert len(counted.graphs) <= 3


# -- gradients -----------------------------------------------------------------------------------------------------------
def gradients(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    value = loss(model)
    value.backward()  # type: ignore[no-untyped-call]
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def perceptron() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    x, y = torch.randn(6, 16), torch.randn(6, 8)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8), nn.SiLU())
    return model, lambda m: F.mse_loss(m(x.to(_dtype(m))), y.to(_dtype(m)))


def language_model() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    ids = torch.randint(0, 97, (2, 9))
    return qwen3(), lambda m: m(ids, labels=ids).loss


def convolution_in_training() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    image = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )
    return model, lambda m: F.cross_entropy(m(image.to(_dtype(m))), torch.tensor([1, 2]))


def _dtype(model: nn.Module) -> torch.dtype:
    return next(iter(model.parameters())).dtype


@pytest.mark.parametrize("make", [perceptron, language_model, convolution_in_training])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(make: Callable[[], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model, loss = make()
    model = model.to(dtype)
    exact = gradients(copy.deepcopy(model).double(), loss)
    want = gradients(copy.deepcopy(model), loss)
    have = gradients(torch.compile(copy.deepcopy(model), backend=backend), loss)  # type: ignore[arg-type]
    assert len(want) == len(have) == len(exact)
    for k, (a, b, truth) in enumerate(zip(want, have, exact)):
        compare(a, b, truth, f"gradient {k}")


def test_dropout_in_training_draws_eager_s_numbers() -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5)), torch.randn(6, 16)
    want = gradients(copy.deepcopy(model), lambda m: m(x).sum())
    have = gradients(torch.compile(copy.deepcopy(model), backend=backend), lambda m: m(x).sum())  # type: ignore[arg-type]
    for a, b in zip(want, have):
        torch.testing.assert_close(a, b)
