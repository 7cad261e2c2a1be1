"""torch.compile on CUDA tensors up to the call: the target, the store, what stays on another device.  Fake tensors; no GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flagtree.capture import dynamo
from tests.runtime.fake_cuda import capture


def scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * w


def test_the_second_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the store come launch list, records and binaries; the key knows the device's target."""
    tensors = [torch.randn(4, 64), torch.randn(64)]
    (first,) = capture(scaled, tensors, tmp_path)
    assert first.graph is not None
    with monkeypatch.context() as patch:
        patch.setattr(dynamo, "compile_graph", lambda *_: pytest.fail("compiled again"))
        (second,) = capture(scaled, tensors, tmp_path)
    assert second.graph is None
    assert second.launch == first.launch
    assert len(second.loads) == len(first.loads) > 0
    older = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", major=8, minor=0)
    (other,) = capture(scaled, tensors, tmp_path, properties=older)
    assert other.graph is not None
    assert other.graph.kernels.keys() == first.graph.kernels.keys()
    assert other.graph.kernels != first.graph.kernels


def mixed(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x) * w * (scale + 1)).exp()


def test_what_touches_another_device_stays_as_it_is(tmp_path: Path) -> None:
    """A number on the CPU in a graph on CUDA, as eager allows: its calls stay, the stretches between them are compiled."""
    parts = capture(mixed, [torch.randn(4, 64), torch.randn(64), torch.tensor(2.0)], tmp_path, stay={2})
    callees = {op for part in parts if part.graph for kernel in part.graph.program.steps for op in getattr(kernel, "ops", ())}
    assert len(parts) == 2
    assert all(part.loads for part in parts)
    assert "aten.add.Tensor" not in callees
    assert any("exp" in op for op in callees)


def test_a_device_without_a_target_runs_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    with caplog.at_level(logging.WARNING, "flagtree"):
        found = capture(scaled, [torch.randn(4, 64), torch.randn(64)], tmp_path, properties=older)
    assert found == []
    assert "no target fits the device Tesla T4" in caplog.text
