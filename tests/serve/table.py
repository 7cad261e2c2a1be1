"""The page of a campaign of the real engine, from the beds that ENGINE_BEDS kept: `python -m tests.serve.table BEDS > engine.md`.

Says nothing that is not in the beds: a cell without a number was not run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flagtree.artifact.bundle import open_bundle
from flagtree.artifact.recording import read_recorded
from tests.serve.architectures import ARCHITECTURES
from tests.serve.bed import furthest
from tests.serve.fused import fused

HEADERS = {
    "plain": ("fp32, one process", ["eager: 8 x 48 ids", "recorded", "single operators", "strict, first", "strict, second", "compilers run",
                                    "Dynamo graphs", "ATen calls generated"]),
    "two": ("fp32, tensor parallel 2", ["recorded", "strict, first", "compilers run"]),
    "bf16": ("bf16, teacher-forced", ["one rank", "eager with 1 and 2 threads", "two ranks", "sequences with equal ids"]),
}  # fmt: skip


def read(bed: Path, name: str) -> dict[str, Any]:
    path = bed / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def against(have: Any, want: Any) -> str:
    """Sequences with equal ids, and how far log-probabilities lie apart."""
    if not have or not want:
        return ""
    return f"{_equal(have['ids'], want['ids'])}, {furthest(have['logprobs'], want['logprobs']):.1e}"


def _equal(have: list[list[int]], want: list[list[int]]) -> str:
    return f"{sum(a == b for a, b in zip(have, want, strict=True))}/{len(want)}"


def plain(bed: Path) -> list[str]:
    lenient, first, second = (read(bed, name) for name in ("lenient", "first", "second"))
    eager = lenient.get("eager")
    runs = [lenient.get("off"), lenient.get("operators"), first.get("strict"), second.get("strict")]
    cells = [f"{len({i for ids in eager['ids'] for i in ids})} different ones" if eager else "", *(against(run, eager) for run in runs)]
    starts = [r for r in (first, second) if r]
    compilers = ", ".join(str(r["compilers"]) for r in starts)
    graphs = ", ".join(str(r["strict"]["reports"][0]["dynamo"].get("stats", {}).get("unique_graphs", 0)) for r in starts)
    return [*cells, compilers, graphs, share(bed)]


def share(bed: Path) -> str:
    """Generated calls of all, and what is left to the library."""
    bundle = bed / "bundles" / "graphs-cpu"
    if not bundle.exists():
        return ""
    found = fused(read_recorded(bed / "graphs.jsonl")[-1], open_bundle(bundle))
    left = ", ".join(f"{n} {name}" for name, n in sorted(found.left.items()))
    return f"{found.calls.total() - found.left.total()} of {found.calls.total()}" + (f" (left: {left})" if left else "")


def two(bed: Path) -> list[str]:
    lenient, first = read(bed, "lenient"), read(bed, "first")
    runs = [against(r, lenient.get("eager")) for r in (lenient.get("off"), first.get("strict"))]
    return [*runs, str(first.get("compilers", ""))]


def bf16(bed: Path) -> list[str]:
    """Also of the bed beside it, whose server has two ranks."""
    one, two = read(bed, "bf16"), read(bed.with_name(bed.name.replace("-bf16", "-two_bf16")), "bf16")
    pairs = [(one, "ours"), (one, "other"), (two, "ours")]
    apart = (f"{furthest(found[run]['taught'], found['plain']['taught']):.3g}" if found else "" for found, run in pairs)
    return [*apart, ", ".join(_equal(found["ours"]["ids"], found["plain"]["ids"]) for found in (one, two) if found)]


def lines(beds: Path) -> Iterator[str]:
    yield "# The real engine against its own eager mode\n"
    yield "8 prompts of mixed length in one batch, 48 greedy tokens, chunked prefill, prefix caching; images where the model sees.  A cell:"
    yield "sequences with equal ids, and the greatest difference of a log-probability.  Empty: not run.\n"
    for name, (title, columns) in HEADERS.items():
        yield f"## {title}\n"
        yield f"| | {' | '.join(columns)} |"
        yield f"|{' --- |' * (len(columns) + 1)}"
        for kind in ARCHITECTURES:
            yield f"| {kind} | {' | '.join({'plain': plain, 'two': two, 'bf16': bf16}[name](beds / f'{kind}-{name}'))} |"
        yield ""
    yield "Made by `python -m tests.serve.table BEDS`."


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]))))
