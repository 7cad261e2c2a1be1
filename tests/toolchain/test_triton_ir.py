"""Chips that only their vendor compiles for: the tier `ttir` with its reason, and the very Triton IR that the emulator executes."""

from __future__ import annotations

import pytest

from flagtree.targets import all_targets, find_target, stock_triton
from flagtree.targets.base import Target
from flagtree.toolchain import triton_ir
from flagtree.toolchain.build import toolchain_of
from tests.codegen.triton_kernels import keyed
from tests.scheduled import scheduled

pytestmark = pytest.mark.skipif(bool(stock_triton.problem()), reason=stock_triton.problem() or "Triton is here")
CHIPS = [target for target in all_targets() if target.toolchain == "triton_ir"]
NAMES = ("rmsnorm", "rotary", "softmax")


def kernels(target: Target) -> list:
    return [(digest, scheduled(program, target)) for digest, program in map(keyed, NAMES)]


@pytest.mark.parametrize("chip", CHIPS, ids=lambda target: target.name)
def test_every_chip_reaches_ttir_and_says_why_no_further(chip: Target) -> None:
    reach = chip.probe()
    assert reach.tier == "ttir" and not reach.executes and chip.options["fork"] in reach.missing
    (built,) = triton_ir.build(kernels(chip)[:1], chip)
    assert (built.tier, built.missing) == ("ttir", reach.missing)
    assert set(built.files) == {"kernel.py", "aligned.ttir", "generic.ttir"}
    assert b"tt.divisibility" in built.files["aligned.ttir"] and b"tt.divisibility" not in built.files["generic.ttir"]
    assert b"tt.func public" in built.files["generic.ttir"] and b"loc(" not in built.files["generic.ttir"]


def test_it_is_the_triton_ir_that_the_emulator_executes() -> None:
    """Tiles for 64 lanes on both: the same source, and the same bytes after the passes that no target owns."""
    chip, metax = find_target("iluvatar"), find_target("metax")
    ours = triton_ir.build(kernels(chip), chip, jobs=2)
    theirs = toolchain_of(metax).build(kernels(metax), metax, 2)  # type: ignore[call-arg]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("kernel.py", "aligned.ttir", "generic.ttir"):
            assert one.files[name] == other.files[name], (name, one.digest)
