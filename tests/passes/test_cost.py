"""What the pipeline costs by the size of a program, counted in calls; and appending against the general way of merging."""

from __future__ import annotations

import random
from typing import Any

import pytest

from flagtree.errors import IRError
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Program
from flagtree.ir.text import print_program
from flagtree.ir.verify import verify
from flagtree.passes import fusion
from flagtree.passes.append import append
from flagtree.passes.pipeline import parse_pipeline, run_pipeline
from flagtree.targets import find_target
from tests.passes.random_steps import random_pipeline_program
from tests.work import calls

NUMERICS = "numerics(eager, contract=off, acc=f32)"
# a bound on kernels that both sizes of a test exceed many times: what one kernel costs is the same in both
BOUNDED = "canonicalize, reinplace, fuse_pointwise{max_ops=32}, fuse_reduction{max_ops=32}, canonicalize"


def program(buffers: list[str], steps: list[str], outputs: list[str]) -> Program:
    lines = [*(f"  buffer {b}" for b in buffers), *steps, f"  outputs {', '.join(outputs)}"]
    return parse_program("program p\n" + "\n".join(lines) + "\n")


def pointwise(name: str, first: str, second: str, to: str, op: str = "add") -> str:
    body = f"v0: f32 = load {first}[i0, i1]\n    v1: f32 = load {second}[i0, i1]\n    v2: f32 = {op} v0, v1\n    store {to}[i0, i1] = v2"
    return f"  kernel {name} {{i0 < 8, i1 < 64}} {NUMERICS}\n    {body}"


def chain(count: int) -> Program:
    """Each value is read by the next step and by the one after that."""
    names = ["x", "y", *(f"t{k}" for k in range(count))]
    buffers = [f"{n}: f32[8, 64] {'input' if n in 'xy' else 'temp'}" for n in names]
    steps = [pointwise(f"k{k}", names[k], names[k + 1], names[k + 2], "add" if k % 2 else "mul") for k in range(count)]
    return program(buffers, steps, names[-2:])


def blocks(count: int) -> Program:
    """Independent norms of three steps."""
    buffers, steps = [], []
    for k in range(count):
        buffers += [f"x{k}: f32[8, 64] input", f"s{k}: f32[8] temp", f"m{k}: f32[8] temp", f"y{k}: f32[8, 64] temp"]
        steps += [
            f"  kernel s{k}k {{i0 < 8}} reduce {{r0 < 64}} {NUMERICS}\n    v0: f32 = load x{k}[i0, r0]\n    v1: f32 = mul v0, v0\n"
            f"    v2: f32 = sum v1 over r0\n    store s{k}[i0] = v2",
            f"  kernel m{k}k {{i0 < 8}} {NUMERICS}\n    v0: f32 = load s{k}[i0]\n    v1: f32 = add v0, {k}.5\n    v2: f32 = rsqrt v1\n"
            f"    store m{k}[i0] = v2",
            f"  kernel y{k}k {{i0 < 8, i1 < 64}} {NUMERICS}\n    v0: f32 = load x{k}[i0, i1]\n    v1: f32 = load m{k}[i0]\n"
            f"    v2: f32 = mul v0, v1\n    store y{k}[i0, i1] = v2",
        ]  # fmt: skip
    return program(buffers, steps, [f"y{k}" for k in range(count)])


def readers(count: int) -> Program:
    """One cheap value, copied into each of its many readers."""
    buffers = ["x: f32[8, 64] input", "n: f32[8, 64] temp", *(f"{letter}{k}: f32[8, 64] {role}" for k in range(count)
               for letter, role in (("a", "input"), ("y", "temp")))]  # fmt: skip
    negated = f"  kernel n {{i0 < 8, i1 < 64}} {NUMERICS}\n    v0: f32 = load x[i0, i1]\n    v1: f32 = neg v0\n    store n[i0, i1] = v1"
    return program(buffers, [negated, *(pointwise(f"k{k}", "n", f"a{k}", f"y{k}") for k in range(count))], [f"y{k}" for k in range(count)])


def in_place(count: int) -> Program:
    """Updates of one state."""
    steps = [pointwise(f"k{k}", "s", "x", "s", "add" if k % 2 else "mul") for k in range(count)]
    return program(["s: f32[8, 64] state", "x: f32[8, 64] input"], steps, ["s"])


def random_plain(seed: int) -> Program:
    """Pointwise steps over f32 and bf16 on one domain: shared and dead values, equal ones, casts there and back, states and outputs."""
    rng = random.Random(seed)
    types = {"x": "f32", "y": "bf16", "s": "f32"}
    buffers, steps = ["x: f32[8, 64] input", "y: bf16[8, 64] input", "s: f32[8, 64] state"], []
    for k in range(rng.randint(6, 16)):
        lines, values = [], []
        for j, name in enumerate(rng.sample(list(types), rng.randint(1, 2))):
            index = "i0, i1" if rng.random() < 0.95 else "i0, 63 - i1"
            lines += [f"l{j}: {types[name]} = load {name}[{index}]", f"c{j}: f32 = cast l{j}"]
            values.append(f"c{j}" if types[name] == "bf16" else f"l{j}")
        lines.append(f"v: f32 = {rng.choice(['add', 'mul', 'sub'])} {values[0]}, {rng.choice([*values, '0.5'])}")
        out, into = (f"t{k}", rng.choice(["f32", "bf16"])) if rng.random() < 0.85 else ("s", "f32")
        if out != "s":
            buffers.append(f"{out}: {into}[8, 64] temp")
            types[out] = into
        lines += [f"w: {into} = cast v", f"store {out}[i0, i1] = w"]
        steps.append(f"  kernel k{k} {{i0 < 8, i1 < 64}} {NUMERICS}\n" + "\n".join(f"    {line}" for line in lines))
    made = [n for n in types if n[0] == "t"]
    return program(buffers, steps, sorted(rng.sample(made, min(len(made), 2))) or ["s"])


def work(made: Program, passes: str) -> int:
    return calls(lambda: run_pipeline(made, parse_pipeline(passes), find_target("cpu")))


@pytest.mark.parametrize("build", [chain, blocks, readers, in_place])
def test_four_times_the_nodes_are_four_times_the_work(build: Any) -> None:
    sizes = (30, 120) if build is blocks else (60, 240)
    work(build(sizes[0]), BOUNDED)  # what is computed once
    small, large = (work(build(n), BOUNDED) for n in sizes)
    assert large < 1.15 * 4 * small, (small, large)


@pytest.mark.parametrize("build", [chain, in_place])
def test_a_merge_costs_what_the_consumer_adds(build: Any) -> None:
    small, large = (work(build(n), "fuse_pointwise{max_ops=4096}") for n in (40, 160))
    assert large < 1.25 * 4 * small, (small, large)  # 16 times when each merge walks the kernel so far


def _fused(made: Program, monkeypatch: pytest.MonkeyPatch, general: bool) -> tuple[str, list[object], int]:
    """The text, what was matched and refused, and how many merges were appended."""
    appended: list[str] = []

    def watched(*args: Any) -> Any:
        found = None if general else append(*args)
        appended.extend([args[3].name] if found is not None else [])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(fusion, "append", watched)
        passes = parse_pipeline("canonicalize, fuse_pointwise, fuse_reduction, canonicalize")
        after, reports = run_pipeline(made, passes, find_target("cpu"))
    return print_program(after), [(r.rewrites, r.matched, r.refusals) for r in reports], len(appended)


def test_appending_gives_what_merging_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [chain(12), blocks(2), readers(4), in_place(6), *map(random_plain, range(40)), *map(random_pipeline_program, range(60))]
    count = 0
    for one in made:
        try:
            verify(one)
        except IRError:  # a state read at another element than it is stored
            continue
        text, told, appended = _fused(one, monkeypatch, general=False)
        assert (text, told, 0) == _fused(one, monkeypatch, general=True), print_program(one)
        count += appended
    assert count > 100, count
