"""`flagtree compile`: one or more models to one bundle a target, with progress and the table of what came out.

The work is `flagtree.compile.compile_model`; this parses, checks the names before any work starts, and prints.
stdout has the table, or with `--json` one JSON document a model; progress goes to stderr.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
**Examples**

`flagtree compile qwen3 --target metax` builds the full-size model for a MetaX chip, on a machine that has neither chip nor weights.

`flagtree compile qwen3 --target cpu --target cuda:sm90 -o bundles` builds two bundles in one run.

`flagtree compile qwen3 --target cpu --layers 2 --part decode --json` is a small one, for a script.

`flagtree compile ./config.json --target cuda:sm90 --part prefill,decode` takes a model's own config.json in place of a name.

`flagtree compile --graphs graphs.jsonl --target cpu -o bundles` builds what a server recorded (docs/serving.md).
"""


def run(
    target: Annotated[list[str], typer.Option("--target", "-t", help="A chip; repeat it for several. `flagtree targets` lists them.")],
    model: Annotated[list[str] | None, typer.Argument(help="Models to compile; `flagtree models` lists them.", show_default=False)] = None,
    graphs: Annotated[Path | None, typer.Option(help="Compile the graphs that a server recorded here, not a model.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Only these parts: prefill, decode, vision; with commas, or repeat it.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Another number of layers than the model has.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Another element type than the model's own: bf16, f16 or f32.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the bundles; without it they stay in the store.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Worker processes; one a core without it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, one line a model, and nothing else on stdout.")] = False,
) -> None:
    """Compile models ahead of time: no weights, no chip and no network needed."""
    from rich.console import Console

    from flagtree.capture.model_spec import load_spec
    from flagtree.cli.progress import Drawn
    from flagtree.cli.table import print_report
    from flagtree.errors import FlagtreeError
    from flagtree.settings import settings
    from flagtree.targets import find_target

    if graphs is None and not model:
        raise FlagtreeError("nothing to compile", hint="name a model, or what a server recorded: --graphs FILE")
    if graphs is not None and (model or part or layers or dtype):
        raise FlagtreeError("--graphs compiles what a server recorded, as it is", hint="leave model, --part, --layers and --dtype out")
    parts = [each.strip() for names in part or () for each in names.split(",")] or None
    for name in model or ():  # a slip in the last name should not cost the work on the first
        spec = load_spec(name)
        for each in parts or ():
            spec.bounds(each)
    targets = tuple(dict.fromkeys(find_target(name).name for name in target))

    from flagtree.compile import compile_model

    if not settings.debug:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")  # torch's own notes would cut through the progress
    for name in model or (str(graphs),):
        with Drawn() as progress:
            if graphs is not None:
                from flagtree.artifact.recording import read_recorded
                from flagtree.graphs import compile_graphs

                recorded = read_recorded(graphs)
                report = compile_graphs(recorded, targets, name=graphs.stem, out=out, jobs=jobs, progress=progress)
            else:
                report = compile_model(name, targets, parts=parts, layers=layers, dtype=dtype, out=out, jobs=jobs, progress=progress)
        if json:
            typer.echo(report.to_json())
        else:
            print_report(report, Console())
