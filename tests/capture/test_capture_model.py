"""Captured graphs, run on real weights, against transformers' own forward with its own cache; and what a capture promises."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable

import pytest
import torch
import transformers

from flagtree.capture.captured import CapturedModel
from flagtree.capture.model import capture
from flagtree.capture.model_spec import ModelSpec
from flagtree.errors import CaptureError, UnknownName

Make = Callable[..., ModelSpec]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ARCHITECTURES = (
    ("Qwen3ForCausalLM", {}),
    ("Qwen2ForCausalLM", {}),  # biases on q, k and v
    ("LlamaForCausalLM", {"rope_scaling": LLAMA3}),  # tied head
    ("CohereForCausalLM", {}),  # computes after its output head, which a traced graph must keep
    ("MistralForCausalLM", {"sliding_window": 8, "head_dim": 8}),  # each token sees the last eight
)


class Pair:
    """A captured prefill and decode beside the real model, with the same random weights."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        self.prefill, self.decode = capture(spec, "prefill"), capture(spec, "decode")
        torch.manual_seed(3)
        kind = getattr(transformers, spec.architecture)
        self.model = kind(kind.config_class(**spec.config, attn_implementation="sdpa")).to(self.dtype).eval()
        with torch.no_grad():
            for weight in self.model.parameters():  # the initial 0.02 would make every logit alike
                weight.copy_(torch.randn_like(weight) * 0.25 + (1.0 if weight.ndim == 1 else 0.0))
        self.weights = dict(self.model.named_parameters())

    def caches(self, batch: int, context: int) -> dict[str, torch.Tensor]:
        """Full of NaN: what is read without having been written shows."""
        shape = (batch, self.spec.key_heads, context, self.spec.head_width)
        return {name: torch.full(shape, math.nan, dtype=self.dtype) for name in self.prefill.qualified_names("state")}

    def true_logits(self, prompt: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Logits of the prompt's last token and of each greedy step after it, by transformers and its own cache, one sequence."""
        cache, ids, out = None, prompt[None], []
        for _ in range(steps + 1):
            with torch.no_grad():
                found = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, row = found.past_key_values, found.logits[0, -1]
            out.append(row)
            ids = row.argmax()[None, None]
        return out


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda p: p[0] + "".join(p[1]))
def pair(request: pytest.FixtureRequest, small_spec: Make) -> Pair:
    architecture, config = request.param
    return Pair(small_spec(architecture, num_hidden_layers=2, **config))


def close(found: torch.Tensor, true: torch.Tensor) -> None:
    torch.testing.assert_close(found, true, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("lengths", "context"),
    [((1,), 8), ((7,), 48), ((5, 1, 11), 20), ((32, 3, 32, 31), 48)],
    ids=["one token", "one prompt", "padded batch", "upper bounds"],
)
def test_prefill_and_decode_are_transformers_own(pair: Pair, lengths: tuple[int, ...], context: int) -> None:
    torch.manual_seed(5)
    steps = min(4, context - max(lengths))
    prompts = [torch.randint(0, 97, (n,)) for n in lengths]
    true = [pair.true_logits(p, steps) for p in prompts]
    batch, longest = len(lengths), max(lengths)
    ids = torch.zeros(batch, longest, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    start, caches = torch.zeros(batch, dtype=torch.int64), pair.caches(batch, context)
    logits = pair.prefill.run({**pair.weights, **caches, "ids": ids, "start": start, "last": torch.tensor(lengths) - 1})
    assert logits.shape == (batch, 97)
    start = torch.tensor(lengths)  # rows of padding beyond it are overwritten before they are read
    for step in range(steps + 1):
        close(logits, torch.stack([sequence[step] for sequence in true]))
        if step < steps:
            token = torch.stack([sequence[step].argmax() for sequence in true])[:, None]
            logits = pair.decode.run({**pair.weights, **caches, "ids": token, "start": start})
            start = start + 1


def test_a_prompt_in_chunks_gives_the_same_logits(pair: Pair) -> None:
    torch.manual_seed(6)
    prompt, caches = torch.randint(0, 97, (13,)), pair.caches(1, 16)
    for first, end in ((0, 6), (6, 7), (7, 13)):
        values = {"ids": prompt[None, first:end], "start": torch.tensor([first]), "last": torch.tensor([end - first - 1])}
        logits = pair.prefill.run({**pair.weights, **caches, **values})
    close(logits[0], pair.true_logits(prompt, 0)[0])


def test_bfloat16_rounds_where_transformers_rounds(small_spec: Make) -> None:
    """The error against float64 is eager's own, within the factor that the whole project allows."""
    pair = Pair(small_spec(dtype="bfloat16", num_hidden_layers=2))
    prompt = torch.randint(0, 97, (9,))
    values = {"ids": prompt[None], "start": torch.tensor([0]), "last": torch.tensor([8])}
    found = pair.prefill.run({**pair.weights, **pair.caches(1, 12), **values})[0]
    eager = pair.true_logits(prompt, 0)[0]
    pair.model.double()
    true = pair.true_logits(prompt, 0)[0]
    assert (found.dtype, true.dtype) == (torch.bfloat16, torch.float64)
    ours, theirs = ((x.double() - true).square().mean().sqrt() for x in (found, eager))
    assert ours <= 4 * theirs + 1e-6 * true.abs().mean()


def test_roles_names_and_sizes_of_every_argument(small_spec: Make) -> None:
    spec = small_spec(num_hidden_layers=6)
    captured = capture(spec, "prefill", layers=3)
    assert (captured.depth, captured.captured_layers, captured.layer_prefix) == (6, 3, "model.layers.")
    assert [n.name for n in captured.graph_module.graph.nodes if n.op == "placeholder"] == [p.name for p in captured.placeholders]
    assert captured.qualified_names("input") == ("ids", "start", "last")
    assert captured.qualified_names("constant") == ("model.rotary_emb.inv_freq",)
    assert captured.qualified_names("state") == tuple(f"{cache}.{layer}" for layer in range(6) for cache in ("k_cache", "v_cache"))
    assert captured.ranges == {captured.dims["batch"]: (1, 4), captured.dims["sequence"]: (1, 32), captured.dims["context"]: (1, 48)}
    with torch.device("meta"):
        config = transformers.Qwen3Config(**spec.config)
        model = transformers.Qwen3ForCausalLM(config)
    true = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert sorted(captured.qualified_names("weight")) == sorted(true)
    for placeholder in captured.placeholders:
        assert type(placeholder.value).__name__ == "FakeTensor"
        assert placeholder.value.device.type == "cpu"
        if placeholder.role == "weight":
            assert tuple(placeholder.value.shape) == true[placeholder.qualified]
    inverse = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(captured.constants["model.rotary_emb.inv_freq"], inverse)


def test_names_of_another_layer(small_spec: Make) -> None:
    captured = capture(small_spec(), "decode", layers=2)
    assert captured.at_layer("model.layers.1.mlp.up_proj.weight", 17) == "model.layers.17.mlp.up_proj.weight"
    assert captured.at_layer("k_cache.0", 12) == "k_cache.12"
    assert captured.at_layer("lm_head.weight", 3) == "lm_head.weight"
    assert [captured.layer_of(n) for n in ("model.layers.1.mlp", "model.layers.1", "v_cache.2", "model.norm.weight")] == [1, 1, 2, None]


def test_a_graph_keeps_modules_and_one_attention_call_a_layer(small_spec: Make) -> None:
    for part in ("prefill", "decode"):
        captured = capture(small_spec(), part, layers=3)
        calls = [n for n in captured.graph_module.graph.nodes if n.target is torch.ops.flagtree.attention.default]
        assert [captured.layer_of_node(n) for n in calls] == [0, 1, 2]
        targets = {str(n.target) for n in captured.graph_module.graph.nodes if n.op == "call_function"}
        assert not targets & {"aten.index_put.default", "aten.index_copy.default", "aten.expand.default", "aten.where.self"}
        paths = {path for n in captured.graph_module.graph.nodes for path, _ in (n.meta.get("nn_module_stack") or {}).values()}
        assert {"model.layers.1.self_attn.q_norm", "model.layers.2.mlp", "model.norm", "lm_head"} <= paths


def test_a_tied_head_is_one_weight_under_its_name_in_a_checkpoint(small_spec: Make) -> None:
    captured = capture(small_spec("LlamaForCausalLM"), "decode", layers=2)
    names = captured.qualified_names("weight")
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_equal_bounds_make_a_number_of_a_size(small_spec: Make) -> None:
    spec = small_spec()
    parts = {**spec.parts.model_dump(), "decode": {"batch": (2, 2), "context": (1, 48)}}
    captured = capture(ModelSpec.model_validate({**spec.model_dump(), "parts": parts}), "decode", layers=1)
    assert set(captured.dims) == {"context"}
    assert captured.placeholders[-1].value.shape[0] == 2


def test_nothing_is_fetched(small_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a capture opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert isinstance(capture(small_spec(), "decode", layers=1), CapturedModel)


class PeekingQwen3(transformers.Qwen3ForCausalLM):
    """Takes another way for one length: the trace of the example's length would be wrong for all others."""

    def forward(self, input_ids: torch.Tensor, **options: object) -> object:
        if input_ids.shape[1] > 8:
            input_ids = input_ids + 0
        return super().forward(input_ids=input_ids, **options)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("NoSuchForCausalLM", {}, "no model class 'NoSuchForCausalLM'"),
        ("AutoTokenizer", {}, "no model class 'AutoTokenizer'"),
        ("Qwen3ForCasualLM", {}, "closest: Qwen3ForCausalLM"),
        ("Qwen3ForCausalLM", {"num_key_value_head": 2, "num_key_value_heads": None}, "no field 'num_key_value_head'.*num_key_value_heads"),
        ("Qwen3ForCausalLM", {"model_type": "llama"}, "model_type 'llama' is not that of Qwen3ForCausalLM"),
        ("Qwen3ForCausalLM", {"hidden_act": "no_such"}, "cannot be built.*no_such"),
        ("Qwen3ForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "only full attention"),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, "only full attention"),
        ("Qwen3ForCausalLM", {"head_dim": None}, "the field 'head_dim' is missing.*means 8, .*take 128"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "depend on data.*'dynamic'"),
        ("GemmaForCausalLM", {"head_dim": 16}, "a table that is not a weight.*embed_tokens"),
        ("GPTNeoXForCausalLM", {}, "4 key heads of 8, its description 2 of 8"),
        ("StableLmForCausalLM", {}, "does not pass options on"),
        ("PeekingQwen3", {"head_dim": 16}, "cannot be traced.*sequence.*try: .*torch.compile"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    small_spec: Make, monkeypatch: pytest.MonkeyPatch, architecture: str, config: dict[str, object], message: str
) -> None:
    monkeypatch.setattr("transformers.PeekingQwen3", PeekingQwen3, raising=False)
    spec = small_spec(architecture, **config)
    for field in [field for field, value in spec.config.items() if value is None]:
        del spec.config[field]
    with pytest.raises(CaptureError, match=f"(?s){message}"):
        capture(spec, "prefill", layers=2)


def test_without_transformers_the_extra_is_named(small_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CaptureError, match=r"needs transformers[\s\S]*flagtree-toolkit\[models\]"):
        capture(small_spec(), "decode", layers=1)


def test_a_wrong_weight_count_part_or_dtype_is_refused(small_spec: Make) -> None:
    spec = small_spec()
    counted = spec.model_copy(update={"capture": spec.capture.model_copy(update={"weights": 9})})
    with pytest.raises(CaptureError, match="47 weights, its description says 9"):
        capture(counted, "decode", layers=1)
    with pytest.raises(UnknownName, match="closest: decode"):
        capture(spec, "decod")
    with pytest.raises(UnknownName, match="unknown dtype 'int8'"):
        capture(spec, "decode", dtype="int8")
    assert capture(spec, "decode", layers=1, dtype="f16").placeholders[0].value.dtype == torch.float16
