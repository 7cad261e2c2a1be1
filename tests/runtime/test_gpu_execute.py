"""Programs of GPU kernels executed through the launcher, equal to eager: torch.compile's own graphs for CUDA tensors among them.

The device is this processor (tests/runtime/executing.py says what that proves); graphs are captured from fake CUDA tensors, which need
no GPU, and compiled to cubins on the way, which are not executed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flagtree.capture.dynamo import CompiledGraph
from flagtree.ir.canonical import digest, isolate_all
from flagtree.runtime.gpu import Device, GpuLibrary
from flagtree.runtime.launch import Executable
from tests.runtime import executing
from tests.runtime.fake_cuda import Captured, capture
from tests.runtime.stand_in import ROUTES, compile_launcher


@pytest.fixture(scope="module", params=ROUTES)
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    return executing.device(request.param, compile_launcher(tmp_path_factory.mktemp("device")))


def emulated(graph: CompiledGraph, device: Device) -> GpuLibrary:
    kernels = [(digest(one.program), one.program) for _, one in isolate_all(graph.program)]
    return executing.library(kernels, "cuda:sm90", device)


def _norm_and_residual(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + r
    return torch.nn.functional.rms_norm(h.float(), (h.shape[-1],)).to(h.dtype) * w, h


def _mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


def _softmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.softmax(x, -1), x.cumsum(-1)


def _columns(x: torch.Tensor) -> torch.Tensor:
    return (x * 2 + 1).sum(0)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _layer(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """A decoder layer as Qwen3's: norms, grouped heads with their own norms, rotary, attention, gated MLP, both residuals."""
    first, wq, wk, wv, wo, nq, nk, second, gate, up, down = weights
    rms = torch.nn.functional.rms_norm
    h = rms(x, (64,), first)
    q, k, v = ((h @ w).unflatten(-1, (-1, 16)).transpose(1, 2) for w in (wq, wk, wv))
    q, k = _rotate(rms(q, (16,), nq), cos, sin), _rotate(rms(k, (16,), nk), cos, sin)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + attended.transpose(1, 2).flatten(2) @ wo
    h = rms(x, (64,), second)
    return x + (torch.nn.functional.silu(h @ gate) * (h @ up)) @ down


def _layer_inputs() -> list[torch.Tensor]:
    weights = [rand(64), *(rand(64, n) / 8 for n in (64, 32, 32)), rand(64, 64) / 8, rand(16), rand(16), rand(64)]
    return [rand(2, 9, 64), rand(9, 16), rand(9, 16), *weights, rand(64, 96) / 8, rand(64, 96) / 8, rand(96, 64) / 10]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


BF16 = torch.bfloat16
CASES: dict[str, tuple[Callable[..., Any], Callable[[], list[torch.Tensor]]]] = {
    "norm": (_norm_and_residual, lambda: [rand(5, 256, dtype=BF16), rand(5, 256, dtype=BF16), rand(256, dtype=BF16)]),
    "misaligned": (_norm_and_residual, lambda: [rand(1281, dtype=BF16)[1:].view(5, 256), rand(5, 256, dtype=BF16), rand(256, dtype=BF16)]),
    "mlp": (_mlp, lambda: [rand(4, 64), rand(64, 128) / 8, rand(64, 128) / 8, rand(128, 64) / 11]),
    "softmax": (_softmax, lambda: [rand(7, 200)]),
    "layer": (_layer, _layer_inputs),
    "columns": (_columns, lambda: [rand(70, 33)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Captured, list[torch.Tensor]]]:
    """Each case captured once for both routes."""

    @functools.cache
    def get(case: str) -> tuple[Captured, list[torch.Tensor]]:
        torch.manual_seed(3)
        function, make = CASES[case]
        tensors = make()
        (found,) = capture(function, tensors, tmp_path_factory.mktemp("capture"))
        assert found.graph is not None
        assert found.loads
        assert all("ELF" in line for line in found.loads)  # cubins went to the driver, every one before a first call
        return found, tensors

    return get


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_graph_equals_eager(case: str, captured: Callable[..., Any], device: Device) -> None:
    made, tensors = captured(case)
    graph = made.graph
    run = Executable(graph.launch, emulated(graph, device))
    start = executing.launches(device)
    found = run.call([tensors[i] for i in made.takes])
    assert executing.launches(device) - start == sum("kernel" in s for s in graph.launch["steps"]) > 0
    expected = CASES[case][0](*tensors)
    for one, other in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        tolerance = 1e-2 if one.dtype is BF16 else 2e-5
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
