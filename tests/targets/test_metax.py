"""The target metax: facts with a source, names, and a probe that tells what this machine has and lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagtree.settings import settings
from flagtree.targets import find_target, metax, stock_triton


def test_names_and_limits() -> None:
    target = find_target("metax")
    assert all(find_target(name) is target for name in ("maca", "c500", "C550"))
    assert (target.warp, target.max_threads, target.shared_bytes, target.triton) == (64, 512, 65536, ("maca", 80, 64))
    assert target.tiers[-2:] == ("llir", "binary") and not {"f8e4m3fn", "f8e5m2"} & target.dtypes
    assert {"warp", "max_threads", "shared_bytes", "row_limit", "dtypes", "triton"} <= set(target.facts_from)


def test_the_probe_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with settings.override(maca_path=None):
        reach = metax.probe()
        assert reach.tier == "llir" and "mxcc" in reach.missing and "finalize" in reach.how
        assert reach.missing.endswith("MACA_PATH is not set")
    with settings.override(maca_path=tmp_path):
        assert "is not below it" in metax.probe().missing
        (tmp_path / metax.SDK_COMPILER).parent.mkdir(parents=True)
        (tmp_path / metax.SDK_COMPILER).touch()
        assert metax.sdk_compiler() == tmp_path / metax.SDK_COMPILER
        reach = metax.probe()
        assert reach.tier == "llir" and reach.missing.endswith("MetaX's SDK is here") and "`flagtree finalize BUNDLE`" in reach.how
    for version, why in ((None, "not installed"), ("3.5.1", "3.5.1"), ("3.11.0", "3.11.0")):
        monkeypatch.setattr(stock_triton, "installed", lambda version=version: version)
        reach = metax.probe()
        assert reach.tier == "source" and why in reach.missing and "pip install" in reach.how and not reach.executes
