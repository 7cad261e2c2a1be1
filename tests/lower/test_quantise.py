"""Quantisation as kernels: to the bit what the definition gives, and in one kernel with the norm or the gate before it."""

from __future__ import annotations

import math

import pytest
import torch

from flagtree.check.certify import LONG, examine
from flagtree.errors import BindError
from flagtree.ir.program import Kernel, Reduce
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.runtime.compile import backend
from flagtree.targets import find_target
from flagtree.toolchain.emulator import missing
from tests.check.subjects import subjects_of
from tests.codegen.test_triton_experts import lowered_function

quantise, dequantise = torch.ops.flagtree.quantise, torch.ops.flagtree.dequantise
FORMATS = [torch.float8_e4m3fn, torch.int8]


def bits(x: torch.Tensor) -> torch.Tensor:
    """Of any NaN one byte: neither sign nor payload of one is promised."""
    raw = x.view(torch.uint8)
    return torch.where((raw & 127) == 127, 127, raw) if x.dtype == torch.float8_e4m3fn else raw


def compiled(function, *operands):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend=backend, fullgraph=True)(*operands)


def rows(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, numbers under the least scale, infinities, NaN, one large number, every magnitude; 256 in a row."""
    torch.manual_seed(5)
    x = torch.randn(8, 256) * torch.logspace(-8, 8, 8)[:, None]
    x[1] = 0.0
    x[2] = 1e-12
    x[3, 7], x[4, 200], x[5, 1] = math.inf, math.nan, -math.inf
    x[6] = torch.linspace(-448, 448, 256)
    x[7] = 1e-3
    x[7, 130] = -3e4
    return x.to(dtype)


@pytest.mark.parametrize("group", [0, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("to", FORMATS, ids=["e4m3fn", "int8"])
def test_a_kernel_gives_the_bits_of_the_definition(to: torch.dtype, dtype: torch.dtype, group: int) -> None:
    x = rows(dtype)
    q, scales = compiled(lambda t: quantise(t, group, to), x)
    wanted, expected = quantise(x, group, to)
    assert (q.dtype, q.shape, scales.shape) == (to, x.shape, expected.shape)
    assert torch.equal(bits(q), bits(wanted)) and torch.equal(scales.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize("to", FORMATS, ids=["e4m3fn", "int8"])
def test_what_the_definition_means(to: torch.dtype) -> None:
    limit = 448 if to == torch.float8_e4m3fn else 127
    q, scales = quantise(rows(torch.float32), 128, to)
    wide = q.float()
    assert scales.shape == (8, 2) and scales[1].tolist() == pytest.approx([1e-10 / limit] * 2) and not wide[1].any()
    assert wide.nan_to_num(0.0).abs().max() == limit
    assert wide[7, 130] == -limit and scales[3, 0] == math.inf and not wide[3, 8:128].any()
    assert scales[4].isnan().tolist() == [False, True]
    assert wide[4, 128:].isnan().all() if to == torch.float8_e4m3fn else not wide[4, 128:].any()


def test_blocks_of_a_weight_come_back() -> None:
    torch.manual_seed(6)
    q, scales = torch.randn(200, 300).to(torch.float8_e4m3fn), torch.rand(2, 3)
    found = compiled(lambda a, b: dequantise(a, b, 128, 128, torch.bfloat16), q, scales)
    assert torch.equal(found, dequantise(q, scales, 128, 128, torch.bfloat16))
    assert found[130, 299] == (q[130, 299].float() * scales[1, 2]).bfloat16()


def gated(x):
    gate, up = x.chunk(2, -1)
    return quantise(torch.nn.functional.silu(gate) * up, 128, torch.float8_e4m3fn)


def normed(x, weight):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return quantise(wide.to(x.dtype) * weight, 0, torch.int8)


@pytest.mark.parametrize("target", ["cpu", "cuda:sm80", "metax"])
@pytest.mark.parametrize(("function", "operands"), [
    (gated, (torch.zeros(4, 1024, dtype=torch.bfloat16),)),
    (normed, (torch.zeros(4, 256, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.bfloat16))),
], ids=["gate", "norm"])  # fmt: skip
def test_a_gate_and_a_norm_are_one_kernel_with_their_quantisation(function, operands, target: str) -> None:
    chip = find_target(target)
    program, _ = run_pipeline(lowered_function(function, operands), pipeline(chip), chip)
    assert [type(s) for s in program.steps] == [Kernel]


def normed_in_groups(x, residual, weight):
    added = x + residual
    wide = added.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    plain = wide.to(x.dtype) * weight
    return (added, plain, *quantise(plain, 128, torch.float8_e4m3fn))


@pytest.mark.parametrize("target", ["cuda:sm80", "cuda:sm90", "metax", "cpu"])
def test_a_norm_is_one_kernel_with_its_groups(target: str) -> None:
    """The row's sum once, each group's maximum within it; residual sum and plain result are stored too."""
    chip = find_target(target)
    operands = tuple(torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((4, 3072), (4, 3072), (3072,)))
    program, _ = run_pipeline(lowered_function(normed_in_groups, operands), pipeline(chip), chip)
    (kernel,) = program.steps
    assert isinstance(kernel, Kernel)
    assert {op.axes for op in kernel.body if isinstance(op, Reduce)} == {("r0", "r1"), ("r1",)}
    assert set(kernel.reads) == {b.name for b in program.buffers if b.role == "input"} and set(kernel.writes) == set(program.outputs)


emulated = pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")


@pytest.mark.parametrize(("target", "width"), [
    ("cpu", 3072), *(pytest.param("metax", width, marks=emulated) for width in (256, 3072, 24576)),
])  # fmt: skip
def test_a_norm_in_groups_is_eagers_in_every_kind_of_input(target: str, width: int) -> None:
    """On a GPU a row of several, of one instance, and one walked in a loop."""
    chip = find_target(target)
    operands = tuple(torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((4, width), (4, width), (width,)))
    (record,) = examine(subjects_of(normed_in_groups, operands, chip), chip, form=LONG).kernels.values()
    assert (record["verdict"], record["eager"]) == ("pass", "compared"), record


def test_fused_results_are_eagers() -> None:
    torch.manual_seed(7)
    x, weight = torch.randn(5, 1024).bfloat16(), torch.rand(1024).bfloat16()
    for function, operands in ((gated, (x,)), (normed, (x, weight))):
        (q, scales), (wanted, expected) = compiled(function, *operands), function(*operands)
        torch.testing.assert_close(scales, expected, rtol=2**-7, atol=0)  # one rounding of the activation may fall otherwise
        off = (q.float() - wanted.float()).abs()
        assert (off > 0).float().mean() < 0.02 and (off <= wanted.float().abs() * 2**-3 + 1).all()


def test_what_is_not_quantised_is_refused() -> None:
    for call in (
        lambda: quantise(torch.zeros(2, 100), 64, torch.int8), lambda: quantise(torch.zeros(2, 8), 0, torch.float16),
        lambda: quantise(torch.zeros(2, 8, dtype=torch.int32), 0, torch.int8), lambda: quantise(torch.zeros(2, 0), 0, torch.int8),
        lambda: dequantise(torch.zeros(4, 4, dtype=torch.int8), torch.zeros(1, 2), 2, 2, torch.float32),
    ):  # fmt: skip
        with pytest.raises(BindError):
            call()
