"""Our implementations in the dispatcher of vllm-plugin-FL, over a stand-in of the registry that it publishes (tests/serve/fl_dispatch.py).

The truth is the stand-in's own reference implementations, in f64.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flagtree.artifact.recording import read_recorded
from flagtree.graphs import compile_graphs
from flagtree.serve import dispatcher
from flagtree.serve.counts import COUNTS
from flagtree.settings import settings
from tests.serve import fl_dispatch
from tests.serve.conftest import Current
from tests.serve.fl_dispatch import BackendImplKind, Manager, OpImpl

OPERATORS = sorted(fl_dispatch.REFERENCE)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    return fl_dispatch.install(monkeypatch)


def arguments(name: str, layers: dict[str, Any], tokens: int, case: int) -> tuple:
    """The arguments that vllm-plugin-FL's layers hand over, in two forms each."""
    wide = torch.randn(tokens, 96)
    if name == "rms_norm":
        return (wide[:, 32:64], torch.randn(tokens, 32)) if case else (wide[:, :32].contiguous(),)
    if name == "rotary_embedding":
        heads = wide.view(tokens, 4, 24)[..., :16] if case else wide[:, :64].view(tokens, 4, 16)
        key = torch.randn(tokens, 2, 16)
        cos, sin = layers[name].table.chunk(2, dim=-1)
        return (heads, key, cos, sin, torch.randint(0, 40, (tokens,)), bool(case), True)
    return (wide,)


def check(manager: Manager, expected: str, layers: dict[str, Any], names: list[str]) -> None:
    for name in names:
        for tokens in (5, 1, 33):
            for case in (0, 1):
                args = arguments(name, layers, tokens, case)
                have, want = manager.call(name, layers[name], *args), fl_dispatch.REFERENCE[name](layers[name], *args)
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
                assert manager.used[name] == expected


def test_recorded_by_a_lenient_server_and_answered_by_a_strict_one(manager: Manager, current: Current, tmp_path: Path) -> None:
    layers, recorded = fl_dispatch.layers(), tmp_path / "operators.jsonl"
    current({"custom_ops": True, "record": str(recorded)}, mode=0)
    dispatcher.register(manager.registry)
    dispatcher.register(manager.registry)  # each process of vLLM may ask again
    current.none()  # type: ignore[attr-defined]  # nothing is current when an operator is called
    with settings.override(jobs=1):
        check(manager, "default.flagtree", layers, OPERATORS)
    assert {k: COUNTS.operators[k] for k in OPERATORS} == dict.fromkeys(OPERATORS, 1)
    assert COUNTS.doors.keys() == {dispatcher.DOOR}
    assert len(read_recorded(recorded)) == COUNTS.graphs_missing > 4

    report = compile_graphs(read_recorded(recorded), ["cpu"], out=tmp_path, jobs=1).bundles[0]
    manager.registry.by_name.clear()
    missing = COUNTS.graphs_missing
    current({"custom_ops": True, "bundle": report.path, "digest": report.digest}, mode=0)
    dispatcher.register(manager.registry)
    current.none()  # type: ignore[attr-defined]
    check(manager, "default.flagtree", layers, OPERATORS)
    assert COUNTS.graphs_missing == missing
    with pytest.raises(SystemExit, match="the server needs a graph"):  # another error would pass to the next implementation
        manager.call("silu_and_mul", layers["silu_and_mul"], torch.randn(3, 40))
    assert COUNTS.missing[-1].startswith("operator silu_and_mul")


def test_where_nothing_asks_theirs_answer(manager: Manager, current: Current) -> None:
    current({}, mode=0)
    dispatcher.register(manager.registry)
    check(manager, "default.flagos", fl_dispatch.layers(), OPERATORS)
    assert COUNTS.aside.keys() == set(OPERATORS)
    assert COUNTS.operators == {}


def test_a_vllm_without_settings_is_left_alone(manager: Manager, current: Current) -> None:
    del current({}, mode=0).additional_config
    dispatcher.register(manager.registry)
    check(manager, "default.flagos", fl_dispatch.layers(), ["silu_and_mul"])


def test_its_own_settings_choose_between_implementations(manager: Manager, current: Current) -> None:
    current({"custom_ops": True}, mode=0)
    dispatcher.register(manager.registry)
    manager.order = {"silu_and_mul": ["reference"], "gelu_and_mul": ["impl:default.flagtree"]}
    with settings.override(jobs=1):
        check(manager, "reference.torch", fl_dispatch.layers(), ["silu_and_mul"])
        check(manager, "default.flagtree", fl_dispatch.layers(), ["gelu_and_mul"])


def test_we_step_aside_for_what_stands_above_us(manager: Manager, current: Current) -> None:
    current({"custom_ops": True}, mode=0)
    theirs = OpImpl("rms_norm", "default.other", BackendImplKind.DEFAULT, fl_dispatch.rms_norm, priority=200)
    manager.registry.register_impl(theirs)
    dispatcher.register(manager.registry)
    assert "default.flagtree" not in manager.registry.by_name["rms_norm"]
    assert "default.other registered it first" in COUNTS.aside["rms_norm"]
    assert "default.flagtree" in manager.registry.by_name["silu_and_mul"]


@pytest.mark.parametrize(
    ("given", "says"),
    [({"custom_op": True}, "closest: custom_ops"), ({"custom_ops": True, "bundle": "nowhere"}, "nowhere")],
)
def test_wrong_settings_end_the_process(manager: Manager, current: Current, given: dict, says: str) -> None:
    current(given, mode=0)
    with pytest.raises(SystemExit, match=says):
        dispatcher.register(manager.registry)


def test_another_form_of_rotary_is_left_to_the_next(manager: Manager, current: Current) -> None:
    current({"custom_ops": True}, mode=0)
    dispatcher.register(manager.registry)
    manager.strict = True
    layer = fl_dispatch.layers()["rotary_embedding"]
    cos, sin = layer.table.chunk(2, dim=-1)
    with pytest.raises(NotImplementedError, match="4 dimensions"):
        manager.call("rotary_embedding", layer, torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), cos, sin, torch.zeros(1, 3).long())
    assert "4 dimensions" in COUNTS.aside["rotary_embedding"]


def test_another_registry_is_one_line(manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(sys.modules["vllm_fl.dispatch.types"], "OpImpl")
    with caplog.at_level(logging.WARNING, "flagtree"), caplog.at_level(logging.WARNING, "vllm.flagtree"):
        dispatcher.register(manager.registry)
    assert [r.message.count("another registry than we know") for r in caplog.records] == [1]
    assert all("default.flagtree" not in known for known in manager.registry.by_name.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_within_a_trace_the_graph_holds_what_is_computed(manager: Manager, current: Current, name: str) -> None:
    """vLLM may compile the layer around it: nothing of ours is called, bound or counted then."""
    current({"custom_ops": True}, mode=2)
    dispatcher.register(manager.registry)
    run, layer = manager.registry.by_name[name]["default.flagtree"].fn, fl_dispatch.layers()[name]
    args = arguments(name, {name: layer}, 5, 0)
    torch._dynamo.reset()
    with torch.inference_mode():
        have = torch.compile(lambda *a: run(layer, *a), backend="eager", fullgraph=True)(*args)
    torch.testing.assert_close(have, fl_dispatch.REFERENCE[name](layer, *args), rtol=1e-5, atol=1e-5)
    assert COUNTS.operators == {}
