"""Folding of equal layers: the folded program at any depth computes what a program written out at that depth computes."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

import pytest
import torch

from flagtree.errors import IRError
from flagtree.ir.canonical import digest, isolate_all
from flagtree.ir.interp import run
from flagtree.ir.program import Program, Repeat
from flagtree.ir.text import parse_program, print_program
from flagtree.ir.verify import verify
from flagtree.passes.repeat import Layers, Run, fold_layers

_LAYER = re.compile(r"\bL(\d+)\b")


def layers(captured: int, depth: int) -> Layers:
    def layer_of(name: str) -> int | None:
        found = _LAYER.search(name)
        return int(found[1]) if found else None

    return Layers((Run(0, depth, captured),), layer_of, lambda name, i: _LAYER.sub(f"L{i}", name))


def written_out(depth: int, odd: Container[int] = (), numbers: Sequence[int] | None = None) -> Program:
    """h = x; per layer: c += h * w (a state), t = linear(c view), h = h + t; then a norm.  Layers in `odd` add where others multiply;
    `numbers`: the layers, where it is not all of them."""
    buffers = ["buffer x: f32[n, 4] input"]
    steps, h = [], "x"
    for k in range(depth) if numbers is None else numbers:
        buffers += [f"buffer w.L{k}: f32[4] weight", f"buffer p.L{k}: f32[4, 4] weight", f"buffer c.L{k}: f32[n, 4] state"]
        buffers += [f"buffer t{k}: f32[n, 4] temp", f"buffer v{k}: f32[n, 2, 2] temp alias t{k} + 0", f"buffer h{k}: f32[n, 4] temp"]
        op = "add" if k in odd else "mul"
        steps.append(f"""
  kernel write{k} {{i0 < n, i1 < 4}} numerics(eager, contract=off, acc=f32)
    v0: f32 = load {h}[i0, i1]
    v1: f32 = load w.L{k}[i1]
    v2: f32 = {op} v0, v1
    v3: f32 = load c.L{k}[i0, i1]
    v4: f32 = add v2, v3
    store c.L{k}[i0, i1] = v4
  extern product{k}: (t{k}) = aten.linear.default(c.L{k}, p.L{k}) reason "test"
  kernel sum{k} {{i0 < n, i1 < 4}} numerics(eager, contract=off, acc=f32)
    v0: f32 = load {h}[i0, i1]
    v1: f32 = load v{k}[i0, i1 // 2, i1 % 2]
    v2: f32 = add v0, v1
    store h{k}[i0, i1] = v2""")
        h = f"h{k}"
    buffers += ["buffer y: f32[n, 4] temp", f"buffer end: f32[n, 2, 2] temp alias {h} + 0"]  # a view that the last step alone takes
    steps.append("""
  kernel last {i0 < n, i1 < 4} numerics(eager, contract=off, acc=f32)
    v0: f32 = load end[i0, i1 // 2, i1 % 2]
    v1: f32 = neg v0
    store y[i0, i1] = v1""")
    text = "program deep\n  symbol n in 1..8 from dim x 0\n" + "".join(f"  {b}\n" for b in buffers) + "".join(steps).lstrip("\n")
    return parse_program(text + "\n  outputs y\n")


def inputs(depth: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(depth)
    out = {"x": torch.randn(3, 4, generator=generator)}
    for k in range(depth):
        out |= {f"w.L{k}": torch.randn(4, generator=generator), f"p.L{k}": torch.randn(4, 4, generator=generator) / 4}
        out[f"c.L{k}"] = torch.randn(3, 4, generator=generator)
    return out


@pytest.mark.parametrize("depth", [3, 4, 9])
def test_folded_program_equals_the_one_written_out(depth: int) -> None:
    folded = fold_layers(written_out(3), layers(3, depth))
    verify(folded)
    assert print_program(parse_program(print_program(folded))) == print_program(folded)
    given = inputs(depth)
    mine = run(folded, {k: v.clone() for k, v in given.items()})
    theirs = run(written_out(depth), {k: v.clone() for k, v in given.items()})
    assert mine.keys() == theirs.keys() and len(mine) == depth + 1
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("deep", [6, 11])
def test_kinds_of_layers_are_folded_one_by_one(deep: int) -> None:
    """Four layers that multiply, `deep` that add, one that multiplies: of the first two kinds three each are in the program."""
    odd, depth = range(4, 4 + deep), 4 + deep + 1
    captured = written_out(0, odd, (0, 1, 2, 4, 5, 6, depth - 1))
    kinds = layers(0, 0)
    runs = (Run(0, 4, 3), Run(4, deep, 3), Run(depth - 1, 1, 1))
    folded = fold_layers(captured, Layers(runs, kinds.layer_of, kinds.at_layer))
    verify(folded)
    assert [s.count for s in folded.steps if isinstance(s, Repeat)] == [3, deep - 1]
    given = inputs(depth)
    mine = run(folded, {k: v.clone() for k, v in given.items()})
    theirs = run(written_out(depth, odd), {k: v.clone() for k, v in given.items()})
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


def test_size_does_not_grow_with_depth() -> None:
    shallow, deep = (fold_layers(written_out(3), layers(3, d)) for d in (4, 144))
    assert len(shallow.steps) == len(deep.steps)
    repeat = next(s for s in deep.steps if isinstance(s, Repeat))
    assert repeat.count == 143 and len(repeat.body) == 3
    kernels = [{digest(one.program) for _, one in isolate_all(p)} for p in (shallow, deep)]
    assert kernels[0] == kernels[1]


def test_layers_that_differ_are_refused() -> None:
    with pytest.raises(IRError, match="layers differ"):
        fold_layers(written_out(4, odd=(2,)), layers(4, 8))


def test_a_shallow_model_is_left_alone() -> None:
    program = written_out(2)
    assert fold_layers(program, layers(2, 2)) is program
    with pytest.raises(IRError, match="three captured layers"):
        fold_layers(program, layers(2, 5))
