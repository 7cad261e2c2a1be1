"""Runs a kernel's text through the C++ generator, the compiler and ctypes, at every level that this CPU executes.

Every buffer stands between canaries; every level must give the same bits.  `reference` runs the interpreter on the same inputs.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from flagtree.codegen.cpp import generate, symbol_name
from flagtree.ir import interp
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Kernel, Program
from flagtree.ir.text import parse_program, print_program
from flagtree.runtime.cpu import levels
from flagtree.toolchain import cxx

torch.set_num_threads(1)
Tensors = Mapping[str, torch.Tensor]
CANARY = 64  # bytes before and after each buffer


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def function(text: str, level: str) -> Callable[..., None]:
    """The compiled kernel of an isolated program's text."""
    program = parse_program(text)
    key = digest(program)
    shared = cxx.link([(key, cxx.compile_object(generate(program, key), level))], level)
    path = Path(_folder().name) / f"{key}-{level}.so"
    path.write_bytes(shared)
    found = getattr(ctypes.CDLL(str(path)), symbol_name(key))
    found.restype = None
    return found


class Guarded:
    """A copy of a tensor, strides kept, between canaries, at `shift` elements from alignment."""

    def __init__(self, source: torch.Tensor, shift: int = 0) -> None:
        size = source.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(source.shape, source.stride(), strict=True)) if source.numel() else 0
        self.start = CANARY + shift * size
        self.memory = torch.full((self.start + span * size + CANARY,), 0xA5, dtype=torch.uint8)
        self.end = self.start + span * size
        address = self.memory.data_ptr() + self.start
        self.pointer = address
        raw = (ctypes.c_char * max(1, self.end - self.start)).from_address(address)
        self._raw = raw
        flat = torch.frombuffer(raw, dtype=source.dtype, count=span) if span else torch.empty(0, dtype=source.dtype)
        self.tensor = flat.as_strided(source.shape, source.stride()) if span else source.clone()
        if span:
            self.tensor.copy_(source)

    def intact(self) -> bool:
        return bool((self.memory[: self.start] == 0xA5).all()) and bool((self.memory[self.end :] == 0xA5).all())


def empty(program: Program, name: str, symbols: Mapping[str, int]) -> torch.Tensor:
    """A fresh output, filled with what the interpreter fills it with."""
    b = program.buffer(name)
    shape, strides = [e.evaluate(symbols) for e in b.shape], [e.evaluate(symbols) for e in b.layout]
    dtype = torch_dtype(b.dtype)
    fill = float("nan") if dtype.is_floating_point else False if dtype == torch.bool else torch.iinfo(dtype).min
    out = torch.empty_strided(shape, strides, dtype=dtype)
    return out.fill_(fill) if out.numel() else out


def run(text: str, inputs: Tensors, symbols: Mapping[str, int] | None = None, shift: int = 0) -> dict[str, torch.Tensor]:
    """Outputs by buffer name, equal at every level."""
    program = parse_program(text)
    symbols = dict(symbols or {})
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    alone = isolate(program, kernel)
    isolated_text = print_program(alone.program)
    results: list[dict[str, torch.Tensor]] = []
    for level in levels():
        guarded = {n: Guarded(inputs[n] if n in inputs else empty(program, n, symbols), shift) for n in alone.buffers}
        pointers = (ctypes.c_void_p * max(1, len(guarded)))(*(g.pointer for g in guarded.values()))
        values = (ctypes.c_int64 * max(1, len(alone.symbols)))(*(symbols[s] for s in alone.symbols))
        function(isolated_text, level)(pointers, values)
        assert all(g.intact() for g in guarded.values()), f"{level}: wrote outside a buffer"
        for n in kernel.reads:
            if n not in kernel.writes:
                assert same_bits(guarded[n].tensor, inputs[n]), f"{level}: wrote to the input {n}"
        results.append({n: guarded[n].tensor.clone() for n in kernel.writes})
    for level, other in zip(levels()[1:], results[1:], strict=True):
        for n in other:
            assert same_bits(other[n], results[0][n]), f"{n}: {level} differs from {levels()[0]}"
    return results[0]


def reference(text: str, inputs: Tensors, symbols: Mapping[str, int] | None = None, **options: str) -> dict[str, torch.Tensor]:
    """The interpreter's outputs and written inputs."""
    program = parse_program(text)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    copies = {n: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for n, t in inputs.items()}
    out = interp.run(program, copies, symbols=symbols or {}, **options)
    return {n: out[n] for n in kernel.writes}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and values; NaN equals NaN, -0.0 differs from 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    if a.element_size() == 1:
        a, b = a.float(), b.float()  # every e4m3fn is a float
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan]) and torch.equal(a[~nan].signbit(), b[~nan].signbit())


def check_exact(text: str, inputs: Tensors, symbols: Mapping[str, int] | None = None, shift: int = 0) -> dict[str, torch.Tensor]:
    """C++ gives the interpreter's bits."""
    ours, theirs = run(text, inputs, symbols, shift), reference(text, inputs, symbols)
    for name, value in ours.items():
        bad = ~((value == theirs[name]) | ((value != value) & (theirs[name] != theirs[name])))
        assert same_bits(value, theirs[name]), f"{name}: {int(bad.sum())} differ, {value[bad][:4]} against {theirs[name][bad][:4]}"
    return ours


def check_close(text: str, inputs: Tensors, symbols: Mapping[str, int] | None = None, shift: int = 0) -> dict[str, torch.Tensor]:
    """The project's rule of equality: root-mean-square error against float64 at most 4x the interpreter's plus 1e-6 of the mean
    magnitude; NaN and inf at the same places; integers equal."""
    ours, theirs = run(text, inputs, symbols, shift), reference(text, inputs, symbols)
    truth = reference(text, inputs, symbols, dtype_override="f64")
    for name, value in ours.items():
        if not value.dtype.is_floating_point:
            assert torch.equal(value, theirs[name]), name
            continue
        finite = theirs[name].isfinite()
        assert same_bits(value[~finite], theirs[name][~finite]), f"{name}: NaN or inf at other places"
        exact = truth[name][finite].double()
        if not exact.numel():
            continue
        error = (value[finite].double() - exact).square().mean().sqrt()
        allowed = 4 * (theirs[name][finite].double() - exact).square().mean().sqrt() + 1e-6 * exact.abs().mean()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return ours
