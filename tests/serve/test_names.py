"""The names that a server gives as its compiler, looked up beside a stand-in of the one function of vLLM that they read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flagtree.artifact.bundle import write_bundle
from flagtree.errors import FlagtreeError, UntrustedBundle
from flagtree.serve import bundles

Current = Callable[..., None]


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Current:
    """Make a configuration of vLLM current; keywords change it."""

    def make(flagtree: Any = None, **changes: Any) -> None:
        values = {"mode": 2, "custom_ops": ["none"], "lora": None, "degree": 1} | changes
        config = SimpleNamespace(
            additional_config={"flagtree": flagtree} if flagtree is not None else {},
            compilation_config=SimpleNamespace(mode=values["mode"], custom_ops=values["custom_ops"]),
            lora_config=values["lora"],
            model_config=SimpleNamespace(architectures=["Decoder"], dtype=torch.float32),
            parallel_config=SimpleNamespace(tensor_parallel_size=values["degree"]),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        )
        module = ModuleType("vllm.config")
        module.get_current_vllm_config_or_none = lambda: config  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm.config", module)

    monkeypatch.delitem(sys.modules, "vllm.config", raising=False)
    return make


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[str, str]:
    """A bundle without graphs: what is refused by name needs none."""
    path = tmp_path / "empty"
    digest = write_bundle(path, name="empty", target="cpu", parts={}, kernels=[], versions={"torch": torch.__version__})
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
