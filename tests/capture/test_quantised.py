"""A model captured as its checkpoint stores it: fp8 weights in blocks, activations quantised as they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flagtree.capture.model import capture
from flagtree.capture.model_spec import ModelSpec, load_spec
from flagtree.capture.parts import capture_part
from flagtree.capture.quantised import take_quantisation
from flagtree.errors import CaptureError
from flagtree.ir.program import Extern, Kernel, Program, Repeat, Step
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets import find_target
from tests.models.small import FP8, description
from tests.products import CASES, grouped


def spec(**quantisation: Any) -> ModelSpec:
    described = description("minimax-fp8", "bfloat16")
    described |= {"quantisation": FP8 | quantisation, "capture": {"layers": 2, "quantised": True}}
    return ModelSpec.model_validate(described)


def steps(items: tuple[Step, ...]) -> list[Step]:
    return [inner for s in items for inner in (steps(s.body) if isinstance(s, Repeat) else [s])]


def test_a_model_computes_with_the_tensors_that_its_checkpoint_has() -> None:
    found = capture(spec(), "decode")
    weights = {p.qualified: p.value for p in found.placeholders if p.role == "weight"}
    first = "model.layers.0"
    stored = {n.removeprefix(f"{first}."): tuple(v.shape) for n, v in weights.items() if v.dtype == torch.float8_e4m3fn and first in n}
    assert stored == {
        "self_attn.q_proj.weight": (256, 256), "self_attn.k_proj.weight": (128, 256), "self_attn.v_proj.weight": (128, 256),
        "self_attn.o_proj.weight": (256, 256), "mlp.experts.gate_up_proj": (6, 512, 256), "mlp.experts.down_proj": (6, 256, 256),
    }  # fmt: skip
    assert tuple(weights[f"{first}.mlp.experts.gate_up_proj_scale_inv"].shape) == (6, 4, 2)
    assert tuple(weights[f"{first}.self_attn.k_proj.weight_scale_inv"].shape) == (1, 2)
    assert weights["lm_head.weight"].dtype == torch.bfloat16


def test_each_norm_quantises_once_for_all_that_read_it() -> None:
    target = find_target("metax")
    lowered: Program = capture_part(spec(), "decode").lowered.program
    program, _ = run_pipeline(lowered, pipeline(target), target)
    all_steps = steps(program.steps)
    products = [s for s in all_steps if isinstance(s, Kernel) and any("scaled" in op for op in s.ops) and s.numerics.fp_contract]
    assert len(products) == 2 * 6  # of a layer four linear layers and both of the experts
    assert [s.callee for s in all_steps if isinstance(s, Extern)].count("aten.linear.default") == 2 + 1  # routers and the output head
    quantised = [s for s in all_steps if isinstance(s, Kernel) and any("quantise" in op or "fused_moe_scaled" in op for op in s.ops)]
    alone = [s for s in quantised if s.ops == ("flagtree.quantise.default",)]
    assert len(alone) == 2  # what attention gives; the norms' fuse


def test_a_linear_layer_is_the_definition() -> None:
    x, w, scales = CASES["e4m3fn in groups"][1]
    layer = torch.nn.Linear(256, 192, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    model = torch.nn.ModuleDict({"one": layer, "lm_head": torch.nn.Linear(100, 7)})
    take_quantisation(model, spec().quantisation, "here")
    layer.weight.data, layer.weight_scale_inv.data = w, scales
    layer.bias.data = torch.randn(192).bfloat16()
    assert torch.equal(layer(x.view(1, 5, 256))[0], grouped(x, w, scales) + layer.bias)
    assert model["lm_head"].weight.dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"weights": "int8"}, {"block": [64, 128]}, {"activations": None}, {"activation_group": 64}])
def test_another_scheme_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CaptureError, match="cannot be captured"):
        capture(spec(**wrong), "decode")


def test_widths_that_blocks_do_not_fit_are_refused() -> None:
    with pytest.raises(CaptureError, match="stored in blocks"):
        take_quantisation(torch.nn.ModuleDict({"one": torch.nn.Linear(200, 8)}), spec().quantisation, "here")


def test_the_shipped_description_is_minimax_m2s_checkpoint() -> None:
    fp8, plain = load_spec("minimax-fp8"), load_spec("minimax")
    assert fp8.capture.quantised and not plain.capture.quantised
    assert (fp8.config, fp8.quantisation, fp8.parts) == (plain.config, plain.quantisation, plain.parts)
    assert fp8.capture.weights == plain.capture.weights + 62 * 6
