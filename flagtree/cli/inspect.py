"""`flagtree inspect`: what a bundle holds, read and verified without running any of its code.

Prints the report that the compiler stored with each part, or what the part's launch list tells where there is none.
"""

from __future__ import annotations

import itertools
import json as json_module
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from flagtree.check.report import PartReport

EXAMPLES = """
**Examples**

`flagtree inspect bundles/qwen3-metax` shows kernels, tiers, coverage and whether this machine trusts it.

`flagtree inspect bundles/qwen3-metax --json | jq .tiers` is for a script.

`flagtree inspect bundles/qwen3-metax --html qwen3.html` writes one page with the model's picture, every kernel's code, plots and
the certificate; it opens in any browser, offline.
"""


def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle: its folder, or a single .ftb file.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page to look at, and its path on stdout.", show_default=False)
    ] = None,
) -> None:
    """Show what a bundle holds; none of its code is run."""
    from flagtree.artifact.bundle import inspect, open_bundle
    from flagtree.artifact.trust import is_built_here

    opened = open_bundle(bundle)
    if html is not None:
        from flagtree.cli.page import write_page

        write_page(opened, html, is_built_here(opened.digest))
        typer.echo(json_module.dumps({"html": str(html)}, ensure_ascii=False) if json else str(html))
        return
    facts = {**inspect(opened), "trusted": is_built_here(opened.digest)}
    if json:
        typer.echo(json_module.dumps(facts, ensure_ascii=False, default=str))
        return
    from rich.console import Console

    from flagtree.cli.table import stored_report

    console = Console()
    for part in opened.manifest.parts:
        _print_part(console, facts["name"], facts["target"], part, stored_report(facts["coverage"].get(part)), facts["parts"][part])
    _print_facts(console, facts)


def _print_part(console: Console, model: str, target: str, name: str, report: PartReport | None, summary: Mapping[str, Any]) -> None:
    from rich.text import Text

    from flagtree.cli.table import render_part

    if report is not None:
        console.print(render_part(model, report))
        return
    console.print(Text.assemble((f"{model} {name}", "bold"), f" for {target}"))
    calls = sum(row["count"] for row in summary["externs"])
    console.print(Text(f"kernels {summary['launches']} launches, externs {calls} calls, {summary['weights']} weights by name"))
    console.print(Text(f"inputs {numbered(summary['inputs'] + summary['states'])}; outputs {numbered(summary['outputs'])}\n"))


def numbered(names: Iterable[str]) -> str:
    """`k.0, k.1, k.2, x` as `k.0 to k.2, x`."""
    shown = []
    for prefix, group in itertools.groupby(names, key=lambda name: name.rstrip("0123456789")):
        run = list(group)
        shown += [f"{run[0]} to {run[-1]}"] if len(run) > 2 and prefix.endswith(".") else run
    return ", ".join(shown)


def _print_facts(console: Console, facts: Mapping[str, Any]) -> None:
    from flagtree.cli.table import print_facts, size

    print_facts(console, _facts(facts, size))


def _facts(facts: Mapping[str, Any], size: Callable[[int], str]) -> Iterable[tuple[str, str | Path]]:
    yield "bundle", Path(facts["path"])
    yield "size", f"{size(facts['bytes'])} in {len(facts['files'])} files"
    yield "digest", facts["digest"]
    yield "trusted", "yes, built by this machine's store" if facts["trusted"] else "no; running it needs its digest named"
    tiers = ", ".join(f"{count} at tier {tier}" for tier, count in facts["tiers"].items())
    yield "kernels", f"{len(facts['kernels'])} distinct: {tiers}"
    for missing in dict.fromkeys(kernel["missing"] for kernel in facts["kernels"].values() if kernel["missing"]):
        yield "missing", missing
    if facts["libraries"]:
        yield "levels", ", ".join(facts["libraries"])
    yield "built by", ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) or "not said"
    yield "certificate", "none" if facts["certificate"] is None else "`flagtree explain certificate BUNDLE` shows it"
