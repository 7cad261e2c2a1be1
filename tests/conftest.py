"""What every test runs under: its own store, no network, errors raised where they happen, fixed seeds.

The environment is set for the whole session, so that subprocesses of a test see the same; a test that wants another value
uses `settings.override` or `monkeypatch.setenv`.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

SEED = 20_251_121

hypothesis.settings.register_profile("sample", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.register_profile("campaign", deadline=None, derandomize=True, database=None, max_examples=2000)


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("markexpr")
    hypothesis.settings.load_profile("campaign" if "full" in asked and "not full" not in asked else "sample")


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private store, compilers' own caches beside it, and nothing from the user's shell that changes what is compiled."""
    caches: Path = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FLAGTREE_") and name != "FLAGTREE_TRITON31_PYTHON"]:
            patch.delenv(name)
        patch.setenv("FLAGTREE_CACHE_DIR", str(caches / "flagtree"))
        patch.setenv("FLAGTREE_ON_ERROR", "raise")
        patch.setenv("TRITON_CACHE_DIR", str(caches / "triton"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRANSFORMERS_OFFLINE", "1")
        yield


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for a test whatever ran before it."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the checkout."""
    return Path(__file__).resolve().parent.parent
