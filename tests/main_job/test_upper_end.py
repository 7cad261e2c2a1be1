"""Each generated GPU kernel of Qwen3-8B at the upper end of what the model promises: 40 960 tokens, batch 64, each alone and together.

Blocks of the true grid run in the emulator at true sizes and addresses (a tensor of the joint end has up to 129 GB); what they store is
compared element for element with the interpreter in the kernel's own dtypes and in float64.  The plain run takes a seeded sample.
"""

from __future__ import annotations

import random

import pytest
import torch

from flagtree.assemble import generate_part
from flagtree.capture.model_spec import load_spec
from flagtree.capture.parts import capture_part
from flagtree.check.gate import judge
from flagtree.check.inputs import lower_ends, upper_ends
from flagtree.check.upper import run_blocks
from flagtree.ir.attention import form_of
from flagtree.ir.canonical import Isolated
from flagtree.targets import find_target
from flagtree.toolchain import emulator
from flagtree.toolchain.build import build_kernels

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason="the emulator does not run here")
METAX = find_target("metax")
SAMPLE, SEED = 3, 20_251_121


def kernels(part: str, dtype: str) -> dict[str, Isolated]:
    generated = generate_part(capture_part(load_spec("qwen3"), part, dtype), METAX)
    # a block of attention reads the whole cache: its far addresses have a test of their own, tests/codegen/test_triton_attention.py
    return {digest: alone for alone, digest in generated.kernels.values() if form_of(alone.program) is None}


def check(chosen: dict[str, Isolated], blocks: int) -> int:
    """Every setting of every chosen kernel; the number of runs of which each executed both variants in three orders."""
    runs = 0
    for built in build_kernels([(digest, alone.program) for digest, alone in chosen.items()], METAX, 1):
        program = chosen[built.digest].program
        settings = [symbols for _, symbols in upper_ends(program)]
        between = {s.name: max(s.lo, s.hi * 3 // 7) // s.multiple * s.multiple for s in program.symbols}
        for symbols in (*settings, between, lower_ends(program)):
            found = run_blocks(program, built, symbols, int(built.digest[:8], 16), blocks)
            assert found.what.startswith("blocks 0") and found.ways == ("aligned", "generic")
            for name, ours in found.ours.items():
                judged = judge(program.buffer(name).dtype, ours, found.own[name], found.truth[name], None, found.enclosed[name])
                assert not judged.faults, (built.digest, symbols, judged)
            runs += 1
    return runs


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_sample_of_the_kernels(dtype: str) -> None:
    """The kernels of a prefill whose tensors have more elements than 32 bits count, some of them."""
    large = {d: alone for d, alone in sorted(kernels("prefill", dtype).items()) if len(alone.program.symbols) > 1}
    assert all({64, 40960} == set(upper_ends(alone.program)[0][1].values()) for alone in large.values())
    chosen = random.Random(SEED).sample(sorted(large), SAMPLE)
    assert check({d: large[d] for d in chosen}, 3) >= 5 * SAMPLE


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("part", load_spec("qwen3").part_names)
def test_every_kernel(part: str, dtype: str) -> None:
    found = kernels(part, dtype)
    assert len(found) >= 8
    assert check(found, 8) >= 2 * len(found)
