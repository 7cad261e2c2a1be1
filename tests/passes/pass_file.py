"""One pass test as a text file: directives, input program, expectation; and everything that is checked about it.

    // run: canonicalize, fuse_pointwise{max_ops=4}
    // target: cpu                    optional; the CPU without it
    // integers t: 0..n - 1           optional; the values of an integer input that is an index, ends included
    program ...
    // expect                         or  // refused: REASON (part of one)  or  // error: RULE (of the input)
    program ...

Besides the expectation: the text round-trips, input and output verify, and both compute the same under the interpreter.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flagtree.errors import IRError
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.index import Index, parse_index
from flagtree.ir.interp import run
from flagtree.ir.program import Buffer, Program, Repeat, Step, Symbol
from flagtree.ir.text import parse_program, print_program
from flagtree.ir.verify import verify
from flagtree.runtime import operators as operators  # registers torch.ops.flagtree.*, which programs call

SAMPLES = 4
_DIRECTIVE = re.compile(r"// *(run|target|integers|refused|error)[: ] *(.*)")


@dataclass(frozen=True)
class PassFile:
    path: Path
    spec: str
    target: str
    integers: dict[str, tuple[Index, Index]]
    program: str
    expect: str | None
    refused: tuple[str, ...]
    error: str


def read(path: Path) -> PassFile:
    """Split a file into its parts; an AssertionError says what is missing."""
    found: dict[str, list[str]] = {"run": [], "target": [], "integers": [], "refused": [], "error": []}
    text, mark, expect = path.read_text("utf-8").partition("\n// expect\n")
    program = []
    for line in text.split("\n"):
        if match := _DIRECTIVE.fullmatch(line.strip()):
            found[match[1]].append(match[2].strip())
        else:
            assert not line.lstrip().startswith("//"), f"{path}: unknown directive {line!r}"
            program.append(line)
    assert len(found["run"]) == 1, f"{path}: exactly one '// run: PASSES' is needed"
    integers = {}
    for line in found["integers"]:
        name, ends = line.split(":")
        low, high = ends.split("..")
        integers[name.strip()] = (parse_index(low), parse_index(high))
    return PassFile(
        path, found["run"][0], (found["target"] or ["cpu"])[0], integers, "\n".join(program).strip() + "\n",
        expect if mark else None, tuple(found["refused"]), (found["error"] or [""])[0],
    )  # fmt: skip


def check(file: PassFile, parse_pipeline: Callable[[str], Sequence[Any]], target: Any, accept: bool) -> None:
    """Everything about one file; AssertionError where it does not hold."""
    before = parse_program(file.program)
    assert print_program(parse_program(print_program(before))) == print_program(before)
    if file.error:
        with pytest.raises(IRError, match=f"rule {file.error} "):
            verify(before)
        return
    verify(before)
    after, refusals = before, []
    for p in parse_pipeline(file.spec):
        after, report = p.run(after, target)
        refusals += report.refusals
        verify(after)
    output = print_program(after)
    assert print_program(parse_program(output)) == output
    same_results(before, after, file.integers)
    for reason in file.refused:
        assert any(reason in r for r in refusals), f"{file.path}: nothing was refused with '{reason}', but {refusals}"
    if accept and (file.expect is not None or not file.refused):
        _accept(file, output)
    elif file.expect is None:
        assert file.refused, f"{file.path}: no expectation; `pytest tests/passes --accept` writes one"
    else:
        assert output == file.expect, f"{file.path}: `pytest tests/passes --accept` if the new output is right"


def _accept(file: PassFile, output: str) -> None:
    head = file.path.read_text("utf-8").partition("\n// expect\n")[0].rstrip("\n")
    file.path.write_text(f"{head}\n// expect\n{output}", "utf-8")


# -- equal under the interpreter -------------------------------------------------------------------------------------
def same_results(before: Program, after: Program, integers: dict[str, tuple[Index, Index]]) -> None:
    """Both programs give the same outputs and states on seeded inputs at several sizes."""
    for seed in range(SAMPLES):
        rng = random.Random(seed)
        sizes = {s.name: _size(s, rng, seed) for s in before.symbols}
        inputs = make_inputs(before, sizes, integers, seed)
        arguments = {s.name: sizes[s.name] for s in before.symbols if s.source[0] == "argument"}
        want, got, truth = (
            run(p, {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}, symbols=arguments, dtype_override=o)
            for p, o in ((before, None), (after, None), (before, "f64"))
        )
        assert want.keys() == got.keys()
        for name in want:
            assert_equal(f"{name} at {sizes}", want[name], got[name], truth[name])


def assert_equal(what: str, want: torch.Tensor, got: torch.Tensor, truth: torch.Tensor) -> None:
    """The same bits, or floats whose error against float64 is no worse than the input program's (docs/numerics)."""
    assert (want.shape, want.dtype, want.stride()) == (got.shape, got.dtype, got.stride()), what
    if not want.dtype.is_floating_point:
        assert torch.equal(want, got), what
        return
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(want), special(got)), f"{what}: {special.__name__} elsewhere"
    finite = torch.isfinite(want) & torch.isfinite(truth)
    if not finite.any():
        return
    exact = truth[finite].double()
    eager, ours = ((x[finite].double() - exact).square().mean().sqrt() for x in (want, got))
    assert ours <= 4 * eager + 1e-6 * exact.abs().mean(), f"{what}: error {ours} against {eager} before"


def _size(symbol: Symbol, rng: random.Random, seed: int) -> int:
    """Lowest, highest (clipped), then 1 and odd sizes, all inside the range and a multiple."""
    step = symbol.multiple
    low = -(-symbol.lo // step) * step
    high = min(symbol.hi, max(low + 2 * step, 9)) // step * step
    fitting = [v for v in (low, low + step, 1, 3, 5, 7, high) if low <= v <= high and v % step == 0]
    return (low, high)[seed] if seed < 2 else rng.choice(fitting)


def make_inputs(program: Program, sizes: dict[str, int], integers: dict[str, tuple[Index, Index]], seed: int) -> dict[str, Any]:
    """What a caller passes: normal floats, integers 0 and 1 where the file gives no range, in the declared layout."""
    formals = set(_formals(program.steps))
    scalars = {s.source[1]: sizes[s.name] for s in program.symbols if s.source[0] == "scalar"}
    random_numbers = torch.Generator().manual_seed(seed)
    out: dict[str, Any] = {}
    for b in program.inputs:
        if b.name in formals or b.role == "opaque":
            continue
        ends = integers.get(b.name)
        low, high = (0, 1) if ends is None else (ends[0].evaluate(sizes), ends[1].evaluate(sizes))
        out[b.name] = scalars[b.name] if b.name in scalars else _tensor(b, sizes, low, high, random_numbers)
    return out


def _tensor(b: Buffer, sizes: dict[str, int], low: int, high: int, random_numbers: torch.Generator) -> torch.Tensor:
    shape, strides = [e.evaluate(sizes) for e in b.shape], [e.evaluate(sizes) for e in b.layout]
    dtype = torch_dtype(b.dtype)
    if dtype.is_floating_point:
        values = torch.randn(shape, generator=random_numbers)
    else:
        values = torch.randint(low, max(low, high) + 1, shape, generator=random_numbers)
    return torch.empty_strided(shape, strides, dtype=dtype).copy_(values)


def _formals(steps: Sequence[Step]) -> list[str]:
    repeats = [s for s in steps if isinstance(s, Repeat)]
    return [f for s in repeats for f, _ in s.bindings] + [f for s in repeats for f in _formals(s.body)]
