"""The compile report as data: totals, canonical JSON, and that JSON gives the report back."""

import json

import pytest

from flagtree.check.report import CompileReport
from tests.cli.reports import report


def test_totals_count_every_launch_and_keep_externs_apart() -> None:
    part = report().bundles[0].parts[0]
    assert part.bytes_before == 36 * 352_400_000 + 36 * 956_300_000 + 33_600_000
    assert part.bytes_after == 36 * 67_100_000 + 36 * 151_000_000 + 33_600_000
    assert (part.calls_extern, part.bytes_extern) == (252 + 36, 25_066_800_000 + 1_508_400_000)


def test_kernels_are_counted_by_digest() -> None:
    bundle = report().bundles[0]
    assert bundle.kernels == 3
    doubled = type(bundle)(bundle.target, bundle.path, bundle.digest, bundle.parts * 2, bundle.tiers)
    assert doubled.kernels == 3


def test_json_is_one_line_and_gives_the_report_back() -> None:
    text = report().to_json()
    assert "\n" not in text
    assert list(json.loads(text)["bundles"][0]["seconds"]) == ["capture", "passes", "kernels"]
    assert CompileReport.from_json(text) == report()
    assert json.loads(text)["bundles"][0]["parts"][0]["totals"]["calls_extern"] == 288


NOT_REPORTS = ("", "[]", "{}", '{"format": 2, "model": "m", "bundles": []}', '{"format": 1, "model": "m", "bundles": [{}]}')


@pytest.mark.parametrize("text", NOT_REPORTS)
def test_other_text_is_no_report(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        CompileReport.from_json(text)


def test_numbers_that_json_lacks_are_refused() -> None:
    bundle = report().bundles[0]
    broken = type(bundle)(bundle.target, bundle.path, bundle.digest, bundle.parts, bundle.tiers, {"capture": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        CompileReport("qwen3", (broken,)).to_json()
