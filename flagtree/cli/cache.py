"""`flagtree cache`: where the store is, what lies in it, and how to make it smaller.

Only the writable store is ever changed; read-only layers are listed.  What vouches for bundles built here is never pruned.
"""

from __future__ import annotations

import json as json_module
import re
from enum import StrEnum
from typing import Annotated

import typer

EXAMPLES = """
**Examples**

`flagtree cache` shows the folder and what each kind of entry takes.

`flagtree cache prune --keep 1GB` deletes the entries used longest ago until 1 GB is left.
"""
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Action(StrEnum):
    """What to do with the store."""

    info = "info"
    prune = "prune"


def parse_size(text: str) -> int:
    """Bytes in `1500`, `20MB`, `1.5 GB` (powers of 1000).  Raises BadParameter for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?[bB]?)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise typer.BadParameter(f"'{text}' is no size; write 500MB or 2GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def run(
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.info,
    keep: Annotated[str, typer.Option(help="With prune: how much may stay.")] = "5GB",
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Show the store of compiled kernels, or prune it."""
    from flagtree.artifact.store import Store
    from flagtree.cli.table import size

    limit = parse_size(keep)
    store = Store()
    deleted = store.prune(limit) if action is Action.prune else None
    usage = store.usage()
    if json:
        data: dict[str, object] = {
            "folder": str(store.root), "layers": [str(layer) for layer in store.layers],
            "kinds": {kind: {"entries": used.entries, "bytes": used.bytes} for kind, used in usage.items()},
        }
        if deleted is not None:
            data["deleted"] = {"entries": deleted.entries, "bytes": deleted.bytes}
        typer.echo(json_module.dumps(data, ensure_ascii=False))
        return
    typer.echo(f"store {store.root}")
    for layer in store.layers:
        typer.echo(f"layer {layer} (read only)")
    if deleted is not None:
        typer.echo(f"deleted {deleted.entries} entries, {size(deleted.bytes)}")
    for kind, used in usage.items():
        typer.echo(f"  {kind:<12} {used.entries:>6} entries  {size(used.bytes):>8}")
    if not usage:
        typer.echo("  empty")
