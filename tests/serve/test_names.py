"""The names that a server gives as its compiler, looked up beside a stand-in of the one function of vLLM that they read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flagtree.artifact.bundle import write_bundle
from flagtree.errors import FlagtreeError, UntrustedBundle
from flagtree.serve import bundles
from flagtree.serve.counts import COUNTS
from tests.serve.conftest import Current


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[str, str]:
    """A bundle without kernels: what is refused by name needs none."""
    path = tmp_path / "empty"
    graph = {"key": "0" * 64, "facts": {}, "versions": {}, "results": []}
    launch = {"format": 1, "name": "g", "symbols": [], "buffers": [], "outputs": [], "steps": []}
    versions = {"torch": torch.__version__}
    coverage = {"g": {"graph": graph}}
    digest = write_bundle(path, name="empty", target="cpu", parts={"g": launch}, kernels=[], versions=versions, coverage=coverage)
    return str(path), digest


def test_the_plain_name_is_torch_compiles_own(current: Current) -> None:
    assert torch.compile(lambda x: x * 2, backend=bundles.flagtree)(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


def test_the_plain_name_binds_nothing_of_a_server(current: Current, bundle: tuple[str, str]) -> None:
    current({"bundle": bundle[0]})
    with pytest.raises(FlagtreeError, match="cannot bind") as raised:
        _ = bundles.flagtree
    assert raised.value.hint == f"-cc.backend=flagtree.serve.bundles.d_{bundle[1]}"
    current({"record": "graphs.jsonl"})
    with pytest.raises(FlagtreeError, match="cannot bind") as raised:
        _ = bundles.flagtree
    assert raised.value.hint == "-cc.backend=flagtree.serve.bundles.store"
    current()
    assert bundles.flagtree is bundles.plain


def test_the_digest_in_the_name_is_what_the_bundle_must_be(current: Current, bundle: tuple[str, str]) -> None:
    current({"bundle": bundle[0]})
    name = bundles.qualified(f"sha256:{bundle[1].upper()}").rpartition(".")[2]
    assert getattr(bundles, name) is getattr(bundles, name)  # looked up once for each decorated class
    with pytest.raises(UntrustedBundle, match="not the one"):
        getattr(bundles, f"d_{'0' * 64}")
    current({"bundle": bundle[0], "digest": "1" * 64})
    with pytest.raises(FlagtreeError, match="two digests"):
        getattr(bundles, name)
    current({})
    with pytest.raises(FlagtreeError, match="no bundle is named"):
        getattr(bundles, name)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"mode": 3}, "-cc.mode=2"),
        ({"mode": None}, "-cc.mode=2"),
        ({"custom_ops": ["all"]}, "custom_ops"),
        ({"lora": object()}, "LoRA is on"),
    ],
)
def test_what_a_whole_graph_cannot_work_with_is_said_at_the_look_up(current: Current, changes: dict[str, Any], what: str) -> None:
    current(None, **changes)
    for name in ("store", "flagtree"):
        with pytest.raises(FlagtreeError, match=what):
            getattr(bundles, name)


@pytest.mark.parametrize("name", ["d_", "d_12", f"d_{'g' * 64}", "store"])
def test_names_outside_of_a_server_or_malformed(current: Current, name: str) -> None:
    with pytest.raises(FlagtreeError):
        getattr(bundles, name)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError):
        _ = bundles.anything


def test_a_vllm_that_does_not_tell_its_configuration(current: Current, monkeypatch: pytest.MonkeyPatch) -> None:
    current()
    monkeypatch.delattr(sys.modules["vllm.config"], "get_current_vllm_config_or_none")
    with pytest.raises(FlagtreeError, match="this vLLM has no get_current_vllm_config_or_none"):
        _ = bundles.store


def test_the_door_says_what_it_took_over(current: Current, bundle: tuple[str, str]) -> None:
    current({"bundle": bundle[0], "strict": "serve"})
    bundles._once.cache_clear()
    getattr(bundles, f"d_{bundle[1]}")
    assert COUNTS.doors == {"the whole graph": f"from {bundle[0]}, digest {bundle[1][:16]}, strict 'serve'"}
    current()
    _ = bundles.flagtree
    assert COUNTS.doors == {"the whole graph": "from the store, strict 'off'"}


@pytest.mark.parametrize(("strict", "ahead", "compiled"), [("serve", True, 0), ("serve", False, 1), ("start", True, 1)])
def test_helpers_that_run_before_our_graph_stay_eager(
    current: Current, bundle: tuple[str, str], monkeypatch: pytest.MonkeyPatch, strict: str, ahead: bool, compiled: int
) -> None:
    """Where vLLM traces ahead; where it leaves tracing to torch our own graph would stay eager as well."""
    environment = ModuleType("vllm.envs")
    environment.VLLM_USE_AOT_COMPILE = ahead  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.envs", environment)
    current({"bundle": bundle[0], "strict": strict})
    assert getattr(bundles, f"d_{bundle[1]}")
    calls = []

    def count(module: torch.fx.GraphModule, inputs: object) -> object:
        calls.append(module)
        return module.forward

    assert torch.compile(lambda x: x + 1, backend=count)(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(calls) == compiled
