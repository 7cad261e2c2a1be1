"""`flagtree compile`: models to one bundle a target, with progress and the table of what came out.

The work is `flagtree.compile` for a model and `flagtree.graphs` for a server's graphs; this parses, checks the names before any work
starts, and prints.  stdout has the table, or with `--json` one JSON document a model; progress goes to stderr.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flagtree.check.report import CompileReport

EXAMPLES = """
**Examples**

`flagtree compile qwen3 --target metax` builds the full-size model for a MetaX chip, on a machine that has neither chip nor weights.

`flagtree compile qwen3 --target cpu --target cuda:sm90 -o bundles` builds two bundles in one run.

`flagtree compile qwen3 --target cpu --layers 2 --part decode --json` is a small one, for a script.

`flagtree compile ./config.json --target cuda:sm90 --part prefill,decode` takes a model's own config.json in place of a name.

`flagtree compile step3 --target cuda:sm90 --tp 8` builds what each of eight ranks runs; the manifest says what of the weights each loads.

`flagtree compile qwen3 --for vllm --tp 1,2 -o bundles` builds the graphs that vLLM will ask for, with one and with two ranks
(docs/serving.md).

`flagtree compile ./config.json --for vllm --dtype bf16` does it for a model of your own.

`flagtree compile --graphs graphs.jsonl --target cpu -o bundles` builds what a server recorded.
"""
SERVERS = ("vllm",)


def run(
    model: Annotated[list[str] | None, typer.Argument(help="Models to compile; `flagtree models` lists them.", show_default=False)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="A chip; repeat it for several. `flagtree targets` lists them. With --for vllm the default "
                     "is what the installed vLLM runs on.", show_default=False),
    ] = None,
    server: Annotated[str | None, typer.Option("--for", help="Compile the graphs of a server, 'vllm', instead of the model's own.")] = None,
    tp: Annotated[str | None, typer.Option(help="Ranks over which the weights are divided; all of them run one bundle. With --for: "
                  "degrees, as in 1,2; one bundle has them all.", show_default=False)] = None,
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

    from flagtree.cli.progress import Drawn
    from flagtree.cli.table import print_report, print_serving
    from flagtree.errors import FlagtreeError
    from flagtree.settings import settings
    from flagtree.targets import find_target

    if graphs is None and not model:
        raise FlagtreeError("nothing to compile", hint="name a model, or what a server recorded: --graphs FILE")
    if graphs is not None and (model or part or layers or dtype or server or tp):
        hint = "leave model, --for, --tp, --part, --layers, --dtype out"
        raise FlagtreeError("--graphs compiles what a server recorded, as it is", hint=hint)
    if not target and server is None:
        raise FlagtreeError("no target is named", why="a bundle is for one chip", hint="--target cpu; `flagtree targets` lists them")
    parts = [each.strip() for names in part or () for each in names.split(",")] or None
    if not settings.debug:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")  # torch's own notes would cut through the progress
    targets = tuple(dict.fromkeys(find_target(name).name for name in target or ()))
    degrees = _checked(model or [], server, tp, parts, layers, dtype)
    for name in model or (str(graphs),):
        with Drawn() as progress:
            common: dict[str, Any] = {"out": out, "jobs": jobs, "progress": progress}
            if graphs is not None:
                report = _recorded(graphs, targets, common)
            elif server is not None:
                report = _for_server(name, targets, degrees, layers, dtype, common)
            else:
                from flagtree.compile import compile_model

                report = compile_model(name, targets, parts=parts, layers=layers, dtype=dtype, ranks=degrees[0], **common)
        if json:
            typer.echo(report.to_json())
            continue
        print_report(report, Console())
        if server is not None or graphs is not None:
            print_serving(report, Console())


def _checked(
    models: list[str], server: str | None, tp: str | None, parts: list[str] | None, layers: int | None, dtype: str | None
) -> tuple[int, ...]:
    """The degrees of tensor parallelism.  A slip in the last name should not cost the work on the first."""
    from flagtree.errors import FlagtreeError, UnknownName

    if server is None:
        degrees = _degrees(tp or "1")
        if len(degrees) > 1:
            raise FlagtreeError("a bundle is for one number of ranks", where=f"--tp {tp}", hint="--tp 2; several go with --for vllm")
        from flagtree.capture.model_spec import load_spec

        for name in models:
            spec = load_spec(name).with_ranks(degrees[0])
            for each in parts or ():
                spec.bounds(each)
        return degrees
    if server not in SERVERS:
        raise UnknownName("server", server, SERVERS)
    if parts:
        raise FlagtreeError("a server's graph has no parts", why="one graph serves prefill and decode", hint="leave --part out")
    degrees = _degrees(tp or "1")
    from flagtree.capture.ahead import check_degrees, server_model

    for name in models:
        check_degrees(server_model(name, layers, dtype), degrees)
    return degrees


def _degrees(text: str) -> tuple[int, ...]:
    from flagtree.errors import FlagtreeError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 1 <= int(word[:9]) <= 1024 for word in words):
        why = "numbers from 1 to 1024 between commas"
        raise FlagtreeError("--tp is no list of degrees", where=f"--tp {text}", why=why, hint="--tp 1,2")
    return tuple(dict.fromkeys(int(word) for word in words))


def _recorded(graphs: Path, targets: tuple[str, ...], common: dict[str, Any]) -> CompileReport:
    from flagtree.artifact.recording import read_recorded
    from flagtree.graphs import compile_graphs

    return compile_graphs(read_recorded(graphs), targets, name=graphs.stem, **common)


def _for_server(
    name: str, targets: tuple[str, ...], degrees: tuple[int, ...], layers: int | None, dtype: str | None, common: dict[str, Any]
) -> CompileReport:
    """Captured for the platform of each target, compiled as recordings are."""
    from flagtree.artifact.container import check_one_file
    from flagtree.capture.ahead import OWN_DEVICE, capture_ahead, device_of, server_model
    from flagtree.check.report import BundleReport, CompileReport
    from flagtree.graphs import compile_graphs
    from flagtree.targets import find_target

    targets = targets or (OWN_DEVICE,)
    check_one_file(common["out"], targets)
    model = server_model(name, layers, dtype)
    by_device: dict[str, list[str]] = {}
    for target in targets:
        by_device.setdefault(device_of(find_target(target)), []).append(target)
    bundles: list[BundleReport] = []
    for device, names in by_device.items():
        recorded = capture_ahead(model, degrees, device=device, progress=common["progress"])
        bundles += compile_graphs(recorded, names, name=f"{model.name}-vllm", **common).bundles
    return CompileReport(f"{model.name}-vllm", tuple(bundles))
