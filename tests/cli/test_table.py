"""The tables that `flagtree compile` prints: every column, at a narrow and a wide terminal, and nothing claimed that nobody told."""

import io

import pytest
from rich.console import Console

from flagtree.check.report import BundleReport, CompileReport, KernelRow, PartReport
from flagtree.cli.table import print_report, short_ops, size, stored_report
from flagtree.ir.program import UNBOUNDED
from tests.cli.reports import NORM, report


def printed(shown: CompileReport, width: int) -> str:
    out = io.StringIO()
    print_report(shown, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_every_fact_is_there_and_no_line_is_too_wide(width: int) -> None:
    text = printed(report(), width)
    assert max(map(len, text.splitlines())) <= width
    for heading in ("kernel", "fused ops", "tier", "runs", "before", "after", "regs", "shared", "extern", "reason", "calls", "bytes"):
        assert heading in text
    for fact in ("add_rms_norm", "352 MB", "67.1 MB", "512 B", "aten.linear.default", "gemm", "25.1 GB", "288 calls", "73 launches",
                 "batch 1 to 64", "tokens 1 to 40960 in steps of 8", "399 by name", "3 maca-ir (emulated)", "mcfatbin", "9f" * 32,
                 "qwen3-metax", "capture 9.4 s"):
        assert fact in text, fact


def test_numbers_keep_their_units_at_80_columns() -> None:
    rows = tuple(KernelRow(name, "a" * 64, "prefill", 36, NORM, "binary", "", 352_400_000, 67_100_000, 40, None, 2048)
                 for name in ("post_attention_layernorm", "input_layernorm"))
    part = PartReport("prefill", "cuda:sm90", rows, (), launches_total=72, weights=0)
    text = printed(CompileReport("m", (BundleReport("cuda:sm90", "/b", "c" * 64, (part,), {"binary": 2}),)), 80)
    assert text.count("67.1 MB    40  2.05 kB\n") == 2
    assert " shared\n" in text


def test_what_nobody_told_is_a_dash_and_not_a_zero() -> None:
    part = report().bundles[0].parts[0]
    rows = [line.split() for line in printed(report(), 80).split("qwen3 prefill for cuda")[0].splitlines()]
    assert next(row for row in rows if row[:1] == ["silu_mul"])[-1] == "-", part.kernels[1]
    row = KernelRow("k0", "a" * 64, "decode", 1, ("aten.add.Tensor",), "source", "", 8, 4)
    part = PartReport("decode", "metax", (row,), (), launches_total=1, weights=0)
    text = printed(CompileReport("m", (BundleReport("metax", "/b", "c" * 64, (part,), {"source": 1}),)), 80)
    assert "regs" not in text
    assert "shared" not in text
    assert "executed  nothing" in text
    assert "extern  " not in text.splitlines()[1]


def test_names_are_text_and_never_markup() -> None:
    row = KernelRow("[red]k[/red]", "a" * 64, "decode", 1, ("aten.add[bold].x",), "source", "needs [link]", 8, 4)
    part = PartReport("decode", "metax", (row,), (), launches_total=1, weights=0)
    text = printed(CompileReport("m", (BundleReport("metax", "/[b]", "c" * 64, (part,), {"source": 1}),)), 140)
    assert "[red]k[/red]" in text
    assert "needs [link]" in text
    assert "/[b]" in text


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (3_024_000_000, "3.02 GB"), (None, "-"),
     (16_381_470_720_000, "16.4 TB")],
)
def test_sizes_have_three_digits_in_powers_of_a_thousand(count: int | None, shown: str) -> None:
    assert size(count) == shown


def test_ops_are_short_and_neighbours_counted() -> None:
    assert short_ops(("aten.mul.Tensor", "aten.mul.Scalar", "aten.add.Tensor", "aten.mul.Tensor", "plain")) == "mul×2, add, mul, plain"
    assert short_ops(()) == ""


def test_the_report_in_a_launch_list_is_found_or_not_there() -> None:
    part = report().bundles[0].parts[0]
    assert stored_report({"report": part.to_dict()}) == part
    assert stored_report({"steps": []}) is None
    assert stored_report({"report": {"name": 1}}) is None


def test_a_bound_that_is_none_is_not_printed_as_a_number() -> None:
    symbols = {"n": (1, 8192, 8), "a": (-UNBOUNDED, UNBOUNDED, 1), "b": (2, UNBOUNDED, 1), "c": (-UNBOUNDED, 7, 1), "d": (-3, 3, 1)}
    part = PartReport("decode", "cpu", (), (), launches_total=0, weights=0, symbols=symbols)
    text = printed(CompileReport("m", (BundleReport("cpu", "/b", "c" * 64, (part,), {}),)), 140)
    assert "covers  n 1 to 8192 in steps of 8, any a, b from 2, c up to 7, d -3 to 3\n" in text
