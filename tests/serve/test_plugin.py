"""The door for single operators over a stand-in of vLLM's registry of classes out of tree; the real one runs in test_doors_engine.py."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from flagtree.errors import FlagtreeError
from flagtree.serve import plugin
from flagtree.serve.counts import COUNTS
from flagtree.serve.operators import FORMULAS, _shared
from flagtree.settings import settings
from tests.serve.conftest import Current


class CustomOp:
    """vLLM's base class, as far as a class out of tree meets it: the registry is asked when a layer is made."""

    name = ""
    known: ClassVar[dict[str, type]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(CustomOp.known.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, ours: type, name: str) -> None:
        assert name not in CustomOp.known, f"Duplicate op name: {name}"
        CustomOp.known[name] = ours


class RMSNorm(CustomOp):
    name = "rms_norm"

    def __init__(self, width: int) -> None:
        self.weight, self.variance_epsilon, self.has_weight = torch.nn.Parameter(torch.randn(width)), 1e-6, True
        self.variance_size_override: int | None = None

    def forward_cpu(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> str:
        return "theirs"

    forward_cuda = forward_oot = forward_cpu


class SiluAndMul(CustomOp):
    name = "silu_and_mul"

    def forward_cpu(self, x: torch.Tensor) -> str:
        return "theirs"

    forward_cuda = forward_oot = forward_cpu


class Gelu(SiluAndMul):
    name = "gelu_and_mul"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM's modules that `register` reads; the classes that it would replace are those above, and one is not there."""
    registry = ModuleType("vllm.model_executor.custom_op")
    registry.CustomOp, registry.op_registry_oot = CustomOp, CustomOp.known  # type: ignore[attr-defined]
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_out_of_tree=lambda: False)  # type: ignore[attr-defined]
    layers = {"layernorm": {"RMSNorm": RMSNorm}, "activation": {"SiluAndMul": SiluAndMul, "GeluAndMul": Gelu}, "rotary_embedding": {}}
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (registry, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, classes in layers.items():
        module = ModuleType(f"vllm.model_executor.layers.{name}")
        module.__dict__.update(classes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    CustomOp.known.clear()
    _shared.cache_clear()
    return registry


def test_a_layer_is_ours_where_the_settings_ask(vllm: ModuleType, current: Current) -> None:
    plugin.register()
    plugin.register()  # vLLM calls it in each process, and more than once
    assert CustomOp.known.keys() == {"RMSNorm", "SiluAndMul", "GeluAndMul"}
    assert "none" in COUNTS.aside["RotaryEmbedding"]
    current({"custom_ops": True}, mode=0)
    norm, plain = RMSNorm(32), SiluAndMul()
    current({}, mode=0)
    left = SiluAndMul()
    x = torch.randn(5, 32)
    with settings.override(jobs=1):
        torch.testing.assert_close(norm.forward_cpu(x), FORMULAS["rms_norm"](x, norm.weight.data, 1e-6))
        assert left.forward_cpu(x) == "theirs"
        norm.variance_size_override = 16
        assert norm.forward_cpu(x) == "theirs"  # no formula covers it
        assert plain.forward_cpu(x.to("meta")) == "theirs"
    assert COUNTS.operators == {"RMSNorm": 1, "SiluAndMul": 1}
    assert "norms" in COUNTS.doors[plugin.DOOR]


def test_what_another_plug_in_registered_first_stays_theirs(vllm: ModuleType, current: Current, caplog: pytest.LogCaptureFixture) -> None:
    theirs = type("TheirNorm", (RMSNorm,), {"__module__": "another_plugin"})
    CustomOp.register_oot(theirs, "RMSNorm")
    with caplog.at_level(logging.INFO, "vllm.flagtree"):
        plugin.register()
    assert CustomOp.known["RMSNorm"] is theirs
    assert COUNTS.aside["RMSNorm"] == "another_plugin registered it first"
    assert "RMSNorm is left alone: another_plugin registered it first" in caplog.text
    assert "SiluAndMul" in CustomOp.known


def test_on_a_platform_out_of_tree_its_owner_replaces(vllm: ModuleType) -> None:
    sys.modules["vllm.platforms"].current_platform.is_out_of_tree = lambda: True  # type: ignore[attr-defined]
    plugin.register()
    assert CustomOp.known == {}
    assert COUNTS.aside.keys() == plugin.REPLACED.keys()


def test_a_vllm_without_a_registry_is_one_line(vllm: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    del vllm.op_registry_oot
    with caplog.at_level(logging.WARNING, "vllm.flagtree"):
        plugin.register()
    assert [r.message.count("no registry for operators out of tree") for r in caplog.records] == [1]


def test_a_vllm_without_settings_is_left_alone(vllm: ModuleType, current: Current) -> None:
    """Who installed us beside an old vLLM asked nothing: every layer stays theirs, and it is said once."""
    plugin.register()
    del current({}).additional_config
    assert [RMSNorm(8).forward_cpu(torch.ones(1, 8)) for _ in range(2)] == ["theirs", "theirs"]
    assert COUNTS.aside[plugin.DOOR] == "this vLLM has no additional_config"


@pytest.mark.parametrize("changes", [{"mode": 0, "lora": object()}, {"mode": 0}, {"mode": 2, "backend": "inductor"}])
def test_a_bundle_that_nobody_would_ask_stops_a_strict_start(vllm: ModuleType, current: Current, changes: dict[str, Any]) -> None:
    """LoRA and `enforce_eager` switch compilation off, and vLLM then never looks the compiler's name up."""
    plugin.register()
    current({"bundle": "b"}, **changes)
    with pytest.raises(FlagtreeError, match="no door leads to it"):
        RMSNorm(8)
    current({"bundle": "b", "strict": "off"}, **changes)
    assert RMSNorm(8).forward_cpu(torch.ones(1, 8)) == "theirs"
    assert "compile mode" in COUNTS.aside["the whole graph"]


def test_strict_serving_quiets_helpers_where_no_graph_comes(vllm: ModuleType, current: Current, tmp_path: Any) -> None:
    from tests.serve.test_agreement import FACTS, write

    path, digest = write(tmp_path / "b", {**FACTS, "sizes": "", "vllm": ""})
    plugin.register()
    current({"bundle": path, "digest": digest, "custom_ops": True, "strict": "paranoid"}, mode=0)
    RMSNorm(8)
    with pytest.raises(RuntimeError, match="recompile"):
        torch.compile(lambda x: x - 3, backend="eager")(torch.ones(2))
