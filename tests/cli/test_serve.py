"""`serve` puts vLLM's command together, trusts no bundle that was not built here, and lets nobody choose twice.  Starts no server."""

import json
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from flagtree.artifact.bundle import open_bundle, write_bundle
from flagtree.artifact.trust import record_built
from tests.cli.conftest import Flagtree


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "store"))
    versions = {"torch": torch.__version__}
    launch = {"format": 1, "name": "graph", "symbols": [], "outputs": [], "buffers": [], "steps": []}
    write_bundle(
        tmp_path / "graphs", name="graphs", target="cpu", parts={"graph": launch}, kernels=[], versions=versions, coverage={"graph": {}}
    )
    return tmp_path / "graphs"


def test_the_command_binds_the_bundle_by_its_digest(flagtree: Flagtree, bundle: Path) -> None:
    digest = open_bundle(bundle).digest
    record_built(digest)
    ended = flagtree("serve", "my model", "--bundle", str(bundle), "--show", "--port", "8001")
    assert ended.code == 0, ended.err
    words = shlex.split(ended.out)
    assert words[:2] == ["VLLM_USE_MEGA_AOT_ARTIFACT=0", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"]  # of the shell's words for a command
    assert words[3:7] == ["-m", "flagtree.serve.launch", "serve", "my model"]
    assert f"-cc.backend=flagtree.serve.bundles.d_{digest.removeprefix('sha256:')}" in words
    assert json.loads(words[words.index("--additional-config") + 1]) == {"flagtree": {"bundle": str(bundle), "strict": "serve"}}
    assert words[-2:] == ["--port", "8001"]


def test_a_variable_that_the_user_has_set_stays(flagtree: Flagtree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    words = shlex.split(flagtree("serve", "model", "--record", "graphs.jsonl", "--show").out)
    assert words[:2] == ["VLLM_USE_MEGA_AOT_ARTIFACT=0", "GLIBC_TUNABLES=glibc.malloc.arena_max=2"]


def test_a_bundle_of_another_machine_needs_its_digest(flagtree: Flagtree, bundle: Path) -> None:
    ended = flagtree("serve", "model", "--bundle", str(bundle), "--show")
    assert ended.code == 2
    assert ended.out == ""
    assert flagtree("serve", "model", "--bundle", str(bundle), "--show", "--trust", open_bundle(bundle).digest).code == 0


def test_a_recording_start_needs_no_bundle(flagtree: Flagtree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(flagtree("serve", "model", "--record", "graphs.jsonl", "--show").out)
    settings = json.loads(words[words.index("--additional-config") + 1])["flagtree"]
    assert settings == {"strict": "off", "record": str(tmp_path / "graphs.jsonl")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model",), "nothing to serve from"),
        (("model", "--bundle", "b", "--record", "r"), "two ways to start"),
        (("model", "--bundle", "b", "--strict", "of"), "unknown strictness 'of'"),
        (("model", "--bundle", "nowhere", "--port", "0"), "nowhere"),
        (("model", "--record", "r", "-cc.mode=3"), "flagtree sets this itself"),
        (("model", "--record", "r", "--compilation-config", "{}"), "flagtree sets this itself"),
        (("--port", "80", "model", "--record", "r"), "the model comes first"),
    ],
)
def test_a_mistake_is_explained(flagtree: Flagtree, arguments: Sequence[str], said: str) -> None:
    ended = flagtree("serve", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("option", ["--port {}", "--port={}", "--port 1 --host 127.0.0.1 --port {}"])
def test_a_port_in_use_is_said_before_vllm_starts(flagtree: Flagtree, tmp_path: Path, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = flagtree("serve", "model", "--record", str(tmp_path / "r"), *option.format(port).split())
    assert ended.code == 2
    assert f"the server cannot listen on port {port}" in ended.err
    assert "Address already in use" in ended.err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "there is no such model"),
        ("", "the folder holds no model"),
        ('{"architectures": ["Qwen3ForCausalLM"]}', "the bundle has no graph of a server"),
    ],
)
def test_a_wrong_model_or_bundle_is_said_before_vllm_starts(
    flagtree: Flagtree, bundle: Path, tmp_path: Path, config: str | None, said: str
) -> None:
    model = tmp_path / "model"
    if config is not None:
        model.mkdir()
        (model / "config.json").write_text(config)
    ended = flagtree("serve", str(model), "--bundle", str(bundle), "--trust", open_bundle(bundle).digest, "--port", "0")
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
