"""Kernels at the upper end of their ranges: right ones pass at true size and addresses, wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from flagtree.check.inputs import lower_ends, upper_ends
from flagtree.check.positions import Positions
from flagtree.check.scattered import scattered
from flagtree.check.sparse import Strays
from flagtree.check.upper import run_blocks
from flagtree.codegen.triton import generate
from flagtree.errors import ToolchainError
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Kernel, Program
from flagtree.ir.text import parse_program
from flagtree.passes.tiling import scheduled
from flagtree.targets import find_target
from flagtree.toolchain import emulator, maca
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.triton_aot import Workers, workers

Build = Callable[..., BuiltKernel]
METAX = find_target("metax")
GATE = """program gate
  symbol s0 in 1..64 from dim x 0
  symbol s1 in 1..40960 from dim x 1
  buffer x: D[s0, s1, 12288] input
  buffer y: D[s0, s1, 12288] temp
  kernel gate {i0 < s0, i1 < s1, i2 < 12288} numerics(eager, contract=off, acc=f32)
    v0: D = load x[i0, i1, i2]
    v1: f32 = cast v0
    v2: f32 = mul v1, 3.0
    v3: D = cast v2
    store y[i0, i1, i2] = v3
  outputs y
"""
ROWS = """program rows
  symbol s0 in 1..64 from dim k 0
  symbol s1 in 1..40960 from dim k 1
  symbol s2 in 1..40960 from dim cache 1
  buffer start: i64[s0] input
  buffer k: D[s0, s1, 1024] input
  buffer cache: D[s0, s2, 1024] temp
  kernel rows {i0 < s0, i1 < s1, i2 < 1024} numerics(eager, contract=off, acc=f32)
    v0: i64 = load start[i0]
    v1: i64 = index i1
    v2: i64 = add v0, v1
    v3: b1 = ge v2, 0
    v4: i64 = index s2
    v5: b1 = lt v2, v4
    v6: b1 = and v3, v5
    v7: D = load k[i0, i1, i2]
    store cache[i0, v2, i2] = v7 if v6
  outputs cache
"""


def isolated(text: str, dtype: str) -> Program:
    program = parse_program(text.replace(": D", f": {dtype}"))
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return scheduled(isolate(program, kernel).program, METAX)


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    with workers(1) as pool:
        yield lambda program, *changes: built(pool, program, changes)


def built(pool: Workers, program: Program, changes: tuple[tuple[str, str], ...]) -> BuiltKernel:
    """The kernel from its generated source, with pieces of the text replaced."""
    made = generate(program, digest(program), METAX)
    text = made.text
    for old, new in changes:
        assert old in text, text
        text = text.replace(old, new)
    return maca.build_sources([(digest(program), replace(made, text=text))], METAX, pool)[0]


def test_settings_at_the_ends() -> None:
    program = isolated(ROWS, "bf16")
    assert lower_ends(program) == {"n0": 1, "n1": 1, "n2": 1}
    assert upper_ends(program) == [
        ("all", {"n0": 64, "n1": 40960, "n2": 40960}),
        ("n0", {"n0": 64, "n1": 1, "n2": 64}),
        ("n1", {"n0": 1, "n1": 40960, "n2": 40960}),
        ("n2", {"n0": 1, "n1": 1, "n2": 40960}),
    ]


def test_values_depend_on_the_position_alone() -> None:
    program = isolated(GATE, "f32")
    values, other = (Positions(program, {"n0": 64, "n1": 40960}, seed) for seed in (5, 6))
    at = torch.randint(0, 64 * 40960 * 12288, (20000,))
    whole = values.at("b0", at)
    assert torch.equal(values.at("b0", at.flip(0)), whole.flip(0))
    assert abs(float(whole.mean())) < 0.03 and abs(float(whole.std()) - 1) < 0.03 and whole.dtype == torch.float32
    assert not torch.equal(other.at("b0", at), whole)
    row, next_row, wrapped = (values.at("b0", torch.arange(12288) + shift) for shift in (0, 12288, 2**32))
    assert (row != next_row).float().mean() > 0.99 and (row != wrapped).float().mean() > 0.99
    assert scattered(torch.arange(10000), 1).unique().numel() == 10000


def test_integers_stay_where_accesses_are_in_bounds() -> None:
    program = isolated(ROWS, "bf16")
    values = Positions(program, {"n0": 64, "n1": 1, "n2": 40960}, 1).at("b0", torch.arange(64))
    assert values.dtype == torch.int64 and 0 <= int(values.min()) < 5000 and 35000 < int(values.max()) <= 40959


@pytest.mark.skipif(bool(emulator.missing()), reason="the emulator does not run here")
class TestEmulated:
    @pytest.mark.parametrize("dtype", ["bf16", "f32"])
    @pytest.mark.parametrize("text", [GATE, ROWS])
    def test_a_right_kernel(self, build: Build, text: str, dtype: str) -> None:
        program = isolated(text, dtype)
        kernel = build(program)
        several = False  # one end alone may be one block, all ends together are not
        for _, symbols in upper_ends(program):
            found = run_blocks(program, kernel, symbols, 7)
            several |= found.what.startswith("blocks 0, ")
            assert found.what.startswith("blocks 0, ") or found.what.startswith("blocks 0 of (1, 1, 1)")
            assert found.ways == ("aligned", "generic")
            for name, ours in found.ours.items():
                assert ours.dtype == torch_dtype(dtype) and torch.equal(ours, found.own[name])
                assert float((ours.double() - found.truth[name]).abs().max()) < 0.04
        assert several

    def test_an_index_of_32_bits(self, build: Build) -> None:
        """At every other size this kernel is right: 64 x 40960 x 12288 elements are what 32 bits do not hold."""
        program = isolated(GATE, "bf16")
        kernel = build(program, (".to(tl.int64)", ""))
        assert torch.equal(*(getattr(run_blocks(program, kernel, {"n0": 64, "n1": 1}, 7), kind)["b1"] for kind in ("ours", "own")))
        with pytest.raises(ToolchainError, match="outside every argument"):
            run_blocks(program, kernel, {"n0": 64, "n1": 40960}, 7)

    def test_an_index_that_wraps_inside(self, build: Build) -> None:
        """Reads and writes agree on a wrong row that exists and nothing faults: the row that is this block's to write stays NaN."""
        program = isolated(GATE, "bf16")
        kernel = build(program, ("x.to(tl.int64) * 1024", "(x % 1000).to(tl.int64) * 1024"))
        found = run_blocks(program, kernel, {"n0": 64, "n1": 40960}, 7)
        assert found.ours["b1"].isnan().any()

    def test_a_write_that_is_not_the_blocks_to_write(self, build: Build) -> None:
        program = isolated(GATE, "bf16")
        store = next(line.strip() for line in generate(program, digest(program), METAX).text.splitlines() if "tl.store(" in line)
        kernel = build(program, (store, f"{store}; tl.store(b1 + (i2 + 5120000), v3, mask=i2 < 1024)"))
        with pytest.raises(Strays, match="not its to write"):
            run_blocks(program, kernel, {"n0": 64, "n1": 40960}, 7)

    def test_a_cache_row_of_32_bits(self, build: Build) -> None:
        program = isolated(ROWS, "f32")
        made = generate(program, digest(program), METAX).text
        wide = next(line for line in made.splitlines() if "tl.store(b2" in line)
        narrow = wide.replace("b2 + ", "b2 + (").replace(", v7", ").to(tl.int32), v7", 1)
        assert "tl.int64" in wide
        with pytest.raises((Strays, ToolchainError)):
            run_blocks(program, build(program, (wide, narrow.replace("b2 + ((", "b2 + (("))), {"n0": 64, "n1": 1, "n2": 40960}, 7)

    def test_values_that_are_wrong_show(self, build: Build) -> None:
        program = isolated(GATE, "f32")
        found = run_blocks(program, build(program, ("* 3.0", "* 3.0000002")), {"n0": 1, "n1": 40960}, 7)
        assert not torch.equal(found.ours["b1"], found.own["b1"])

    def test_a_record_with_another_grid(self, build: Build) -> None:
        program = isolated(GATE, "bf16")
        kernel = build(program)
        launch = {**kernel.launch, "grid": [["*", 11, "n0", "n1"], 1, 1]}
        with pytest.raises(Strays, match="another grid"):
            run_blocks(program, replace(kernel, launch=launch), {"n0": 2, "n1": 2}, 7)
