"""A resumable run of the whole campaign: `python -m pytest -m full -p tests.campaign --campaign FILE`.

FILE (JSON lines) gets each result as it comes, with the commit that it measured; what passed on the same commit is not run again.
At the end a table of all results on this commit lies beside it (`.md`): that table is what benchmarks/results/ keeps.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

OUTCOMES = ("passed", "skipped", "failed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", metavar="FILE", type=Path, help="keep results in FILE and run only what has not passed on this commit")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--campaign")
    if path is not None:
        config.pluginmanager.register(Campaign(path, _commit(config.rootpath)), "campaign")


def _commit(repository: Path) -> str:
    """The commit of the checkout; changes that are not committed are named, for a table must not claim a commit that it did not measure."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "flagtree", "tests", "models")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")


class Campaign:
    """Results by test on one commit.  Under xdist only the controller writes."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path = path
        self.commit = commit
        self.results: dict[str, dict[str, Any]] = {}
        if path.exists():
            known = (json.loads(line) for line in path.read_text().splitlines())
            self.results = {r["test"]: r for r in known if r["commit"] == commit}
        self.writes = True

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.writes = not hasattr(session.config, "workerinput")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if self.results.get(item.nodeid, {}).get("outcome") in ("passed", "skipped")]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item not in set(done)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.writes or (report.outcome == "passed" and report.when != "call"):
            return
        result = {"commit": self.commit, "test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        self.results[report.nodeid] = result
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def pytest_sessionfinish(self) -> None:
        if self.writes and self.results:
            self.path.with_suffix(".md").write_text(self.table())

    def table(self) -> str:
        """Markdown: a row a test function, with its cases counted by outcome and the seconds that they took."""
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for name, result in self.results.items():
            rows[name.split("[")[0]].append(result)
        lines = [
            "# The whole campaign (`pytest -m full`)",
            "",
            f"* commit {self.commit}; written {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
            f"* {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
            "* `python -m pytest -m full -p tests.campaign --campaign FILE`; seconds of wall clock, summed over the cases",
            "",
            f"| test | cases | {' | '.join(OUTCOMES)} | seconds |",
            "|---|" + "---|" * (len(OUTCOMES) + 2),
        ]
        for name in sorted(rows):
            lines.append(_row(name, rows[name]))
        lines.append(_row("all", list(self.results.values())))
        failed = [name for name, result in self.results.items() if result["outcome"] == "failed"]
        return "\n".join([*lines, "", *(f"* failed: `{name}`" for name in failed)]).rstrip() + "\n"


def _row(name: str, results: list[dict[str, Any]]) -> str:
    counts = [sum(r["outcome"] == outcome for r in results) for outcome in OUTCOMES]
    return f"| {name} | {len(results)} | {' | '.join(map(str, counts))} | {sum(r['seconds'] for r in results):.0f} |"
