"""`flagtree finalize`: raise a bundle's kernels where the vendor's toolchain is, and say of each kernel what became of it.

The work is `flagtree.finalize`; this parses and prints.  stdout has the result, or with `--json` one JSON document; progress goes to
stderr.  Exit code 2 when not every kernel was raised.
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flagtree.errors import ToolchainError

if TYPE_CHECKING:
    from rich.console import Console

    from flagtree.finalize import FinalizeReport

EXAMPLES = """
**Examples**

`flagtree finalize bundles/qwen3-metax` on a machine with MetaX's SDK (MACA_PATH), in the bundle's place.

`flagtree finalize bundles/qwen3-metax --python /opt/conda/bin/python -o done` by the Triton of another Python, into `done/qwen3-metax`.

`flagtree finalize bundles/qwen3-cuda-sm90 --ptxas /usr/local/cuda/bin/ptxas` assembles the bundle's PTX with another release.
"""


def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle: its folder, or a single .ftb file.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the result; without it the bundle is replaced.")] = None,
    python: Annotated[str | None, typer.Option(help="A Python with the vendor's Triton, or another release; it builds kernel.py.")] = None,
    ptxas: Annotated[str | None, typer.Option(help="Another ptxas (cuda targets); it assembles the bundle's PTX.")] = None,
    trust: Annotated[str | None, typer.Option(help="The digest of a bundle that was not built here and that you trust.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one command of the toolchain.")] = 600,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Kernels at a time; one a core without it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Raise kernels to binaries where the vendor's toolchain is."""
    from rich.console import Console

    from flagtree.cli.progress import Drawn
    from flagtree.finalize import finalize

    with Drawn() as progress:
        report = finalize(bundle, out=out, python=python, ptxas=ptxas, trust=trust, jobs=jobs, seconds=timeout, progress=progress)
    if json:
        typer.echo(json_module.dumps(report.to_dict(), ensure_ascii=False))
    else:
        _print(report, Console())
    if report.failed:
        raise ToolchainError(
            f"{len(report.failed)} of {len(report.kernels)} kernels were not raised", where=report.path, why=report.failed[0].why,
            hint="the others were, and are kept: the same command goes on with these",
        )  # fmt: skip


def _print(report: FinalizeReport, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from flagtree.cli.table import grid

    raised = sum(row.raised for row in report.kernels)
    if report.tool:
        table = grid(("kernel", "whole"), ("before", "whole"), ("after", "whole"), ("", "left"))
        for row in report.kernels:
            table.add_row(row.function, row.before, row.after, Text(row.why or ("built" if row.raised else "as it was")))
        console.print(table)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("bundle", Text(f"{report.path}, for {report.target}"))
    done = f"{raised} of {len(report.kernels)} built by {report.tool}" if report.tool else "all binaries already: nothing to raise"
    facts.add_row("kernels", Text(done))
    facts.add_row("digest", report.digest + (f", was {report.source}" if report.digest != report.source else ""))
    if not report.trusted:
        facts.add_row("trusted", "no: the store cannot be written; running it needs its digest named")
    facts.add_row("executed", "no binary was: the certificate says what was")
    console.print(facts)
