"""Model descriptions: names, files, hostile files, wrong fields with file, line and the closest name; the capture key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flagtree.capture import model_spec
from flagtree.capture.model_spec import ModelSpec, list_specs, load_spec, models_folder, spec_key
from flagtree.errors import CaptureError, UnknownName

GOOD = """\
name: small
architecture: Qwen3ForCausalLM
dtype: bfloat16
config:
  vocab_size: 97
  hidden_size: 32
  intermediate_size: 48
  num_hidden_layers: 4
  num_attention_heads: 4
  max_position_embeddings: 64
  tie_word_embeddings: false
parts:
  prefill: {batch: [1, 4], sequence: [1, 32], context: [1, 64]}
  decode: {batch: [1, 4], context: [1, 64]}
card:
  benchmarks:
    - {name: a, reference: 0.5}
"""


def write(folder: Path, text: str, name: str = "wörk one.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_description_file_loads(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD))
    assert (spec.name, spec.depth, spec.key_heads, spec.head_width) == ("small", 4, 4, 8)
    assert spec.bounds("prefill").sequence == (1, 32)
    assert spec.bounds("decode").sequence is None
    assert spec.capture.layers == 3


@pytest.mark.parametrize(
    ("old", "new", "line", "messages"),
    [
        ("dtype: bfloat16", "dtyp: bfloat16", 3, ["unknown field 'dtyp'", "closest: dtype"]),
        ("sequence: [1, 32]", "sequnce: [1, 32]", 13, ["unknown field 'sequnce'", "closest: sequence"]),
        ("reference: 0.5", "referense: 0.5", 17, ["unknown field 'referense'", "closest: reference"]),
        ("  hidden_size: 32", "  hiden_size: 32", 6, ["'hidden_size' is missing", "is 'hiden_size' meant"]),
        ("  intermediate_size: 48\n", "", 4, ["'intermediate_size' is missing", "no default is taken"]),
        ("name: small\n", "", None, ["name: Field required"]),
        ("dtype: bfloat16", "dtype: int3", 3, ["dtype", "'bfloat16'"]),
        ("batch: [1, 4], sequence", "batch: [8, 4], sequence", 13, ["lower bound 8 is above the upper bound 4"]),
        ("batch: [1, 4], sequence", "batch: [0, 4], sequence", 13, ["greater than or equal to 1"]),
        ("{batch: [1, 4], sequence: [1, 32],", "{batch: [1, 4],", 12, ["prefill needs bounds for 'sequence'"]),
        ("decode: {batch", "decode: {sequence: [1, 2], batch", 12, ["one token a sequence"]),
        ("vocab_size: 97", "vocab_size: many", 5, ["'vocab_size' must be a positive integer"]),
        ("num_attention_heads: 4", "num_attention_heads: 5", 6, ["no multiple of 'num_attention_heads'"]),
        ("name: small", "name: small\nname: other", 2, ["'name' is given twice", "first in line 1"]),
        ("name: small", "name: &a small", 1, ["anchors are not allowed"]),
        ("dtype: bfloat16", "dtype: [", None, ["not YAML"]),
        ("name: small", "name: !!python/object/apply:os.getcwd []", 1, ["tags are not allowed"]),
        ("name: small", "name: !!str small", 1, ["tags are not allowed"]),
        ("hidden_size: 32", "hidden_size: 2305843009213693952", 6, ["more than any model has", "nothing was allocated"]),
        ("num_hidden_layers: 4", "num_hidden_layers: 1000000000", 8, ["more than any model has"]),
        ("num_hidden_layers: 4", "num_hidden_layers: 1" + "0" * 5000, None, ["not YAML"]),
        ("num_attention_heads: 4", "num_attention_heads: 4\n  num_key_value_heads: 3", 9, ["'num_attention_heads' = 4 is no multiple of"]),
        ("vocab_size: 97", "vocab_size: 97\n  num_experts: 4\n  num_experts_per_tok: 5", 7, ["'num_experts_per_tok' = 5 is more than"]),
        ("vocab_size: 97", "vocab_size: 97\n  num_experts_per_tok: 5", 6, ["the number of experts is not"]),
        ("vocab_size: 97", "vocab_size: 97\n  head_dim: 8\n  rotary_dim: 16", 7, ["'rotary_dim' = 16 is more than a head's width, 8"]),
        ("vocab_size: 97", "vocab_size: 97\n  rope_scaling: {mrope_section: [1, 1]}", 6, ["does not fill half a head, 4"]),
        ("vocab_size: 97", "vocab_size: 97\n  vision_config: {hidden_size: 9, num_heads: 2}", 6, ["'hidden_size' = 9 is no multiple"]),
        ("vocab_size: 97", "vocab_size: 97\n  day: 2025-01-01", 6, ["neither text, number"]),
        ("vocab_size: 97", "vocab_size: 97\n  far: .inf", 6, ["neither text, number"]),
        ("tie_word_embeddings: false", "tie_word_embeddings: 0", 11, ["must be true or false"]),
        ("  decode:", "  vision: {images: [1, 4]}\n  decode:", 14, ["has no vision tower"]),
        ("card:", "bridge: {module: a, width: 33}\ncard:", 15, ["makes rows of 33, the text has 32"]),
        ("card:", "inferred: {depth: guessed}\ncard:", 15, ["config has no field 'depth'"]),
        ("name: small", "extends: qwen3-9b\nname: small", 1, ["no description 'qwen3-9b'", "qwen3-8b"]),
        ("name: small", "extends: ../qwen3-8b\nname: small", 1, ["without folder and suffix"]),
    ],
)
def test_a_wrong_field_names_file_line_and_closest_name(tmp_path: Path, old: str, new: str, line: int | None, messages: list[str]) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(CaptureError) as error:
        load_spec(path)
    text = str(error.value)
    assert (f"{path}:{line}" if line else str(path)) in text
    for message in messages:
        assert message in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "anchors are not allowed"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("", "not a mapping"),
        ("- 1\n", "not a mapping"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("x" * (1 << 20) + "y", "too large"),
        ("[" * (1 << 19) + "]" * (1 << 19), "nested too deeply"),
        ("- 1\n" * (1 << 17), "too many fields"),
        ("1: a\n", "a field's name is no text"),
        ("a: \x01\n", "not YAML"),
    ],
    ids=["anchor", "depth", "empty", "list", "two", "size", "megabyte of nesting", "megabyte of fields", "number as name", "control"],
)
def test_a_hostile_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        load_spec(write(tmp_path, text))


def test_a_file_that_is_no_text_and_one_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    with pytest.raises(CaptureError, match="No such file"):
        load_spec(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CaptureError, match="not UTF-8"):
        load_spec(path)


def config_json(folder: Path, **changes: Any) -> Path:
    config = {
        **yaml.safe_load(GOOD)["config"],
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "transformers_version": "4.51.0",
        **changes,
    }
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return path


def test_a_published_configuration_is_a_description(tmp_path: Path) -> None:
    path = config_json(tmp_path)
    spec = load_spec(path)
    assert spec == load_spec(tmp_path) == load_spec(str(path))
    assert (spec.name, spec.architecture, spec.dtype, spec.depth) == ("llama-32x4", "LlamaForCausalLM", "float16", 4)
    assert spec.bounds("prefill").context == (1, 64)
    assert str(tmp_path) not in spec.model_dump_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no model class"),
        ({"architectures": ["A", "B"]}, "names no model class"),
        ({"torch_dtype": None}, "names no dtype"),
        ({"hidden_size": None}, "'hidden_size' is missing\n"),
        ({"hidden_size": None, "vocab_size": None}, "'vocab_size' is missing, and so are 'hidden_size'\n"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive integer"),
        ({"max_position_embeddings": -1}, "'max_position_embeddings' must be a positive integer"),
    ],
)
def test_an_incomplete_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        load_spec(config_json(tmp_path, **changes))


def test_a_published_configuration_with_a_tower(tmp_path: Path) -> None:
    config = {**load_spec("robobrain2-7b").config, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    spec = load_spec(tmp_path)
    assert (spec.part_names, spec.depth) == (("prefill", "decode", "vision"), 28)
    assert spec.bounds("vision").sizes == {"tokens": (1, 65536), "edges": (2, 65537)}
    nested = {**load_spec("step3").config, "architectures": ["Step3VLForConditionalGeneration"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(nested), encoding="utf-8")
    assert (load_spec(tmp_path).depth, load_spec(tmp_path).bounds("decode").context) == (61, (1, 65536))
    assert load_spec(tmp_path).bounds("vision").side == (1, 13)


def test_more_layers_than_any_model_has_are_refused() -> None:
    with pytest.raises(CaptureError, match="1000000000 layers are more than any model has"):
        load_spec("step3").with_depth(10**9)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": ' + "1" * 5000 + "}", '{"a": NaN}'])
def test_json_that_says_something_twice_or_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CaptureError, match=r"given twice|not JSON|neither text"):
        load_spec(tmp_path)


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n"a": 1,\n}', encoding="utf-8")
    with pytest.raises(CaptureError, match=r"config\.json:3"):
        load_spec(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(CaptureError, match=r"nested too deeply|not JSON"):
        load_spec(path)


def test_names_and_aliases_find_a_shipped_model_and_others_list_the_closest() -> None:
    names = {name for spec in list_specs() for name in (spec.name, *spec.aliases)}
    assert {"qwen3", "qwen3-8b", "Qwen/Qwen3-8B"} <= names
    assert load_spec("qwen3") is load_spec("QWEN/qwen3-8b")
    with pytest.raises(UnknownName) as error:
        load_spec("qwen33")
    assert "closest: qwen3" in str(error.value)
    assert error.value.exit_code == 2


def test_a_description_extends_another(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    more = "extends: base\nname: deeper\nconfig: {num_hidden_layers: 8}\nparts: {decode: {batch: [1, 9]}}\n"
    spec = load_spec(write(tmp_path, more, "more.yaml"))
    assert (spec.name, spec.depth, spec.config["hidden_size"], spec.aliases) == ("deeper", 8, 32, ())
    assert (spec.bounds("decode").batch, spec.bounds("decode").context) == ((1, 9), (1, 64))
    assert spec.card.benchmarks == ()  # figures belong to one model
    write(tmp_path, GOOD.replace("hidden_size: 32", "hidden_size: 0"), "base.yaml")
    with pytest.raises(CaptureError, match=r"base\.yaml:6"):  # a wrong field of the base is named where it stands
        load_spec(tmp_path / "more.yaml")
    write(tmp_path, GOOD, "base.yaml")
    wrong = write(tmp_path, more.replace("8}", "-8}"), "wrong.yaml")
    with pytest.raises(CaptureError, match=r"wrong\.yaml:3"):
        load_spec(wrong)
    write(tmp_path, "extends: more\nname: base\n", "base.yaml")
    with pytest.raises(CaptureError, match="extend each other"):
        load_spec(tmp_path / "more.yaml")


def test_a_part_that_a_model_lacks_is_named() -> None:
    with pytest.raises(UnknownName) as error:
        load_spec("qwen3").bounds("vision")
    assert error.value.exit_code == 2
    assert "qwen3-8b has no vision part" in str(error.value)
    assert load_spec("robobrain2-7b").bounds("vision").tokens == (1, 65536)


def test_two_models_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD, "a.yaml")
    write(tmp_path, GOOD.replace("name: small", "name: other\naliases: [Small]"), "b.yaml")
    monkeypatch.setattr(model_spec, "models_folder", lambda: tmp_path)
    with pytest.raises(CaptureError, match="two models are called 'Small'"):
        list_specs()


def test_the_folder_of_an_installed_wheel_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models_folder().name == "models"
    (tmp_path / "flagtree" / "capture").mkdir(parents=True)
    monkeypatch.setattr(model_spec, "__file__", str(tmp_path / "flagtree" / "capture" / "model_spec.py"))
    with pytest.raises(CaptureError, match="folder of model descriptions is missing"):
        models_folder()
    (tmp_path / "models").mkdir()
    assert models_folder() == tmp_path / "models"
    (tmp_path / "flagtree" / "_models").mkdir()
    assert models_folder() == tmp_path / "flagtree" / "_models"


def test_a_key_has_every_factor_and_nothing_else(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD))
    key = spec_key(spec, "prefill")
    assert json.loads(json.dumps(key)) == json.loads(json.dumps(spec_key(load_spec(write(tmp_path, GOOD, "other.yaml")), "prefill")))
    assert str(tmp_path) not in json.dumps(key)
    others = [
        spec_key(spec, "decode"),
        spec_key(spec, "prefill", layers=2),
        spec_key(spec, "prefill", dtype="float16"),
        spec_key(spec.with_depth(5), "prefill"),
        spec_key(load_spec(write(tmp_path, GOOD.replace("hidden_size: 32", "hidden_size: 64"))), "prefill"),
        spec_key(load_spec(write(tmp_path, GOOD.replace("sequence: [1, 32]", "sequence: [1, 31]"))), "prefill"),
    ]
    texts = [json.dumps(k, sort_keys=True) for k in (key, *others)]
    assert len(set(texts)) == len(texts)
    same = load_spec(write(tmp_path, GOOD.replace("reference: 0.5", "reference: 0.6") + "serving: {port: 1}\naliases: [x]\n"))
    assert spec_key(same, "prefill") == key
    assert spec_key(spec, "prefill", dtype="bf16") == key


def test_another_depth_of_the_same_model(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD))
    deeper = spec.with_depth(144)
    assert (deeper.depth, deeper.capture.weights, spec.depth) == (144, None, 4)
    assert deeper.parts == spec.parts


def test_listing_and_keys_import_neither_torch_nor_transformers(repository: Path) -> None:
    code = """
import sys
from flagtree.capture.model_spec import list_specs, load_spec, spec_key
assert list_specs()
key = spec_key(load_spec("qwen3"), "prefill")
assert key["torch"]
assert key["transformers"]
print([m for m in ("torch", "transformers", "numpy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_spec_round_trips_through_json() -> None:
    spec = load_spec("qwen3")
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads `1e-06`, as every config.json writes it, as text; a description means the number."""
    text = (models_folder() / "qwen3-8b.yaml").read_text("utf-8")
    assert "rms_norm_eps: 1.0e-6" in text
    path = tmp_path / "own.yaml"
    path.write_text(text.replace("rms_norm_eps: 1.0e-6", "rms_norm_eps: 1e-06"), "utf-8")
    assert load_spec(path).config["rms_norm_eps"] == 1e-6
