"""`flagtree models`: every model that ships, with its true dimensions, its parts and the bounds that a bundle promises.

Reads the descriptions only; imports neither torch nor transformers.
"""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

EXAMPLES = """
**Examples**

`flagtree models` lists the names that `flagtree compile` takes.

`flagtree models --json` is the same for a script.
"""


def run(
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """List the models that ship with their true dimensions."""
    from flagtree.capture.model_spec import PARTS, list_specs

    specs = list_specs()
    if json:
        rows = [
            {"name": s.name, "aliases": s.aliases, "title": s.title, "architecture": s.architecture, "dtype": s.dtype,
             "config": s.config, "parts": s.parts.model_dump(mode="json")}
            for s in specs
        ]
        typer.echo(json_module.dumps(rows, ensure_ascii=False))
        return

    from rich.console import Console
    from rich.text import Text

    from flagtree.cli.table import grid

    table = grid(("model", "whole"), ("layers", "right"), ("width", "right"), ("dtype", "whole"), ("part", "whole"), ("batch", "right"),
                 ("sequence", "right"), ("context", "right"))
    for spec in specs:
        facts = [spec.name, str(spec.depth), str(spec.config["hidden_size"]), spec.dtype]
        for part in PARTS:
            bounds = spec.bounds(part).model_dump()
            sizes = ["1" if bounds[k] is None else f"{bounds[k][0]}-{bounds[k][1]}" for k in ("batch", "sequence", "context")]
            table.add_row(*facts, part, *sizes)
            facts = [""] * len(facts)
    console = Console()
    console.print(table)
    console.print()
    for spec in specs:
        others = [alias for alias in spec.aliases if alias != spec.name]
        if others:
            console.print(Text(f"{spec.name} is also called {', '.join(others)}"))
