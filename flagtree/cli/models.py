"""`flagtree models`: every model that ships with its true dimensions; with a name, all that is known of one and where from.

Reads the descriptions only; imports neither torch nor transformers.
"""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from flagtree.capture.model_spec import ModelSpec

EXAMPLES = """
**Examples**

`flagtree models` lists the names that `flagtree compile` takes.

`flagtree models step3` shows one: its parts with their bounds, and where each fact comes from.

`flagtree models --json` is the same for a script.
"""


def run(
    name: Annotated[str | None, typer.Argument(help="Show one model in full: a name, a description or a config.json.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """List the models that ship with their true dimensions, or show one in full."""
    from flagtree.capture.model_spec import list_specs, load_spec

    specs = (load_spec(name),) if name else list_specs()
    if json:
        typer.echo(json_module.dumps([_record(spec) for spec in specs], ensure_ascii=False))
        return

    from rich.console import Console

    console = Console()
    if name:
        _show(specs[0], console)
    else:
        _list(specs, console)


def _record(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude={"capture", "serving", "card"}, exclude_none=True)


def _list(specs: tuple[ModelSpec, ...], console: Console) -> None:
    from flagtree.cli.table import grid

    table = grid(("model", "whole"), ("layers", "right"), ("width", "right"), ("heads", "whole"), ("feed forward", "whole"),
                 ("context", "right"), ("vision", "whole"))
    for spec in specs:
        context = spec.bounds("decode").sizes["context"][1]
        table.add_row(spec.name, str(spec.depth), str(spec.text["hidden_size"]), _heads(spec), _feed_forward(spec), str(context),
                      "yes" if "vision" in spec.part_names else "-")
    console.print(table)
    console.print("\n[dim]heads: query / key x width\n`flagtree models NAME` shows other names, parts with their bounds, and sources[/dim]")


def _heads(spec: ModelSpec) -> str:
    return f"{spec.text['num_attention_heads']} / {spec.key_heads} x {spec.head_width}"


def _feed_forward(spec: ModelSpec) -> str:
    """The width, or for experts their number, how many a token takes, and theirs."""
    from flagtree.capture.spec_rules import named

    text, count = spec.text, named(spec.text, "num_experts")[1]
    if count is None:
        return str(text["intermediate_size"])
    return f"{named(text, 'num_experts_per_tok')[1]} of {count} x {text.get('moe_intermediate_size') or text['intermediate_size']}"


def _show(spec: ModelSpec, console: Console) -> None:
    from rich.text import Text

    from flagtree.cli.table import grid

    def line(what: str, value: str) -> None:
        if value:
            console.print(Text.assemble((f"{what:<14}", "bold"), value))

    line(spec.name, spec.title)
    line("also called", ", ".join(alias for alias in spec.aliases if alias != spec.name))
    line("class", spec.architecture)
    line("layers", f"{spec.depth} of width {spec.text['hidden_size']}, heads {_heads(spec)}, feed forward {_feed_forward(spec)}")
    line("vocabulary", str(spec.text["vocab_size"]))
    line("computed in", spec.dtype + "".join(f"; {pattern} in {dtype}" for pattern, dtype in spec.dtypes.items()))
    if (q := spec.quantisation) is not None:
        line("stored as", f"{q.weights}" + (f" in blocks of {q.block[0]} x {q.block[1]}, scales {q.scale}" if q.block else ""))
    if (bridge := spec.bridge) is not None:
        per = f"{bridge.patches_per_token} patches a token" if bridge.patches_per_token else f"{bridge.tokens_per_image} tokens an image"
        line("bridge", f"{bridge.module}: {per}, rows of {bridge.width}")
    table = grid(("part", "whole"), ("size", "whole"), ("from", "right"), ("to", "right"))
    for part in spec.part_names:
        for k, (size, (low, high)) in enumerate(spec.bounds(part).sizes.items()):
            table.add_row("" if k else part, size, str(low), str(high))
    console.print()
    console.print(table)
    for title, facts in (("Sources", spec.sources), ("Inferred, stated by no public source", spec.inferred)):
        if facts:
            console.print(f"\n[bold]{title}[/bold]")
            for fact, source in facts.items():
                console.print(Text.assemble((f"  {fact}: ", "cyan"), source))
