"""`flagtree verify`: every kernel of a bundle executed and judged, with a table and a certificate written anew.

The work is `flagtree.check.verify.verify_bundle`; this parses and prints.  stdout has the table, or JSON; progress goes to stderr.
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from flagtree.check.verify import VerifyReport

EXAMPLES = """
**Examples**

`flagtree verify bundles/qwen3-8b-metax` executes each kernel, GPU code in the emulator, and writes the certificate anew.

`flagtree verify bundles/qwen3-8b-cpu --rebuild` builds the kernels again too and compares every byte.

`flagtree verify got-it.ftb --trust 9f86d0… --json | jq .failed` is for a bundle that another machine built, in a script.

Exit code 0: every gate passed. 1: a kernel is wrong, or a rebuilt file differs. 2: the bundle is refused.
"""


def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle: its folder, or a single .ftb file.", show_default=False)],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build the kernels again from their text and compare every byte.")] = False,
    trust: Annotated[str | None, typer.Option(help="The bundle's digest, where this machine did not build it.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Threads and worker processes; one a core without it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else on stdout.")] = False,
) -> None:
    """Execute every kernel of a bundle against float64, the interpreter and eager."""
    from rich.console import Console

    from flagtree.check.verify import verify_bundle
    from flagtree.cli.progress import Drawn
    from flagtree.settings import settings

    with Drawn() as progress:
        report = verify_bundle(bundle, trust=trust, again=rebuild, jobs=jobs or settings.jobs, progress=progress)
    if json:
        typer.echo(json_module.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        print_report(report, Console())
    for row in report.failed:
        typer.echo(f"wrong: {row.why}", err=True)
    for name in report.rebuilt.differs if report.rebuilt else ():
        typer.echo(f"differs: {name}", err=True)
    if report.failed or (report.rebuilt is not None and report.rebuilt.differs):
        raise typer.Exit(1)


def print_report(report: VerifyReport, console: Console) -> None:
    """A row a kernel, then the facts of the bundle."""
    from rich.table import Table
    from rich.text import Text

    from flagtree.cli.table import grid, short_ops

    table = grid(("kernel", "left"), ("fused ops", "left"), ("runs", "right"), ("max ULP", "right"), ("mean", "right"),
                 ("= interp.", "right"), ("= eager", "right"), ("verdict", "whole"))  # fmt: skip
    for row in report.kernels:
        table.add_row(Text(row.name), Text(short_ops(row.ops)), str(row.runs), _number(row.max_ulp), _number(row.mean_ulp),
                      _share(row.equal_to_interpreter), _share(row.equal_to_eager), row.verdict)  # fmt: skip
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("bundle", Text(f"{report.bundle} for {report.target}"))
    facts.add_row("digest", report.digest)
    ways = dict.fromkeys(way for row in report.kernels for way in row.executed)
    facts.add_row("executed", Text(", ".join(ways) or "nothing"))
    left_out = [r for row in report.kernels for r in row.left_out] + [r.why for r in report.kernels if r.verdict == "not executed"]
    for reason in dict.fromkeys(left_out):
        facts.add_row("left out", Text(reason))
    for reason in dict.fromkeys(f"{row.name}, {reason}" for row in report.kernels for reason in row.alone):
        facts.add_row("eager", Text(reason))
    for reason in dict.fromkeys(row.eager for row in report.kernels if row.eager not in ("", "compared")):
        facts.add_row("eager", Text(reason))
    if report.rebuilt is not None:
        facts.add_row("rebuilt", Text(_rebuilt(report)))
    passed = sum(row.verdict == "pass" for row in report.kernels)
    facts.add_row("verdict", f"{passed} of {len(report.kernels)} kernels pass; the certificate is new")
    console.print(facts)


def _rebuilt(report: VerifyReport) -> str:
    assert report.rebuilt is not None
    total = sum(report.rebuilt.compared.values())
    if not report.rebuilt.differs:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in report.rebuilt.compared.items() if count)
        taken = f"; {len(report.rebuilt.inputs)} files that these come from were taken as they are" if report.rebuilt.inputs else ""
        return f"{total} files ({kinds}), all with the same bytes{taken}"
    changed = "; ".join(f"{name} {there} then, {here} now" for name, (there, here) in report.rebuilt.changed.items())
    why = f" ({changed})" if changed else " (with the same versions)"
    return f"{len(report.rebuilt.differs)} of {total} differ: {', '.join(report.rebuilt.differs)}{why}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    """Never rounded up to all of them."""
    return "-" if value is None else "100%" if value == 1 else f"{min(99.99, 100 * value):.2f}%"
