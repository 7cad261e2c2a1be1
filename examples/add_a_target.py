"""A whole target: one file of facts.  As a package it would bring itself in through an entry point:

    [project.entry-points."flagtree.targets"]
    abacus = "add_a_target"

Here the entry point is made by hand; then the whole pipeline runs a program under the new chip's limits.
"""

from importlib.metadata import EntryPoint

from flagtree.ir.text import parse_program, print_program
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets import FAMILIES, GROUP, register
from flagtree.targets.base import Reach, Target


def probe() -> Reach:
    """How far source gets on this machine.  A real probe looks for the vendor's tools and names what is missing."""
    return Reach("source", missing="the abacus assembler", how="ask the vendor for it")


TARGETS = (
    Target(
        name="abacus:v1",
        family="abacus",
        description="a chip of this example",
        language="triton",
        toolchain="triton_aot",
        tiers=("source", "binary"),
        aliases=("abacus",),
        warp=32,
        max_threads=256,
        shared_bytes=32 * 1024,
        row_limit=2048,
        dtypes=frozenset({"b1", "i32", "i64", "f16", "bf16", "f32"}),
        facts_from={"warp": "the vendor's manual, page and version", "shared_bytes": "the same"},
        probe=probe,
    ),
)

PROGRAM = """
program scaled
  symbol s0 in 1..64 from dim x 0
  buffer x: f32[s0, 4096] input
  buffer t: f32[s0, 4096] temp
  buffer y: f32[s0, 4096] temp
  kernel k0 {i0 < s0, i1 < 4096} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1]
    v1: f32 = mul v0, 2.0
    store t[i0, i1] = v1
  kernel k1 {i0 < s0, i1 < 4096} numerics(eager, contract=off, acc=f32)
    v0: f32 = load t[i0, i1]
    v1: f32 = add v0, 1.0
    store y[i0, i1] = v1
  outputs y
"""


def main() -> None:
    outside = EntryPoint("abacus", __name__, GROUP)
    target = register(FAMILIES, [outside])["abacus"]
    program, reports = run_pipeline(parse_program(PROGRAM), pipeline(target), target)
    reach = target.probe()
    print(f"{target.name} reaches {reach.tier}, missing {reach.missing}; {sum(r.rewrites for r in reports)} rewrites")
    print(print_program(program))
    assert len(program.steps) == 1


if __name__ == "__main__":
    main()
