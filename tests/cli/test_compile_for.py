"""`flagtree compile --for vllm`: what is refused before any work, each with one clear line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flagtree.capture.ahead import NOT_INSTALLED, server_model
from flagtree.errors import UnknownName
from tests.cli.conftest import Flagtree
from tests.cli.test_compile import CONFIG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("qwen3", "--for", "vlm"), "unknown server 'vlm'\n  why: closest: vllm"),
        (("qwen4", "--for", "vllm"), "unknown model 'qwen4'\n  why: closest: qwen3"),
        (("qwen3", "--for", "vllm", "--tp", "3"), "32 attention heads cannot be divided by 3\n  try: --tp with one of 1, 2, 4, 8, 16, 32"),
        (("qwen3", "--for", "vllm", "--tp", "1,two"), "--tp is no list of degrees\n  where: --tp 1,two"),
        (("qwen3", "--for", "vllm", "--tp", "0"), "--tp is no list of degrees"),
        (("qwen3", "--for", "vllm", "--part", "decode"), "one graph serves prefill and decode"),
        (("qwen3", "--for", "vllm", "--dtype", "int4"), "unknown dtype 'int4'"),
        (("qwen3", "--tp", "3", "--target", "cpu"), "tensor parallel 3 does not fit qwen3-8b\n  why: 8 key heads neither divide by 3"),
        (("minimax", "--tp", "5", "--target", "cpu"), "try: --tp with one of 1, 2, 4, 8, 16"),
        (("robobrain2-7b", "--tp", "8", "--target", "cpu"), "'num_attention_heads' = 28 is no multiple of 8"),
        (("qwen3", "--tp", "2,4", "--target", "cpu"), "a bundle is for one number of ranks\n  where: --tp 2,4"),
        (("--graphs", "graphs.jsonl", "--tp", "2", "--target", "cpu"), "--graphs compiles what a server recorded"),
        (("qwen3",), "no target is named"),
        (("--graphs", "graphs.jsonl", "--for", "vllm"), "--graphs compiles what a server recorded"),
        (("nowhere/config.json", "--for", "vllm"), "the model description cannot be read"),
    ],
)
def test_bad_input_is_one_error(flagtree: Flagtree, arguments: tuple[str, ...], says: str) -> None:
    ended = flagtree("compile", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err
    assert "Traceback" not in ended.err


def test_without_vllm_it_says_what_to_install(flagtree: Flagtree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    ended = flagtree("compile", "qwen3", "--for", "vllm")
    assert ended.code == 2
    assert NOT_INSTALLED in ended.err
    assert "pip install 'flagtree-toolkit[vllm]'" in ended.err
    assert "--graphs FILE" in ended.err


def test_the_help_has_an_example(flagtree: Flagtree) -> None:
    assert "--for vllm --tp 1,2" in " ".join(flagtree("compile", "--help").out.split())


def test_a_configuration_of_ones_own_is_handed_on_as_it_is(folder: Path) -> None:
    for name in (str(folder), str(folder / "config.json")):
        model = server_model(name)
        assert (model.config, model.dtype, model.name) == (CONFIG, "auto", "qwen3-32x3")
    deep = server_model(str(folder), layers=7, dtype="bf16")
    assert (deep.config["num_hidden_layers"], deep.dtype, deep.name) == (7, "bfloat16", "qwen3-32x3-7-layers-bfloat16")


def test_depth_reaches_a_text_model_inside(tmp_path: Path) -> None:
    inner = {**CONFIG, "layer_types": ["sliding", "full", "full"]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["Some"], "model_type": "some_vl", "text_config": inner}), encoding="utf-8")
    model = server_model(str(path), layers=5)
    assert model.config["text_config"]["num_hidden_layers"] == 5
    assert model.config["text_config"]["layer_types"] == ["sliding", "full", "full", "sliding", "full"]
    with pytest.raises(UnknownName, match="dtype"):
        server_model(str(path), dtype="int8")
