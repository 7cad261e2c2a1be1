"""The five models small, as cpu bundles: prefill and eight decode steps give the logits of the model's reference, the tower its features.

The reference is transformers' own forward where it has the class, else the reference of `capture/references`, which other tests hold
against vLLM.  "Equal to eager" as everywhere: error against float64 at most four times eager's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import flagtree
from flagtree.capture.cache import ExplicitCache
from flagtree.capture.model import constants_of
from flagtree.capture.model_spec import ModelSpec
from flagtree.capture.references import minicpmv4
from flagtree.compile import compile_model
from flagtree.runtime.load import LoadedBundle
from tests.bundles.serving import serve
from tests.models.plain_minimax import PlainMiniMax
from tests.models.small import CONFIGS, description, full_depth, random_weights, small_spec

STEPS = 8
LENGTHS = (9, 4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(name: str, folder: Path, dtype: str = "float32") -> LoadedBundle:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(description(name, dtype)), encoding="utf-8")
    (bundle,) = compile_model(str(path), ["cpu"], out=folder / "bundles").bundles
    return flagtree.load(bundle.path, trust=bundle.digest)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_equal_to_eager(found: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """`truth` in float64.  Magnitudes are such that a layer left out would show."""
    assert found.shape == eager.shape and found.dtype == eager.dtype and found.isfinite().all()
    assert rms(truth) > 0.05
    assert rms(found - truth) <= 4 * rms(eager - truth) + 1e-6 * float(truth.abs().mean())


def question(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [2, 9] padded on the right, lengths, following tokens [2, STEPS]."""
    random = torch.Generator().manual_seed(11)
    ids, following = (torch.randint(vocabulary, (2, n), generator=random) for n in (max(LENGTHS), STEPS))
    return ids, torch.tensor(LENGTHS), following


def reference_logits(spec: ModelSpec, model: Any) -> torch.Tensor:
    """The model's own eager logits [1 + STEPS, 2, vocabulary], each sequence alone, unpadded, with a cache."""
    ids, lengths, following = question(spec.text["vocab_size"])
    dtype = next(model.parameters()).dtype
    columns = []
    for sequence, length, rest in zip(ids, lengths.tolist(), following, strict=True):
        caches = torch.zeros(2, spec.depth, 1, spec.key_heads, length + STEPS, spec.head_width, dtype=dtype)
        tokens, rows, at = torch.cat([sequence[:length], rest])[None], [], 0
        for end in range(length, length + STEPS + 1):
            cache = ExplicitCache(list(caches[0]), list(caches[1]), torch.tensor([at]))
            places = torch.arange(at, end)[None]
            with torch.no_grad():
                found = model(input_ids=tokens[:, at:end], position_ids=places, past_key_values=cache, use_cache=True, flagtree_cache=cache)
            rows.append(found.logits[0, -1])
            at = end
        columns.append(torch.stack(rows))
    return torch.stack(columns, 1)


def with_tables(model: torch.nn.Module) -> torch.nn.Module:
    """Tables that are no weights, which `to_empty` left undefined."""
    for name, table in constants_of(model).items():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], table, persistent=False)
    return model


def weights_for(bundle: LoadedBundle, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    wanted = bundle.parts["prefill"].weights
    return {n: w.detach() for n, w in (*model.named_parameters(), *model.named_buffers()) if n in wanted}


@pytest.mark.parametrize("name", ["step3", "minicpm", "minimax"])
def test_text_gives_the_logits_of_its_reference(name: str, tmp_path: Path) -> None:
    spec, bundle = small_spec(name), built(name, tmp_path)
    model = with_tables(random_weights(full_depth(spec, "prefill")))
    weights = weights_for(bundle, model)
    ids, lengths, following = question(spec.text["vocab_size"])
    vision = {"features": torch.randn(1, spec.text["hidden_size"]), "feature_rows": torch.full_like(ids, -1)}
    more: Callable[[int], Any] = lambda step: vision if step == 0 and spec.parts.vision else {}
    found = serve(bundle, weights, ids, lengths, following, more)
    eager = reference_logits(spec, model)
    assert rms(eager[1:] - eager[:-1]) > 0.3 * rms(eager)  # a hard question: equal logits would prove nothing
    assert_equal_to_eager(found, eager, reference_logits(spec, model.double()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minimax_as_its_checkpoint_computes(dtype: str, tmp_path: Path) -> None:
    """fp8 against the plain definition, a forward of each whole sequence without a cache.

    An activation that lies between two values of e4m3 goes either way in f32 and f64, and what a token saw so all later ones see: of four
    sequences one at least must agree in every step to the bits of f32, half of all logits, and the others but for such a step.
    """
    spec, bundle, random = small_spec("minimax-fp8", dtype), built("minimax-fp8", tmp_path, dtype), torch.Generator().manual_seed(2)
    weights = weights_for(bundle, with_tables(random_weights(full_depth(spec, "prefill"))))
    lengths = torch.tensor([5, 3, 2, 1])
    ids, following = (torch.randint(97, (4, n), generator=random) for n in (5, STEPS))
    found = serve(bundle, weights, ids, lengths, following)

    def plain(element: torch.dtype, activations: bool = True) -> torch.Tensor:
        model = PlainMiniMax(spec, weights, element, activations)
        sequences = [(torch.cat([i[:n], rest]), n) for i, n, rest in zip(ids, lengths.tolist(), following, strict=True)]
        return torch.stack([model.logits(tokens)[n - 1 :] for tokens, n in sequences], 1)

    def off(logits: torch.Tensor) -> torch.Tensor:
        return (logits - truth).norm(dim=-1) / truth.norm(dim=-1)

    eager, truth = plain(getattr(torch, dtype)), plain(torch.float64)
    assert rms(truth[1:] - truth[:-1]) > 0.3 * rms(truth)
    assert found.shape == (1 + STEPS, 4, 97) and off(found).max() < 0.5
    if dtype == "bfloat16":
        assert_equal_to_eager(found, eager, truth)
        return
    exact = off(found) < 2e-5
    assert exact.any(1).all() and exact.double().mean() >= 0.5
    assert off(plain(torch.float64, activations=False)).min() > 0.01  # a sharp test: activations left as they are would show in each row


def test_minimax_is_transformers_own(tmp_path: Path) -> None:
    """The model with our operators in it gives the logits of transformers' plain loop over experts."""
    spec = small_spec("minimax")
    model = with_tables(random_weights(full_depth(spec, "prefill")))
    config = {k: v for k, v in spec.config.items() if k != "model_type"}
    plain = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**config, attn_implementation="eager")).eval()
    plain.config._experts_implementation = "eager"
    plain.load_state_dict(model.state_dict())
    tokens = torch.arange(13)[None]
    caches = torch.zeros(2, spec.depth, 1, 2, 13, 32)
    cache = ExplicitCache(list(caches[0]), list(caches[1]), torch.tensor([0]))
    with torch.no_grad():
        ours = model(input_ids=tokens, position_ids=tokens, past_key_values=cache, use_cache=True, flagtree_cache=cache).logits  # type: ignore[operator]
        torch.testing.assert_close(ours, plain(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_the_towers_of_the_references(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(2)
    shapes = ((10, 10), (3, 7))
    pad = torch.nn.utils.rnn.pad_sequence
    given = {
        "step3": {"pixels": torch.randn(2, 2, 4, 2, 4, 48, generator=random), "positions": torch.randn(2, 4, 2, 4, 32, generator=random)},
        "minicpm": {
            "pixels": pad([torch.randn(r * c, 48, generator=random) for r, c in shapes], batch_first=True),
            "positions": pad([minicpmv4.patch_positions(r, c, 10) for r, c in shapes], batch_first=True),
            "lengths": torch.tensor([r * c for r, c in shapes]),
            "grid": pad([minicpmv4.sine_table(r, c, 128) for r, c in shapes], batch_first=True),
        },
    }
    for name, inputs in given.items():
        model: Any = random_weights(full_depth(small_spec(name), "vision"))
        part = built(name, tmp_path).parts["vision"]
        (found,) = part.bind({n: w.detach() for n, w in model.named_parameters()})(inputs).values()
        with torch.no_grad():
            eager = model.see(**inputs)
            wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
            assert_equal_to_eager(found, eager, model.double().see(**wide))


def test_an_image_and_a_question_through_robobrain(tmp_path: Path) -> None:
    """Tower, merge, three-axis positions and eight decode steps against one forward of transformers' whole model."""
    bundle = built("robobrain", tmp_path)
    _, fields, _ = CONFIGS["robobrain"]
    config = transformers.Qwen2_5_VLConfig(**{k: v for k, v in fields.items() if k != "model_type"}, image_token_id=90, video_token_id=91,
                                           vision_start_token_id=92, attn_implementation="eager")  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=random) * (weight.shape[-1] if weight.ndim > 1 else 25) ** -0.5
            weight.copy_(noise + (1.0 if weight.ndim == 1 else 0.0))
    rows, columns = 12, 8  # patches: 6 x 4 tokens in windows of 2 x 2
    grid, tokens = torch.tensor([[1, rows, columns]]), rows * columns // 4
    pixels = torch.randn(rows * columns, 96, generator=random)
    words = torch.randint(90, (3 + STEPS,), generator=random)
    ids = torch.cat([words[:2], torch.tensor([92]), torch.full((tokens,), 90), words[2:]])[None]
    length = ids.shape[1] - STEPS
    kinds = (ids == 90).int()
    with torch.no_grad():
        eager = model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=False).logits[0]
        positions, _ = model.model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=kinds)
        truth = model.double()(input_ids=ids, pixel_values=pixels.double(), image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=False)
        model.float()
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    places = get_vision_position_ids(grid, 2)
    index, windows = get_vision_window_index(grid, spatial_merge_size=2, window_size=16, patch_size=4)
    whole = torch.full_like(windows, rows * columns)
    whole[0] = 0
    bounds = {f"bounds.{i}": (whole if i in (1, 4) else windows).to(torch.int32) for i in range(5)}
    plain = lambda n: n.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    names = {plain(n): w.detach() for n, w in model.named_parameters()}
    tower = bundle.parts["vision"]
    seen = {"pixels": pixels.view(tokens, 4, 96), "positions": places.view(tokens, 4, 2).contiguous(), "window_index": index, **bounds}
    (features,) = tower.bind({n: names[n] for n in tower.weights if n in names})(seen).values()
    feature_rows = torch.where(kinds == 1, (kinds == 1).cumsum(1) - 1, -1)

    def more(step: int) -> dict[str, torch.Tensor]:
        if step == 0:
            at = positions[:, :, :length].contiguous()
            return {"features": features, "feature_rows": feature_rows[:, :length].contiguous(), "positions": at}
        return {"positions": positions[:, :, length + step - 1 : length + step].contiguous()}

    weights = {n: names[n] for n in bundle.parts["prefill"].weights if n in names}
    found = serve(bundle, weights, ids[:, :length], torch.tensor([length]), ids[:, length:], more)[:, 0]
    assert_equal_to_eager(found, eager[length - 1 :], truth.logits[0, length - 1 :])
