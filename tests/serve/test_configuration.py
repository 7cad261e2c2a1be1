"""The settings of a server: strict reading, and where nothing is current."""

from __future__ import annotations

import re
from typing import Any

import pytest

from flagtree.errors import FlagtreeError
from flagtree.serve.configuration import ServeSettings, current_vllm_config, read_settings, serving_now

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("given", "strict"),
    [
        (None, "off"),
        ({}, "off"),
        ({"flagtree": None}, "off"),
        ({"flagtree": {}, "other": 1}, "off"),
        ({"flagtree": {"record": "graphs.jsonl"}}, "off"),
        ({"flagtree": {"bundle": "b"}}, "start"),
        ({"flagtree": {"bundle": "b", "strict": "off"}}, "off"),
        ({"flagtree": {"bundle": "b", "strict": "paranoid", "digest": f"sha256:{DIGEST}"}}, "paranoid"),
    ],
)
def test_a_named_bundle_is_strict(given: Any, strict: str) -> None:
    assert read_settings(given).strict == strict


@pytest.mark.parametrize(
    ("given", "where", "why"),
    [
        ("bundle", "additional_config.flagtree", "no object"),
        ({"bundel": "b"}, "additional_config.flagtree.bundel", "closest: bundle"),
        ({"bundle": 3}, "additional_config.flagtree.bundle", "valid string"),
        ({"bundle": "b", "strict": "always"}, "additional_config.flagtree.strict", "'off', 'start', 'serve' or 'paranoid'"),
        ({"bundle": "b", "digest": "abc"}, "additional_config.flagtree.digest", "pattern"),
        ({"strict": "start"}, "additional_config.flagtree", "needs a bundle"),
        ({"digest": DIGEST}, "additional_config.flagtree", "a digest without a bundle"),
        ({"custom_ops": "yes"}, "additional_config.flagtree.custom_ops", "valid boolean"),
    ],
)
def test_what_is_wrong_is_named(given: Any, where: str, why: str) -> None:
    with pytest.raises(FlagtreeError, match=re.escape(why)) as raised:
        read_settings({"flagtree": given})
    assert raised.value.where == where
    assert "--additional-config" in raised.value.hint


def test_settings_are_values() -> None:
    assert hash(ServeSettings(bundle="b")) == hash(ServeSettings(bundle="b", strict="start"))
    assert [ServeSettings(bundle="b", strict=s).quiets_helpers for s in ("off", "start", "serve", "paranoid")] == [False, False, True, True]


def test_without_a_server_nothing_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("vllm.config", "vllm.forward_context"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert current_vllm_config() is None
    assert serving_now() is False
