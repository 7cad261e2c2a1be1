"""The models that transformers lacks, block by block against their plain definition, written out here in other words."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

from flagtree.capture.cache import ExplicitCache
from flagtree.capture.references import minicpmv4, step3
from flagtree.capture.references.blocks import RMSNorm, rotate
from flagtree.capture.references.checkpoint import from_checkpoint, to_checkpoint
from flagtree.errors import BindError
from tests.models.small import CONFIGS, full_depth, random_weights, small_spec

STEP3, MINICPM = CONFIGS["step3"][1], CONFIGS["minicpm"][1]
TEXT = STEP3["text_config"]


def same(found: torch.Tensor, true: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), true.double(), rtol=2e-4, atol=2e-5)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_rotary_turns_each_pair_of_halves_by_its_angle() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(1, 1, 3, 8), torch.randn(1, 3, 4)
    both = torch.cat((angles, angles), -1)
    found = rotate(x, both.cos(), both.sin())
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    same(found, torch.cat((as_complex.real, as_complex.imag), -1))


def test_rms_norm() -> None:
    x, module = torch.randn(5, 8), RMSNorm(8, 1e-5)
    nn.init.normal_(module.weight)
    same(module(x), norm(x, module.weight, 1e-5))


def test_factorised_attention_is_one_softmax_a_head_over_one_key() -> None:
    module = random_weights(step3.FactorisedAttention(TEXT, 0))
    x, tokens, head = torch.randn(2, 7, 64), 7, 32
    angles = torch.arange(tokens)[:, None] / 500000.0 ** (torch.arange(0, head, 2) / head)
    tables = tuple(torch.cat((f(angles), f(angles)), -1).expand(2, -1, -1) for f in (torch.cos, torch.sin))
    caches = torch.full((2, 2, 1, 9, head), math.nan)
    with torch.no_grad():
        found = module(x, tables, ExplicitCache([caches[0]], [caches[1]], torch.zeros(2, dtype=torch.int64)))
        turn = torch.polar(torch.ones(tokens, head // 2), angles.float())
        q = (norm(x @ module.q_proj.weight.T, module.inter_norm.weight, 1e-5) @ module.wq.weight.T).unflatten(-1, (4, head))
        k, v = x @ module.k_proj.weight.T, x @ module.v_proj.weight.T
        q, k = torch.complex(*q.chunk(2, -1)) * turn[:, None], torch.complex(*k.chunk(2, -1)) * turn
        out = torch.zeros(2, tokens, 4, head)
        for b in range(2):
            for t in range(tokens):
                for h in range(4):
                    scores = (q[b, t, h].conj() * k[b, : t + 1]).sum(-1).real / math.sqrt(head)
                    out[b, t, h] = scores.softmax(-1) @ v[b, : t + 1]
        same(found, out.flatten(2) @ module.o_proj.weight.T)


def test_experts_are_weighted_by_their_own_softmax_and_the_shared_one_is_added() -> None:
    layer = random_weights(step3.DecoderLayer(TEXT, 0, "experts"))
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        found = layer.share_expert(x) + layer.moe(x)
        gated = lambda y, gate, up, down: (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
        shared = layer.share_expert
        true = gated(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        probabilities = (x @ layer.moe.gate.weight.T).softmax(-1)
        for b in range(2):
            for t in range(5):
                for e in probabilities[b, t].argsort(descending=True)[:3]:
                    gate, up = layer.moe.gate_up_proj[e].chunk(2)
                    true[b, t] += probabilities[b, t, e] * gated(x[b, t], gate, up, layer.moe.expert_down_proj[e])
        assert probabilities.topk(3).values.sum(-1).max() < 0.999  # not renormalised, or this would prove nothing
        same(found, true)


def test_kinds_of_layers() -> None:
    assert step3.layer_kinds(STEP3) == ("dense",) * 4 + ("experts",) * 4 + ("dense",)
    assert step3.layer_kinds({**TEXT, "moe_layers_enum": [0, 8]}) == ("experts",) + ("dense",) * 7 + ("experts",)


def test_post_norm_block_norms_what_it_adds() -> None:
    block = random_weights(step3.TowerBlock(STEP3["vision_config"], 0))
    x = torch.randn(2, 9, 32)
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(block.self_attn.qkv_proj.weight)
        attention.in_proj_bias.copy_(block.self_attn.qkv_proj.bias)
        attention.out_proj.load_state_dict(block.self_attn.out_proj.state_dict())
        y = x + block.layer_norm1(attention(x, x, x, need_weights=False)[0])
        inner = block.mlp.fc1(y)
        same(block(x), y + block.layer_norm2(block.mlp.fc2(inner / (1 + torch.exp(-1.702 * inner)))))


def test_an_image_becomes_a_quarter_of_a_quarter_of_its_patches() -> None:
    model = random_weights(full_depth(small_spec("step3"), "vision"))
    images, embeddings = torch.randn(2, 3, 32, 32), model.vision_model.embeddings  # type: ignore[union-attr]
    pixels = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 2, 4, 2, 4, 48)
    positions = step3.patch_positions(embeddings.position_embedding.weight.detach(), 8).view(2, 4, 2, 4, 32)
    with torch.no_grad():
        features = model.see(pixels, positions)  # type: ignore[operator]
        rows = embeddings(pixels, positions)
        patches = embeddings.patch_embedding(images).flatten(2).transpose(1, 2)  # as the convolution that it is in the checkpoint
        same(rows[:, 4:], patches + embeddings.position_embedding.weight[1:])
        same(rows[:, :4], (embeddings.class_embedding + embeddings.position_embedding.weight[0]).expand(2, 4, -1))
    assert features.shape == (2, 4, 64)  # 8 x 8 patches, 4 x 4, 2 x 2


def siglip() -> tuple[nn.Module, nn.Module]:
    """Our tower and transformers' own SigLIP of the same weights, for square images."""
    ours = random_weights(full_depth(small_spec("minicpm"), "vision"))
    config = transformers.SiglipVisionConfig(**MINICPM["vision_config"], vision_use_head=False, attn_implementation="eager")
    theirs = transformers.SiglipVisionModel(config).eval()
    own = {name.removeprefix("vpm."): w for name, w in ours.state_dict().items() if name.startswith("vpm.")}
    expected = {name.removeprefix("vision_model."): name for name in theirs.state_dict()}
    theirs.load_state_dict({expected[name]: weight for name, weight in own.items()})
    return ours, theirs


def test_the_tower_is_siglip_and_padding_changes_nothing() -> None:
    ours, theirs = siglip()
    images = torch.randn(2, 3, 40, 40)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    positions = minicpmv4.patch_positions(10, 10, 10).expand(2, -1)
    assert torch.equal(positions[0], torch.arange(100))
    padded = torch.cat([patches, torch.full((2, 7, 48), math.nan)], 1)
    more = torch.cat([positions, positions[:, :7]], 1)
    with torch.no_grad():
        true = theirs(pixel_values=images).last_hidden_state
        same(ours.vpm(patches, positions, torch.tensor([100, 100])), true)  # type: ignore[operator]
        same(ours.vpm(padded, more, torch.tensor([100, 100]))[:, :100], true)  # type: ignore[operator]


def test_the_resampler_is_cross_attention_under_a_padding_mask() -> None:
    model = random_weights(minicpmv4.Resampler(6, 128, 32))
    plain = nn.MultiheadAttention(128, 1, batch_first=True)
    x, lengths, grid = torch.randn(3, 9, 32), torch.tensor([9, 4, 1]), torch.randn(3, 9, 128)
    with torch.no_grad():
        plain.load_state_dict(model.attn.state_dict())
        rows = model.ln_kv(model.kv_proj(x))
        mask = torch.arange(9)[None] >= lengths[:, None]
        query = model.ln_q(model.query).expand(3, -1, -1)
        seen = plain(query, rows + grid, rows, key_padding_mask=mask, need_weights=False)[0]
        same(model(x, grid, lengths), model.ln_post(seen) @ model.proj)


@pytest.mark.parametrize(("rows", "columns"), [(70, 70), (1, 5), (33, 48)])
def test_positions_of_an_image_of_any_shape(rows: int, columns: int) -> None:
    found = minicpmv4.patch_positions(rows, columns, 70).view(rows, columns)
    assert found[0, 0] == 0
    for i in range(rows):
        for j in range(columns):
            row, column = divmod(int(found[i, j]), 70)  # within a rounding of float32
            assert abs(row - i * 70 / rows) < 1.001 and abs(column - j * 70 / columns) < 1.001
    assert found.max() < 4900


def test_the_sine_table() -> None:
    table = minicpmv4.sine_table(3, 4, 16).view(3, 4, 16)
    for i in range(3):
        for j in range(4):
            angles = [[p / 10000 ** (k / 4) for k in range(4)] for p in (j, i)]
            true = [f(a) for each in angles for f in (math.sin, math.cos) for a in each]
            same(table[i, j], torch.tensor(true))


def test_a_checkpoint_and_back() -> None:
    weights = random_weights(full_depth(small_spec("step3"), "prefill")).state_dict()
    tensors = to_checkpoint(weights, step3.CHECKPOINT)
    assert tensors["model.layers.4.moe.up_proj.weight"].shape == (5, 40, 64)
    assert tensors["model.layers.4.moe.down_proj.weight"].shape == (5, 64, 40)
    back = from_checkpoint(tensors, step3.CHECKPOINT)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    del tensors["model.layers.5.moe.up_proj.weight"]
    with pytest.raises(BindError, match=r"no 'model.layers.5.moe.up_proj.weight'"):
        from_checkpoint(tensors, step3.CHECKPOINT)
