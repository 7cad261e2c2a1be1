"""The collector of the pass tests that are text files: tests/passes/<pass>/*.ir, format and checks in pass_file.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagtree.passes.pipeline import parse_pipeline
from flagtree.targets import find_target
from tests.passes.pass_file import check, read

HERE = Path(__file__).resolve().parent
FILES = sorted(HERE.glob("*/*.ir"))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(HERE)) for p in FILES])
def test_pass_file(path: Path, request: pytest.FixtureRequest) -> None:
    file = read(path)
    check(file, parse_pipeline, find_target(file.target), request.config.getoption("--accept", default=False))
