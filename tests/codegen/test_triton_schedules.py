"""Any legal schedule gives the interpreter's numbers: random tiles, loops, lanes and warps over the kernels of triton_texts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from flagtree.codegen.triton import generate
from flagtree.errors import CodegenError
from flagtree.ir.canonical import digest
from flagtree.ir.program import Kernel, Program, Schedule
from flagtree.toolchain import maca
from flagtree.toolchain.emulator import execute_built, missing
from flagtree.toolchain.triton_aot import workers
from tests.codegen.triton_kernels import METAX, TEXTS, assert_close, buffers, isolated, reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")
SMALL = (
    *("rotary", "softmax", "layernorm", "cross_entropy", "argmax", "cumsum", "cumulative_loop", "columns"),
    *("batch_statistics", "transpose", "integers", "accumulate", "online", "residual", "rmsnorm_odd"),
)
REFUSALS = ("Triton's limit", "updated in place by", "runs inside another loop", "covers")


def random_schedule(program: Program, chance: random.Random) -> Schedule:
    """A tile for some axes; a reduced axis is whole or looped."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    high = {s.name: s.hi for s in program.symbols}
    tiles, loops, room = [], [], 8192
    for axis in kernel.axes:
        longest = axis.extent.evaluate(high)
        size = 1 << chance.randrange(0, 8)
        if axis.kind == "reduce":
            whole = 1 << (longest - 1).bit_length()
            if whole <= room and chance.random() < 0.5:
                size = whole
            else:
                loops.append(axis.name)
        elif chance.random() < 0.4:
            size = 1
        size = min(size, room)
        room = max(1, room // size)
        tiles.append((axis.name, size))
    lane = chance.choice([a.name for a in kernel.axes])
    return Schedule(lane, tuple(tiles), tuple(loops), chance.choice((2, 4, 8)), 1)


def _cases(seeds: range) -> list[tuple[str, int]]:
    return [(name, seed) for seed in seeds for name in SMALL]


def _check(cases: list[tuple[str, int]]) -> int:
    """Build all in one go, run each; how many there were."""
    made = []
    for name, seed in cases:
        program = isolated(name)
        schedule = random_schedule(program, random.Random(f"{name} {seed}"))
        program = program.with_(steps=(replace(program.steps[0], schedule=schedule),))  # type: ignore[arg-type]
        try:
            made.append((name, program, generate(program, digest(program), METAX)))
        except CodegenError as e:
            if not any(said in str(e) for said in REFUSALS):
                raise
    with workers(2) as pool:
        built = maca.build_sources([(digest(p), s) for _, p, s in made], METAX, pool)
    for (name, program, source), kernel in zip(made, built, strict=True):
        symbols = {s.name: v for s, v in zip(program.symbols, (150,) if name == "columns" else (3, 150), strict=False)}
        given = buffers(program, symbols, seed=7)
        eager, truth = reference(program, given, symbols), reference(program, given, symbols, "f64")
        execute_built(kernel, "generic", given, list(symbols.values()), orders=("random:1",))
        for b, got, e, t in zip(program.buffers, given, eager, truth, strict=True):
            assert_close(f"{name} {dict(source.tiles)} loops {source.loops} {b.name}", got, e, t)
    return len(made)


def test_a_sample_of_schedules() -> None:
    assert "rotary" in TEXTS and _check(_cases(range(1))) >= len(SMALL) // 2


@pytest.mark.full
def test_many_schedules() -> None:
    assert _check(_cases(range(1, 20))) > 100
