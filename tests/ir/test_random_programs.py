"""Random pointwise and reduce programs: text round-trips, they verify and run, digests ignore names and the hash seed."""

from __future__ import annotations

import os
import random
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from flagtree.errors import IRError
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.index import Index, parse_index
from flagtree.ir.program import (
    Access,
    Axis,
    Buffer,
    Compute,
    IndexValue,
    Kernel,
    Load,
    Numerics,
    Origin,
    Program,
    Reduce,
    Schedule,
    Store,
    Symbol,
)
from flagtree.ir.text import parse_program, print_program
from flagtree.ir.verify import verify

# names by use, so that a renaming can give every one another that sorts elsewhere
FIRST = {k: k for k in ("n", "m", "x", "z", "y", "w", "i", "j", "r")}
SECOND = {"n": "zz", "m": "aa", "x": "q9", "z": "b", "y": "a.b", "w": "c", "i": "r0", "j": "i7", "r": "i0"}


def random_program(seed: int, names: dict[str, str], prefix: str) -> Program:
    """The same computation for a seed, spelled with `names`; one kernel of loads, arithmetic, a reduction, a masked load, stores."""
    rng = random.Random(seed)
    n, m, x, z, y, w, i, r = (names[k] for k in ("n", "m", "x", "z", "y", "w", "i", "r"))
    count = iter(range(1000))

    def fresh() -> str:
        return f"{prefix}{next(count)}"

    body: list = []
    floats: list[str] = []

    def add(op: object, *values: str) -> None:
        body.append(op)
        floats.extend(values)

    ni, mi, ii, ri = (Index.of(k) for k in (n, m, i, r))
    indices = [(ii, ri), (ii, (ri + rng.randint(0, 3)) % mi), (ii * mi // mi, mi - 1 - ri)]
    for _ in range(rng.randint(1, 3)):
        name = fresh()
        add(Load(name, "f32", Access(x, rng.choice(indices))), name)
    name = fresh()
    add(Load(name, "f32", Access(z, (ri * ni + ii,))), name)
    if rng.random() < 0.5:
        position, mask, name = fresh(), fresh(), fresh()
        add(IndexValue(position, "i64", ri - 2))
        add(Compute(mask, "b1", "ge", (position, 0)))
        add(Load(name, "f32", Access(x, (ii, ri - 2), mask), 0.5), name)
    for _ in range(rng.randint(1, 6)):
        name, op = fresh(), rng.choice(["add", "sub", "mul", "max", "neg", "abs", "tanh"])
        arity = 1 if op in ("neg", "abs", "tanh") else 2
        args = [rng.choice(floats) for _ in range(arity)]
        if arity == 2 and rng.random() < 0.3:
            args[1] = rng.choice([0.1, -2.0, 1e-30, 3])
        add(Compute(name, "f32", op, tuple(args)), name)
    name = fresh()
    add(Reduce((name,), ("f32",), rng.choice(["sum", "max", "min"]), (floats[-1],), (r,)), name)
    name = fresh()
    add(Compute(name, "f32", "sub", (floats[0], floats[-1])), name)
    body.append(Store(Access(y, (ii, ri)), name))
    body.append(Store(Access(w, (ii,)), rng.choice([v for op in body if isinstance(op, Reduce) for v in op.names])))
    schedule = Schedule(r, ((r, 64), (i, 2)), (), 4, 1) if rng.random() < 0.5 else None
    kernel = Kernel(
        "k." + prefix, (Axis(i, ni), Axis(r, mi, "reduce")), tuple(body), Numerics(), schedule, (Origin(prefix, "", "é"),), (prefix,)
    )
    buffers = [
        Buffer(x, "f32", (ni, mi), "input"), Buffer(z, "f32", (ni * mi,), "weight"),
        Buffer(y, "f32", (ni, mi), "temp", rng.choice([None, (mi, Index.of(1)), (Index.of(1), ni)])), Buffer(w, "f32", (ni,)),
    ]  # fmt: skip
    symbols = [Symbol(n, 1, 64, ("dim", x, 0)), Symbol(m, 1, 64, ("dim", x, 1))]
    if prefix != "v":
        symbols.reverse()
        buffers.reverse()
    return Program("p", tuple(symbols), tuple(buffers), (kernel,), (y, w))


SEEDS = st.integers(0, 10**6)


@given(SEEDS)
def test_text_round_trips(seed: int) -> None:
    program = random_program(seed, FIRST, "v")
    text = print_program(program)
    assert parse_program(text) == program
    assert print_program(parse_program(text)) == text


@given(SEEDS)
def test_digest_ignores_names_and_declaration_order(seed: int) -> None:
    digests = set()
    for names, prefix in ((FIRST, "v"), (SECOND, "b")):
        program = random_program(seed, names, prefix)
        alone = isolate(program, program.steps[0])  # type: ignore[arg-type]
        digests.add(digest(alone.program))
        verify(alone.program)
        again = isolate(alone.program, alone.kernel)
        assert digest(again.program) == digest(alone.program)  # canonical form is a fixed point
    assert len(digests) == 1


@given(SEEDS, st.sampled_from([(1, 1), (3, 8), (5, 7)]))
def test_programs_verify_and_isolated_kernels_compute_the_same(seed: int, sizes: tuple[int, int]) -> None:
    import torch  # here, so that the subprocesses below start fast

    from flagtree.ir.interp import run

    program = random_program(seed, FIRST, "v")
    verify(program)
    n, m = sizes
    made = torch.Generator().manual_seed(seed)
    x, z = torch.randn(n, m, generator=made), torch.randn(n * m, generator=made)
    whole = run(program, {"x": x, "z": z})
    alone = isolate(program, program.steps[0])  # type: ignore[arg-type]
    inputs = {f"b{k}": {"x": x, "z": z}[name] for k, name in enumerate(alone.buffers) if name in ("x", "z")}
    symbols = {f"n{k}": {"n": n, "m": m}[name] for k, name in enumerate(alone.symbols)}
    lone = run(alone.program, inputs, symbols=symbols)
    for k, name in enumerate(alone.buffers):
        if name in whole:
            assert torch.equal(whole[name], lone[f"b{k}"])


def test_digest_ignores_the_hash_seed() -> None:
    code = (
        "from tests.ir.test_random_programs import *\n"
        "for seed in range(20):\n"
        "    p = random_program(seed, SECOND, 'b')\n"
        "    print(digest(isolate(p, p.steps[0]).program), hash('x') and '')"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(seen) == 1
    ours = [digest(isolate(p, p.steps[0]).program) for p in (random_program(s, FIRST, "v") for s in range(20))]  # type: ignore[arg-type]
    assert next(iter(seen)).split() == ours


@given(st.text(alphabet="iv0123456789+-*/%() ", max_size=30))
def test_index_text_never_does_anything_but_parse_or_refuse(text: str) -> None:
    try:
        index = parse_index(text)
    except IRError:
        return
    assert parse_index(str(index)) == index
