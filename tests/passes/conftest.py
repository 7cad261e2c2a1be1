"""The option that rewrites expectations of the pass files: `pytest tests/passes --accept`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", default=False, help="rewrite the expectations of tests/passes/**/*.ir")
