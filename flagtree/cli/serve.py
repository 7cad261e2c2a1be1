"""`flagtree serve`: vLLM's own server from a bundle, or a first start that writes down the graphs of which one is made.

Puts vLLM's arguments together and becomes vLLM's process; nothing of vLLM is changed, and what follows the options is its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
**Examples**

`flagtree serve MODEL --record graphs.jsonl` starts vLLM and writes down the graphs that it asks for.

`flagtree serve MODEL --bundle bundles/graphs-cpu --port 8000` serves from the bundle and compiles nothing; `--port` is vLLM's.

`flagtree serve MODEL --bundle bundles/graphs-cpu --show` prints the command of vLLM instead.
"""
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
OURS = ("-cc", "--compilation-config", "--compilation_config", "--additional-config", "--additional_config", "--worker-extension-cls", "-O")


def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What vLLM serves: a folder or a name. Further arguments go to vLLM as they are.")],
    bundle: Annotated[Path | None, typer.Option(help="Serve from this bundle.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write missing graphs to this file.")] = None,
    strict: Annotated[str, typer.Option(help="With a bundle: start, serve or paranoid (docs/serving.md).")] = "serve",
    trust: Annotated[str | None, typer.Option(help="The digest of a bundle that was not built here.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the command and leave.")] = False,
) -> None:
    """Start vLLM's server with a bundle."""
    from flagtree.errors import FlagtreeError

    settings, backend = _chosen(bundle, record, strict, trust)
    _check_rest(model, context.args)
    command = [sys.executable, "-m", "flagtree.serve.launch", "serve", model, "-cc.mode=2", f"-cc.backend={backend}"]
    command += ['-cc.custom_ops=["none"]', "--additional-config", json.dumps({"flagtree": settings})]
    command += ["--worker-extension-cls", "flagtree.serve.worker.Report", *context.args]
    if show:
        typer.echo(shlex.join(command))
        return
    if importlib.util.find_spec("vllm") is None:
        raise FlagtreeError("vLLM is not installed", hint="pip install 'flagtree-toolkit[vllm]', or --show for its command")
    typer.echo(shlex.join(command), err=True)
    sys.stderr.flush()
    os.execv(command[0], command)


def _chosen(bundle: Path | None, record: Path | None, strict: str, trust: str | None) -> tuple[dict[str, str], str]:
    """Our settings, and the name of the compiler that binds them."""
    from flagtree.artifact.bundle import open_bundle
    from flagtree.artifact.trust import check_trust
    from flagtree.errors import FlagtreeError, UnknownName
    from flagtree.serve.bundles import qualified
    from flagtree.serve.server import STANCES

    if (bundle is None) == (record is None):
        raise FlagtreeError("nothing to serve from" if bundle is None else "two ways to start", hint="either --bundle or --record")
    if bundle is None:
        return {"strict": "off", "record": str(Path(str(record)).absolute())}, "flagtree.serve.bundles.store"
    if strict not in STANCES or strict == "off":
        raise UnknownName("strictness", strict, [name for name in STANCES if name != "off"])
    digest = open_bundle(bundle).digest
    check_trust(digest, trust, where=str(bundle))
    return {"bundle": str(bundle.absolute()), "strict": strict}, qualified(digest)


def _check_rest(model: str, rest: list[str]) -> None:
    """vLLM's arguments less those that choose us."""
    from flagtree.errors import FlagtreeError

    if model.startswith("-"):
        raise FlagtreeError("the model comes first", where=model, hint="flagtree serve MODEL --bundle FOLDER [vLLM's arguments]")
    for argument in rest:
        if argument.split("=")[0].split(".")[0] in OURS:
            raise FlagtreeError("flagtree sets this itself", where=argument, hint="--show prints the command; change that and run it")
