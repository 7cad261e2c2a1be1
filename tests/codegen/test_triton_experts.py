"""A mixture of experts for GPUs: every kernel of it, the products with their gate included, executed in the emulator against eager."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flagtree.capture.normalise import normalise
from flagtree.codegen.triton import generate
from flagtree.ir.canonical import digest, isolate_all
from flagtree.ir.index import Index
from flagtree.ir.interp import run
from flagtree.ir.program import Extern, Program
from flagtree.ir.text import parse_program, print_program
from flagtree.lower.decompositions import DECOMPOSITIONS
from flagtree.lower.lowering import Lowered, lower, lowers
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets import find_target
from flagtree.toolchain import maca
from flagtree.toolchain.emulator import execute_built, missing
from tests.runtime.test_experts import make

METAX = find_target("metax")
moe_route, fused_moe = torch.ops.flagtree.moe_route, torch.ops.flagtree.fused_moe
emulated = pytest.mark.skipif(bool(missing()), reason=missing() or "the emulator runs")


class Layer(torch.nn.Module):
    def __init__(self, top_k: int, scoring: str) -> None:
        super().__init__()
        self.top_k, self.scoring = top_k, scoring

    def forward(self, x, logits, bias, gate_up, down, shared):
        weights, ids = moe_route(logits, bias, self.top_k, self.scoring, True)
        return fused_moe(x, gate_up, down, weights, ids) + shared, ids


def lowered_function(function, operands: tuple[torch.Tensor, ...]) -> Program:
    """The program of a function of tensors of fixed sizes."""

    class Whole(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    return lowered_export(torch.export.export(Whole(), operands))[1].program


def lowered_export(exported) -> tuple[torch.fx.Graph, Lowered]:
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder"]
    values = [n.meta["val"] for n in nodes]
    normal = normalise(exported.graph_module, [n.name for n in nodes], values, lowers, DECOMPOSITIONS, values[0].fake_mode)
    return normal.graph, lower(normal.graph, "layer", {})


def lowered_graph(layer: Layer, operands: tuple[torch.Tensor, ...], most: int) -> tuple[torch.fx.Graph, Lowered]:
    """The graph and the program of a layer whose number of tokens is free from 2 to `most`, or 1."""
    tokens = torch.export.Dim("tokens", min=2, max=most) if most > 1 else None
    free = tuple({0: tokens} if k in (0, 1, 5) and tokens is not None else None for k in range(6))
    return lowered_export(torch.export.export(layer, operands, dynamic_shapes=free))


def lowered(layer: Layer, operands: tuple[torch.Tensor, ...], most: int) -> Program:
    return lowered_graph(layer, operands, most)[1].program


def operands_of(tokens: int, experts: int, top_k: int, dtype: torch.dtype, hidden: int, inner: int) -> tuple[torch.Tensor, ...]:
    x, gate_up, down, _, _ = make(tokens, experts, top_k, dtype, hidden, inner)
    shared = torch.randn(tokens, hidden).to(dtype)
    return x, torch.randn(tokens, experts), torch.randn(experts), gate_up * 4 / hidden**0.5, down * 4 / inner**0.5, shared


def executed(program: Program, given: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """Every step in order: kernels in the emulator; there are no calls left."""
    assert not any(isinstance(s, Extern) for s in program.steps)
    alone = list(isolate_all(program))
    built = maca.build([(digest(one.program), one.program) for _, one in alone], METAX, 1)
    sizes = {s.name: tokens for s in program.symbols}
    memory = dict(given)
    for b in program.buffers:
        if b.name not in memory:
            shape = [n.evaluate(sizes) for n in b.shape]
            dtype = {"i32": torch.int32, "f32": torch.float32, "bf16": torch.bfloat16}[b.dtype]
            memory[b.name] = torch.full(shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype)
    for (_, one), kernel in zip(alone, built, strict=True):
        symbols = [Index.of(s).evaluate(sizes) for s in one.symbols]
        for variant in sorted(kernel.launch["variants"], reverse=True):  # type: ignore[call-overload]
            execute_built(kernel, variant, [memory[n] for n in one.buffers], symbols)
    return memory


def judged(found: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """DESIGN section 9: the error against float64 at most four times eager's own, plus 1e-6 of the mean magnitude."""
    own, error = ((t.double() - truth).square().mean().sqrt().item() for t in (eager, found))
    assert error <= 4 * own + 1e-6 * truth.abs().mean().item(), (error, own)


# (tokens, experts, experts a token, hidden, inner, most tokens): true widths of MiniMax-M2 and step3 along the sums, then odd ones
SIZES = [(3, 5, 2, 3072, 64, 8), (2, 3, 3, 64, 5120, 8), (40, 3, 2, 72, 40, 4096), (1, 9, 4, 100, 24, 1)]


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_layer_of_experts_is_eagers(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, experts, top_k, hidden, inner, most = size
    layer = Layer(top_k, "sigmoid" if top_k == 2 else "softmax")
    operands = operands_of(tokens, experts, top_k, dtype, hidden, inner)
    program, _ = run_pipeline(lowered(layer, operands, most), pipeline(METAX), METAX)
    names = [b.name for b in program.inputs]
    found = executed(program, dict(zip(names, (t.clone() for t in operands), strict=True)), tokens)
    eager, ids = layer(*operands)
    truth, _ = layer(*(t.double() if k in (0, 3, 4, 5) else t for k, t in enumerate(operands)))
    out, chosen = (found[n] for n in program.outputs)
    assert torch.equal(chosen, ids)
    judged(out, eager, truth)


def quantised_layer(x, logits, gate_up, up_scales, down, down_scales):
    """MiniMax-M2's weights: e4m3fn, a scale for each block of 128 x 128."""
    weights, ids = moe_route(logits, None, 2, "sigmoid", True)
    back = [torch.ops.flagtree.dequantise(w, s, 128, 128, x.dtype) for w, s in ((gate_up, up_scales), (down, down_scales))]
    return fused_moe(x, *back, weights, ids)


@emulated
@pytest.mark.parametrize(("hidden", "steps"), [(256, 5), (320, 6)])
def test_quantised_weights_are_taken_back_inside_the_products(hidden: int, steps: int) -> None:
    """The second time 320 columns end inside a block of scales: that weight is taken back before its product."""
    torch.manual_seed(8)
    experts, inner = 3, 128
    stored = [torch.randn(experts, *size).to(torch.float8_e4m3fn) for size in ((2 * inner, hidden), (hidden, inner))]
    scales = [torch.rand(experts, -(-w.shape[1] // 128), -(-w.shape[2] // 128)) / 8 for w in stored]
    operands = (torch.randn(3, hidden).bfloat16(), torch.randn(3, experts), stored[0], scales[0], stored[1], scales[1])
    program, _ = run_pipeline(lowered_function(quantised_layer, operands), pipeline(METAX), METAX)
    assert len(program.steps) == steps
    found = executed(program, dict(zip([b.name for b in program.inputs], operands, strict=True)), 3)[program.outputs[0]]
    wide = [w.double() * s.repeat_interleave(128, 1)[:, : w.shape[1]].repeat_interleave(128, 2)[:, :, : w.shape[2]].double()
            for w, s in zip(stored, scales, strict=True)]  # fmt: skip
    weights, ids = moe_route(operands[1], None, 2, "sigmoid", True)
    judged(found, quantised_layer(*operands), fused_moe(operands[0].double(), *wide, weights, ids))


def test_the_products_of_a_layer_are_two_kernels_and_no_call() -> None:
    layer, operands = Layer(2, "softmax"), operands_of(4, 6, 2, torch.bfloat16, 64, 48)
    before = lowered(layer, operands, 64)
    assert sum(isinstance(s, Extern) for s in before.steps) == 2
    after, reports = run_pipeline(before, pipeline(METAX), METAX)
    assert len(after.steps) == 5 and not any(isinstance(s, Extern) for s in after.steps)  # route, sort, up with gate, down, sum
    assert next(r for r in reports if r.name == "expert_products").rewrites == 2
    assert print_program(parse_program(print_program(after))) == print_program(after)
    cpu, _ = run_pipeline(before, pipeline(find_target("cpu")), find_target("cpu"))
    assert sum(isinstance(s, Extern) for s in cpu.steps) == 2


@pytest.mark.parametrize("tokens", [2, 5])
def test_the_kernels_bodies_mean_what_the_calls_compute(tokens: int) -> None:
    layer, operands = Layer(2, "sigmoid"), operands_of(5, 4, 2, torch.float32, 24, 16)
    before = lowered(layer, operands, 64)
    after, _ = run_pipeline(before, pipeline(METAX), METAX)
    operands = tuple(t[:tokens] if k in (0, 1, 5) else t for k, t in enumerate(operands))
    given = dict(zip([b.name for b in before.inputs], operands, strict=True))
    for one, other in zip(run(before, dict(given)).values(), run(after, dict(given)).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["cuda:sm80", "cuda:sm90", "rocm:gfx942", "metax"])
def test_the_text_is_the_same_for_every_target_of_triton(target: str) -> None:
    """No fact of one chip is in it, and the tiles follow the range of tokens: few rows each where experts get few."""
    layer, operands = Layer(2, "softmax"), operands_of(4, 6, 2, torch.bfloat16, 64, 48)
    texts = []
    for most, rows in ((16, 16), (4096, 64)):
        chip = replace(find_target(target))
        program, _ = run_pipeline(lowered(layer, operands, most), pipeline(chip), chip)
        products = [generate(one.program, "0" * 64, chip) for kernel, one in isolate_all(program) if kernel.numerics.fp_contract]
        assert len(products) == 2 and all(dict(p.tiles)["i0"] == rows for p in products)
        texts.append([p.text for p in products])
    assert all("tl.dot" in text and "atomic" not in text for pair in texts for text in pair)
