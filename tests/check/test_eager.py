"""The eager counterpart of each fused kernel, found from the middle of a graph, has the bits of running the whole graph eagerly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flagtree.capture.model import capture
from flagtree.capture.model_spec import ModelSpec
from flagtree.check.eager import recipe_of
from flagtree.check.recipe import NoEager, run_recipe
from flagtree.ir.canonical import kernels
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Kernel, Origin
from flagtree.ir.walk import run_kernel
from tests.check.graphs import Traced, trace, trace_function

CONFIG: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 48, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "head_dim": 16, "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip
PARTS = {"prefill": {"batch": [1, 4], "sequence": [1, 32], "context": [1, 48]}, "decode": {"batch": [1, 4], "context": [1, 48]}}


class Memory:
    """Contents of every buffer of a program while its kernels are replaced by their eager counterparts, one after the other."""

    def __init__(self, traced: Traced) -> None:
        self.traced, self.roots = traced, {n: v.clone() for n, v in traced.before.items()}

    def view(self, name: str) -> torch.Tensor:
        program, symbols = self.traced.program, self.traced.symbols
        buffer, offset = program.buffer(name), 0
        shape, strides = ([e.evaluate(symbols) for e in part] for part in (buffer.shape, buffer.layout))
        while buffer.alias_of is not None:
            offset, buffer = offset + buffer.alias_of.offset.evaluate(symbols), program.buffer(buffer.alias_of.base)
        if buffer.name not in self.roots:
            self.roots[buffer.name] = torch.full(shape, -77).to(torch_dtype(buffer.dtype)).as_strided(shape, strides)
        root = self.roots[buffer.name]
        return torch.as_strided(root, shape, strides, root.storage_offset() + offset)


def eager(traced: Traced, kernel: Kernel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The recipe of a kernel, after a trip through JSON, run on `tensors`."""
    symbols = {n: n for n in traced.symbols}
    recipe = recipe_of(traced.graph, traced.program, kernel, {n: n for n in tensors}, symbols, traced.lowered.symbols)
    return run_recipe(json.loads(json.dumps(recipe, allow_nan=False)), tensors, traced.symbols)


def check_kernels(traced: Traced) -> tuple[int, list[str]]:
    """(kernels replaced by eager, why the others were not); afterwards every output and every caller's buffer has eager's bits."""
    compared, refused, memory = 0, [], Memory(traced)
    for step in traced.program.steps:
        if not isinstance(step, Kernel):
            memory.roots |= {n: traced.final[n].clone() for n in step.writes}
            continue
        tensors = {n: memory.view(n) for n in dict.fromkeys((*step.reads, *step.writes))}
        try:
            found = eager(traced, step, tensors)
        except NoEager as error:
            refused.append(error.why)
            run_kernel(traced.program, step, tensors, traced.symbols)
            continue
        for name, value in found.items():
            tensors[name].copy_(value)
        compared += set(found) == set(step.writes)
    for name in (*traced.program.outputs, *traced.before):
        assert memory.view(name).dtype == traced.final[name].dtype
        assert torch.equal(memory.view(name), traced.final[name]), name
    return compared, refused


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_every_kernel_of_a_small_qwen3_has_the_bits_of_the_whole_graph(part: str) -> None:
    spec = ModelSpec.model_validate({"name": "small", "architecture": "Qwen3ForCausalLM", "dtype": "bfloat16", "config": CONFIG,
                                     "parts": PARTS, "capture": {"layers": 64}})
    captured = capture(spec, part)
    batch, tokens, context = 3, 5 if part == "prefill" else 1, 11
    given: dict[str, torch.Tensor] = {"ids": torch.randint(0, 97, (batch, tokens)), "start": torch.tensor([0, 4, 6]),
                                      "last": torch.tensor([4, 2, 3]), **captured.constants}
    for p in captured.placeholders:
        if p.role == "state":
            given[p.qualified] = torch.randn(batch, 2, context, 16).bfloat16()
        elif p.role == "weight":
            given[p.qualified] = torch.randn([int(n) for n in p.value.shape]).bfloat16()
    names = [p.qualified for p in captured.placeholders]
    traced = trace(captured.graph_module, names, [p.value for p in captured.placeholders],
                   {p.qualified: p.role for p in captured.placeholders}, [given[n] for n in names])
    compared, refused = check_kernels(traced)
    # attention of one token is a kernel too; its recipe is the operator's own call (test_attention_evidence.py)
    assert refused == (["it needs the result of an attention"] * CONFIG["num_hidden_layers"] if part == "decode" else [])
    assert compared + len(refused) == len(list(kernels(traced.program.steps))) >= 12


def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rope(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    q = rms(x.view(2, 7, 4, 16), w).transpose(1, 2)
    return q * cos.unsqueeze(1) + rotated(q) * sin.unsqueeze(1)


def residual(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + y, rms(x + y, w)


def in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 2
    z.add_(y)
    z[:, 0].fill_(3)
    x.copy_(z + 1)
    return z.exp()


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "rms norm": (rms, lambda: (half(3, 5, 64), half(64))),
    "residual and norm": (residual, lambda: (half(3, 5, 64), half(3, 5, 64), half(64))),
    "rotary": (rope, lambda: (half(2, 7, 64), half(16), half(2, 7, 16), half(2, 7, 16))),
    "gated": (lambda a, b: F.silu(a) * b, lambda: (half(3, 64), half(3, 64))),
    "in place": (in_place, lambda: (torch.randn(4, 6), torch.randn(4, 6))),
    "softmax of a view": (lambda x: torch.softmax(x[:, 1:].t() * 0.3, -1), lambda: (torch.randn(5, 9),)),
    "layer norm": (lambda x, w, b: F.gelu(F.layer_norm(x, (32,), w, b)), lambda: (half(3, 32), half(32), half(32))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_kernels_of_traced_functions(name: str, dynamic: bool) -> None:
    function, make = CASES[name]
    compared, refused = check_kernels(trace_function(function, *make(), dynamic=dynamic))
    assert refused == []
    assert compared >= 1


def test_cross_entropy_says_what_has_no_counterpart() -> None:
    """The loss of each row lives inside one ATen operator: its kernel is compared, or the reason names what is missing."""
    traced = trace_function(lambda x, t: F.cross_entropy(x, t), torch.randn(7, 50), torch.randint(0, 50, (7,)))
    compared, refused = check_kernels(traced)
    assert compared + len(refused) == len(list(kernels(traced.program.steps)))
    assert all("internal to one operator" in why or "which the kernel does not read" in why for why in refused)


def test_a_kernel_of_another_graph_is_refused() -> None:
    traced = trace_function(in_place, torch.randn(4, 6), torch.randn(4, 6))
    kernel = next(k for k in kernels(traced.program.steps) if any(w in traced.before for w in k.writes))
    stranger = replace(kernel, origins=(Origin("elsewhere"),))
    memory = Memory(traced)
    tensors = {n: memory.view(n) for n in (*kernel.reads, *kernel.writes)}
    with pytest.raises(NoEager, match="no call of the captured graph"):
        eager(traced, stranger, tensors)
