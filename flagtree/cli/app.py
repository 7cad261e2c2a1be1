"""The command `flagtree`: the table of its subcommands, and how each of them ends.

Exit codes: 0 done, 2 the user's error (what, where, why, what to try; no traceback), 130 on Ctrl-C, 1 an error of ours with a
reproducer folder.  A subcommand imports what it works with when it runs, so that `flagtree --help` stays fast.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flagtree import __version__
from flagtree.cli import cache, compile, explain, finalize, inspect, interrupt, models, opt, serve, targets, verify
from flagtree.errors import FlagtreeError

DESCRIPTION = """Compile PyTorch models to checked bundles of fused kernels, for chips that need not be here.

One command does the whole job: `flagtree compile qwen3 --target metax`."""
INTERNAL_ERROR = 1

app = typer.Typer(
    name="flagtree", help=DESCRIPTION, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]}, add_completion=False,
)
for name, module in (("compile", compile), ("finalize", finalize), ("inspect", inspect), ("verify", verify), ("explain", explain),
                     ("models", models), ("targets", targets), ("opt", opt), ("cache", cache), ("serve", serve)):
    app.command(name, epilog=module.EXAMPLES, context_settings=getattr(module, "CONTEXT", None))(module.run)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"flagtree {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """Options that stand before the subcommand."""


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    interrupt.install()
    try:
        with interrupt.noticed():
            app()
    except interrupt.Interrupted as stop:
        interrupt.leave(stop.code)
    except FlagtreeError as error:
        typer.echo(f"error: {error.render()}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as `flagtree models | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # the outermost frame: whatever arrives here is a bug of ours
        from flagtree import reproducer

        typer.echo(reproducer.describe(error, reproducer.write(error, sys.argv)), err=True)
        sys.exit(INTERNAL_ERROR)
