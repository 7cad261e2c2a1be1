"""A small bundle with every kind of file in it; its kernels are never executed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flagtree.artifact.bundle import write_bundle

DIGEST = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Kernel:
    digest: str = DIGEST
    tier: str = "binary"
    missing: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"kernel.cpp": b"// source\n", "x86-64-v3.o": b"\x7fELF" + bytes(64)})
    launch: dict[str, object] = field(default_factory=lambda: {"symbol": "ft_0123456789abcdef"})
    facts: dict[str, object] = field(default_factory=lambda: {"bytes": 68})


LAUNCH = {
    "format": 1,
    "name": "prefill",
    "symbols": [{"name": "s0", "min": 1, "max": 64, "multiple": 1, "source": ["dim", "x", 0]}],
    "buffers": [
        {"name": "x", "dtype": "f32", "shape": ["s0", 4], "strides": None, "role": "input", "alias": None},
        {"name": "w", "dtype": "f32", "shape": [4, 4], "strides": None, "role": "weight", "alias": None},
        {"name": "y", "dtype": "f32", "shape": ["s0", 4], "strides": None, "role": "temp", "alias": None},
        {"name": "z", "dtype": "f32", "shape": ["s0", 4], "strides": None, "role": "temp", "alias": None},
    ],
    "outputs": ["z"],
    "steps": [
        {"kernel": DIGEST, "name": "k0", "buffers": ["x", "y"], "writes": [1], "symbols": ["s0"]},
        {
            "extern": "aten.linear.default",
            "name": "e0",
            "args": [{"buffer": "y"}, {"buffer": "w"}],
            "kwargs": {},
            "outputs": ["z"],
            "mutates": [],
            "reason": "gemm",
        },
    ],
}

Write = Callable[..., str]


@pytest.fixture
def write() -> Write:
    """write(path, **changes) -> digest."""

    def make(path: Path, **changes: object) -> str:
        import torch

        arguments: dict[str, object] = {
            "name": "toy",
            "target": "cpu",
            "parts": {"prefill": LAUNCH, "decode": {**LAUNCH, "name": "decode"}},
            "kernels": [Kernel()],
            "libraries": {"x86-64-v2": b"two", "x86-64-v3": b"three"},
            "constants": {"rope": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
            "coverage": {"symbols": {"s0": [1, 64]}},
            "versions": {"flagtree": "0.1.0", "torch": "2.13.0"},
            "certificate": {"kernels": {DIGEST: {"error": 1e-7}}},
        }
        return write_bundle(path, **{**arguments, **changes})  # type: ignore[arg-type]

    return make
