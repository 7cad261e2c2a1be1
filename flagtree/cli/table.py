"""A compile report as tables: kernels with bytes before and after fusion, externs apart, totals, where the bundle is.

Pure rendering of flagtree.check.report: adds up nothing that the report does not say, and prints a dash for what nobody told.
The commands `compile` and `inspect` print these on stdout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flagtree.check.report import BundleReport, CompileReport, ExternRow, KernelRow, PartReport

UNITS = ("B", "kB", "MB", "GB", "TB")


def print_report(report: CompileReport, console: Console) -> None:
    """Every bundle of the report, one after the other."""
    for bundle in report.bundles:
        console.print(Group(*(render_part(report.model, part) for part in bundle.parts)))
        print_facts(console, _facts(bundle))
        console.print()


def print_serving(report: CompileReport, console: Console) -> None:
    """How vLLM is told to use each bundle."""
    for bundle in report.bundles:
        name = f"flagtree.serve.bundles.d_{bundle.digest.removeprefix('sha256:')}"
        settings = json.dumps({"flagtree": {"bundle": bundle.path}}, ensure_ascii=False)
        command = f"-cc.mode=2 -cc.backend={name} '-cc.custom_ops=[\"none\"]' --additional-config '{settings}'"
        console.print(Text("serve  ", "bold") + Text(command), soft_wrap=True)


def render_part(model: str, part: PartReport) -> RenderableType:
    """Kernels, then externs, then the totals of one part."""
    at = ", ".join(f"{name} {value}" for name, value in part.reference.items())
    about = f" ({part.about})" if part.about else ""
    title = Text.assemble((f"{model} {part.name}", "bold"), about, f" for {part.target}", (f", bytes at {at}" if at else "", "dim"))
    tables: list[RenderableType] = [title, _kernels(part.kernels)]
    if part.externs:
        tables += [Text(), _externs(part.externs)]
    return Group(*tables, Text(), *_totals(part), Text())


def size(count: int | None) -> str:
    """Bytes with three significant digits, in powers of 1000 as memory bandwidth is; a dash for what nobody told."""
    if count is None:
        return "-"
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.3g} {UNITS[unit]}"


def short_ops(ops: Sequence[str]) -> str:
    """`aten.pow.Tensor_Scalar` is pow; neighbours of one name are counted."""
    names = [op.split(".")[1] if op.count(".") else op for op in ops]
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    return ", ".join(name if count == 1 else f"{name}×{count}" for name, count in runs)


def grid(*columns: tuple[str, str]) -> Table:
    """An empty table with (heading, kind) columns: `left` may wrap, `whole` may not, `right` is a number."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True)
    for heading, side in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold", no_wrap=side in ("right", "whole"))
    return table


def _kernels(rows: Sequence[KernelRow]) -> Table:
    """Registers and shared memory have columns where the toolchain told them of any kernel."""
    told = [heading for heading in ("regs", "shared") if any(_told(row)[heading] is not None for row in rows)]
    table = grid(("kernel", "left"), ("fused ops", "left"), ("tier", "whole"), ("runs", "right"), ("before", "right"), ("after", "right"),
                 *((heading, "right") for heading in told))
    for row in rows:
        table.add_row(Text(row.name), Text(short_ops(row.ops)), row.tier, str(row.launches), size(row.bytes_before), size(row.bytes_after),
                      *(_told(row)[heading] or "-" for heading in told))
    return table


def _told(row: KernelRow) -> dict[str, str | None]:
    registers = None if row.registers is None else str(row.registers) + (f"+{row.spills}" if row.spills else "")
    return {"regs": registers, "shared": None if row.shared is None else size(row.shared)}


def _externs(rows: Iterable[ExternRow]) -> Table:
    table = grid(("extern", "left"), ("reason", "left"), ("calls", "right"), ("bytes", "right"))
    for row in rows:
        table.add_row(Text(row.callee), Text(row.reason), str(row.count), size(row.bytes))
    return table


def _totals(part: PartReport) -> Iterable[Text]:
    ratio = f", {part.bytes_before / part.bytes_after:.1f} times less" if part.bytes_after else ""
    moved = f"{size(part.bytes_before)} before fusion, {size(part.bytes_after)} after{ratio}"
    yield Text.assemble(("kernels ", "bold"), f"{part.launches_total} launches, {moved}")
    yield Text.assemble(("externs ", "bold"), f"{part.calls_extern} calls, {size(part.bytes_extern)}")
    if part.launches_per_layer is not None:
        yield Text.assemble(
            ("a layer ", "bold"), f"{part.launches_per_layer} launches, "
            f"{size(part.bytes_before_per_layer)} before, {size(part.bytes_after_per_layer)} after, externs included")
    if part.symbols:
        yield Text.assemble(("covers  ", "bold"), ", ".join(_range(name, *bounds) for name, bounds in part.symbols.items()))
    yield Text.assemble(("weights ", "bold"), f"{part.weights} by name")


def _range(name: str, low: int, high: int, step: int) -> str:
    """What the bundle promises of one run-time integer; a bound that is none is not printed as a number."""
    from flagtree.ir.program import UNBOUNDED  # here: commands that print no report start without the IR

    below, above = low <= -UNBOUNDED, high >= UNBOUNDED
    one_sided = f"{name} from {low}" if above else f"{name} up to {high}"
    numbers = f"any {name}" if below and above else one_sided if below or above else f"{name} {low} to {high}"
    return numbers + (f" in steps of {step}" if step != 1 else "")


def print_facts(console: Console, facts: Iterable[tuple[str, str | Path]]) -> None:
    """`name  value` lines.  Text is wrapped beside its name; a path is never broken, so that it can be copied and a script can read it."""
    facts = list(facts)
    width = 2 + max(len(name) for name, _ in facts)
    for name, value in facts:
        head = Text(name.ljust(width), "bold")
        if isinstance(value, Path):
            console.print(head + Text(str(value)), soft_wrap=True)
        else:
            lines = Text(value).wrap(console, max(console.width - width, 20))
            console.print(head + Text("\n" + " " * width).join(lines), soft_wrap=True)


def _facts(bundle: BundleReport) -> Iterable[tuple[str, str | Path]]:
    """Where the bundle is, how far its kernels got and why not further, what was executed, what took the time."""
    yield "bundle", Path(bundle.path)
    yield "digest", bundle.digest
    shared = f"; {bundle.stored} of them the store had" if bundle.stored else ""
    yield "kernels", f"{bundle.kernels} distinct: " + ", ".join(f"{count} at tier {tier}" for tier, count in bundle.tiers.items()) + shared
    for missing in dict.fromkeys(row.missing for part in bundle.parts for row in part.kernels if row.missing):
        yield "missing", missing
    yield "executed", ", ".join(f"{count} {how}" for how, count in bundle.executed.items()) or "nothing"
    spent = ["nothing to compile, taken from the store"] if bundle.cached else []
    spent += [f"{phase} {value:.1f} s" for phase, value in bundle.seconds.items()]
    yield "time", ", ".join(spent) or "-"


def stored_report(coverage: Any) -> PartReport | None:
    """The report that the compiler left in a part's coverage under `report`; None where there is none or it is not one."""
    try:
        return PartReport.from_dict(coverage["report"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
