"""The matrix: five models at full size for every kind of target; what a build costs cold and warm, and whether two builds are one.

    python benchmarks/matrix.py [MODEL ...] [--target T ...]     measures these (all by default) and writes the table again

Each cell is what `tests/main_job/test_matrix.py` asserts, in processes and folders of its own: a cold build with one worker, a warm run,
a second cold build with two workers and another hash seed.  Cells are kept in benchmarks/results/matrix.json with the commit measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from measure import ROOT, conditions, rows, write

sys.path.insert(0, str(ROOT))
from tests.main_job.conftest import TARGETS, Place, content
from tests.main_job.test_matrix import MODELS, cold

RESULT = ROOT / "benchmarks" / "results" / "matrix.md"
HEADER = ("model", "target", "cold, CPU s", "memory, GB", "warm, CPU s", "kernels", "tiers", "executed", "externs left", "two builds",
          "commit")  # fmt: skip


def measured(model: str, target: str) -> dict[str, Any]:
    """One cell."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (Place(Path(folder) / name, ROOT) for name in ("first", "second"))
        for place in (first, second):
            place.folder.mkdir()
        (bundle,), seconds, peak = cold(first, model, "--target", target, "-j", "1", PYTHONHASHSEED="1")
        warm = first.run("compile", model, "--target", target, "--json")
        (again,), other, _ = cold(second, model, "--target", target, "-j", "2", PYTHONHASHSEED="2")
        equal = again["digest"] == bundle["digest"] and content(Path(bundle["path"])) == content(Path(again["path"]))
        size = sum(len(data) for data in content(Path(bundle["path"])).values())
    externs: Counter[str] = Counter()
    for part in bundle["parts"]:
        for row in part["externs"]:
            externs[row["callee"].removesuffix(".default")] += row["count"]
    return {
        "model": model, "target": target, "cpu": seconds, "cpu_again": other, "peak": peak, "warm": warm.cpu,
        "kernels": bundle["kernels"],
        "cached": json.loads(warm.out)["bundles"][0]["cached"], "tiers": bundle["tiers"], "executed": bundle["executed"],
        "externs": externs,
        "equal": equal, "bytes": size, "phases": bundle["seconds"], "commit": commit(),
    }  # fmt: skip


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def line(cell: dict[str, Any]) -> list[object]:
    return [
        cell["model"], cell["target"], f"{cell['cpu']:.0f}, {cell['cpu_again']:.0f}", f"{cell['peak'] / 1e9:.2f}",
        f"{cell['warm']:.2f}", cell["kernels"],
        told(cell["tiers"]), told(cell["executed"]), told(cell["externs"]), "equal" if cell["equal"] and cell["cached"] else "NOT EQUAL",
        cell["commit"],
    ]  # fmt: skip


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def report(cells: dict[str, dict[str, Any]]) -> str:
    order = [cells[key] for model in MODELS for target in TARGETS if (key := f"{model} {target}") in cells]
    return "\n\n".join([
        "# The matrix: five models at full size, four kinds of target",
        conditions(),
        "Every part of a model, every kernel executed once for the certificate. Cold: an empty home and store, one worker, then two; "
        "memory: the most that all processes held together, shared pages counted for each. Bounds: 120 CPU s, 4 GB, 5 s.",
        rows(HEADER, map(line, order)),
        "Made by `python benchmarks/matrix.py`.\n",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--target", action="append", default=None)
    asked = parser.parse_args()
    data = RESULT.with_suffix(".json")
    cells = json.loads(data.read_text()) if data.exists() else {}
    for model in asked.models:
        for target in asked.target or TARGETS:
            cell = cells[f"{model} {target}"] = measured(model, target)
            print(*line(cell), json.dumps(cell["phases"]), flush=True)
            write(RESULT, report(cells), cells)


if __name__ == "__main__":
    main()
