"""`flagtree targets`: every chip, the tier that source reaches on this machine, what is missing for the next and how to get it.

Asks each target's own probe, so the answer is about this machine now; changes nothing.
"""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

EXAMPLES = """
**Examples**

`flagtree targets` says how far each chip's kernels get on this machine.

`flagtree targets --json` is the same for a script.
"""


def run(
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """List the chips that can be compiled for, and how far this machine gets."""
    from rich.console import Console
    from rich.text import Text

    from flagtree.cli.table import grid
    from flagtree.targets import all_targets

    reaches = [(target, target.probe()) for target in all_targets()]
    if json:
        rows = [
            {"name": t.name, "family": t.family, "aliases": t.aliases, "description": t.description, "tiers": t.tiers,
             "levels": t.levels, "reach": r.tier, "executes": r.executes, "missing": r.missing, "how": r.how}
            for t, r in reaches
        ]
        typer.echo(json_module.dumps(rows, ensure_ascii=False))
        return
    table = grid(("target", "whole"), ("reaches here", "left"), ("runs here", "left"), ("chip", "left"))
    for target, reach in reaches:
        last = target.tiers[-1]
        reached = reach.tier if reach.tier == last else f"{reach.tier} of {last}"
        names = f"\nalso {', '.join(target.aliases)}" if target.aliases else ""
        table.add_row(Text(target.name), reached, reach.executes or "no", Text(target.description + names))
    console = Console()
    console.print(table)
    for target, reach in reaches:
        if reach.missing:
            how = f"\n  try: {reach.how}" if reach.how else ""
            console.print(Text(f"\n{target.name}, missing here: {reach.missing}{how}"))
