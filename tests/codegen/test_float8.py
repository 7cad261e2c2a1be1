"""e4m3fn in both generators: every byte to f32, and f32 to the nearest byte, where PyTorch's own conversion puts it."""

from __future__ import annotations

import pytest
import torch

from flagtree.ir.canonical import digest, isolate
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Kernel, Program
from flagtree.targets import find_target
from flagtree.toolchain.emulator import execute_built, missing
from tests.codegen import cpp_runner
from tests.scheduled import build_maca, generate

E4M3 = torch.float8_e4m3fn
_KERNEL = """
program p
  symbol s in 0..100000 from dim x 0
  buffer x: {0}[s] input
  buffer y: {1}[s] temp
  kernel k {{i0 < s}} numerics(eager, contract=off, acc=f32)
    v0: {0} = load x[i0]
    {2}
    store y[i0] = v2
  outputs y
"""
TO_BYTES = _KERNEL.format("f32", "u8", "v1: f8e4m3fn = cast v0\n    v2: u8 = bitcast v1")
TO_NUMBERS = _KERNEL.format("u8", "f32", "v1: f8e4m3fn = bitcast v0\n    v2: f32 = cast v1")
ALL = torch.arange(256, dtype=torch.uint8)


def numbers() -> torch.Tensor:
    """Each number of the format, the middle of each two and what lies next to it on both sides, then what no such place covers."""
    known = ALL.view(E4M3).float()
    known = known[~known.isnan()].sort().values
    middle = (known[1:] + known[:-1]) / 2
    around = torch.cat([known, middle, middle.nextafter(torch.tensor(1e9)), middle.nextafter(torch.tensor(-1e9))])
    wide = torch.tensor([float("inf"), -float("inf"), float("nan"), 464.0, 465.0, 1e30, -1e30, 1e-30, -1e-30, 2**-10, 1e-42])
    return torch.cat([around, wide, torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 100])


def check(as_bytes: torch.Tensor, as_numbers: torch.Tensor) -> None:
    """Of NaN only that it is one."""
    wanted = numbers().to(E4M3).view(torch.uint8)
    differ = (as_bytes != wanted) & ~(((as_bytes & 127) == 127) & ((wanted & 127) == 127))
    assert not differ.any(), (numbers()[differ][:5], as_bytes[differ][:5], wanted[differ][:5])
    assert cpp_runner.same_bits(as_numbers, ALL.view(E4M3).float())


def test_cpp_converts_as_torch() -> None:
    x = numbers()
    check(cpp_runner.run(TO_BYTES, {"x": x}, {"s": len(x)})["y"], cpp_runner.run(TO_NUMBERS, {"x": ALL}, {"s": 256})["y"])


def isolated(text: str) -> Program:
    program = parse_program(text)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return isolate(program, kernel).program


@pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")
def test_triton_converts_as_torch() -> None:
    programs = [isolated(t) for t in (TO_BYTES, TO_NUMBERS)]
    built = build_maca([(digest(p), p) for p in programs], find_target("metax"))
    x = numbers()
    as_bytes, as_numbers = torch.empty(len(x), dtype=torch.uint8), torch.empty(256)
    execute_built(built[0], "generic", [x, as_bytes], [len(x)])
    execute_built(built[1], "generic", [ALL.clone(), as_numbers], [256])
    check(as_bytes, as_numbers)


@pytest.mark.parametrize("target", ["cuda:sm80", "cuda:sm90", "rocm:gfx942", "metax"])
def test_every_target_gets_one_text_without_the_type(target: str) -> None:
    """Triton has e4m3fn only on some chips, its release 3.1 not on all of those: integers do it everywhere."""
    stored = TO_BYTES.replace("y: u8", "y: f8e4m3fn").replace("\n    v2: u8 = bitcast v1", "").replace("= v2", "= v1")
    program = isolated(stored)
    source = generate(program, digest(program), find_target(target))
    assert "float8" not in source.text and dict(source.signature)["b1"] == "*u8" and "f8e4m3fn_of(" in source.text
