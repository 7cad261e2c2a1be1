"""`flagtree opt`: chosen passes over a program in the text form, the way to look at one pass at work.

Prints programs on stdout with what happened as `#` comments, so that the output is input again; times go to stderr.
The passes and the verification after each are `flagtree.passes.pipeline`'s.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flagtree.errors import IRError

if TYPE_CHECKING:
    from flagtree.ir.program import Program
    from flagtree.passes.base import Pass, Report

EXAMPLES = """
**Examples**

`flagtree opt norm.ir -p "canonicalize,fuse_pointwise"` runs two passes and prints the program.

`flagtree opt norm.ir -p "canonicalize,fuse_pointwise" --print-after-all --time` shows every step.

`flagtree opt norm.ir -p fuse_pointwise --fuel 3` stops after three rewrites.

`flagtree opt norm.ir` runs the whole pipeline of the target, `flagtree opt norm.ir -p ""` only parses, verifies and prints.
"""


def run(
    file: Annotated[Path, typer.Argument(help="A program in the text form; - reads standard input.", show_default=False)],
    passes: Annotated[str | None, typer.Option("--passes", "-p", help="Passes in order, with options in braces; all without it.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="Whose limits the passes obey; the CPU's without it.")] = None,
    fuel: Annotated[int | None, typer.Option(min=0, help="Stop after this many rewrites.")] = None,
    print_after_all: Annotated[bool, typer.Option("--print-after-all", help="Print the program after each pass.")] = False,
    time: Annotated[bool, typer.Option("--time", help="Print the seconds of each pass on stderr.")] = False,
) -> None:
    """Run passes on a program in the text form."""
    from flagtree.ir.text import parse_program, print_program
    from flagtree.passes.base import Fuel
    from flagtree.passes.pipeline import parse_pipeline, pipeline, run_pipeline
    from flagtree.settings import settings
    from flagtree.targets import all_targets, find_target

    chosen = all_targets()[0] if target is None else find_target(target)

    def after(done: Pass, program: Program, report: Report) -> None:
        if time:
            typer.echo(f"{report.seconds:8.3f} s  {done.name}", err=True)
        if print_after_all:
            typer.echo(f"# after {done.name}: {report.rewrites} rewrites")
            for refusal in report.refusals:
                typer.echo(f"# refused: {refusal}")
            typer.echo(print_program(program))

    program = parse_program(_read(file))
    listed = pipeline(chosen) if passes is None else parse_pipeline(passes) if passes.strip() else ()
    program, _ = run_pipeline(program, listed, chosen, fuel=Fuel(settings.fuel if fuel is None else fuel), after=after)
    if not print_after_all:
        typer.echo(print_program(program), nl=False)


def _read(file: Path) -> str:
    """Raises IRError where the file cannot be read as text."""
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "name a file of IR text (docs/architecture.md), or - for standard input"
        raise IRError("the program cannot be read", where=str(file), why=str(error), hint=hint) from None
