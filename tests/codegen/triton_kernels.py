"""How a test runs one of the kernels of triton_texts against the interpreter."""

from __future__ import annotations

from dataclasses import replace

import torch

from flagtree.ir.canonical import digest, isolate
from flagtree.ir.dtypes import DTYPES, TORCH_NAMES
from flagtree.ir.interp import run
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Kernel, Program
from flagtree.targets import find_target
from flagtree.targets.base import Target
from tests.codegen.triton_texts import NUMERICS, TEXTS

METAX: Target = replace(find_target("metax"), row_limit=16384)
__all__ = ["GFX942", "METAX", "NUMERICS", "SM80", "SM90", "TEXTS", "assert_close", "buffers", "isolated", "keyed", "reference"]

SM80, SM90, GFX942 = (find_target(n) for n in ("cuda:sm80", "cuda:sm90", "rocm:gfx942"))


def isolated(name: str, text: str | None = None) -> Program:
    """The kernel of that name alone, with canonical names."""
    program = parse_program(text or TEXTS[name])
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return isolate(program, kernel).program


def keyed(name: str) -> tuple[str, Program]:
    program = isolated(name)
    return digest(program), program


def buffers(program: Program, symbols: dict[str, int], seed: int) -> list[torch.Tensor]:
    """Random contents for every buffer: small integers, floats around zero."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for b in program.buffers:
        dtype = getattr(torch, TORCH_NAMES[b.dtype])
        shape = [d.evaluate(symbols) for d in b.shape]
        if DTYPES[b.dtype].is_float:
            out.append(
                torch.randn(shape, generator=generator).to(dtype) if b.role != "temp" else torch.full(shape, float("nan"), dtype=dtype)
            )
        else:
            high = 2 if b.dtype == "b1" else 10
            values = torch.randint(-9 if b.dtype in ("i32", "i16") else 0, high, shape, generator=generator)
            out.append(torch.where(values == 0, 1 if b.dtype == "i32" else 0, values).to(dtype))
    return out


def reference(program: Program, tensors: list[torch.Tensor], symbols: dict[str, int], override: str | None = None) -> list[torch.Tensor]:
    """What the interpreter leaves in each buffer."""
    inputs = {b.name: t.clone() for b, t in zip(program.buffers, tensors, strict=True) if b.role != "temp"}
    found = run(program, inputs, symbols=symbols, dtype_override=override)
    return [found.get(b.name, inputs.get(b.name)) for b in program.buffers]  # type: ignore[misc]


def assert_close(name: str, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """Equal to eager (DESIGN §9): integers exact; floats: rms error against float64 at most 4 times eager's own and 1e-6 of the mean."""
    assert got.dtype == eager.dtype and got.shape == eager.shape
    if not got.dtype.is_floating_point:
        assert torch.equal(got, eager), name
        return
    assert torch.equal(got.isnan(), eager.isnan()) and torch.equal(got.isinf(), eager.isinf()), name
    fine = eager.isfinite()
    exact = truth.double()[fine]
    own, ours = (((t.double()[fine] - exact) ** 2).mean().sqrt() for t in (eager, got))
    assert fine.sum() == 0 or ours <= 4 * own + 1e-6 * exact.abs().mean(), f"{name}: rms {ours:.3e}, eager's own {own:.3e}"
