"""`flagtree serve`: vLLM's own server from a bundle, or a first start that writes down the graphs of which one is made.

Puts vLLM's arguments together and becomes vLLM's process; nothing of vLLM is changed, and what follows the options is its own.
What can be known to go wrong is said first, in one line: vLLM needs half a minute to get there, and says it in three processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

EXAMPLES = """
**Examples**

`flagtree serve MODEL --record graphs.jsonl` starts vLLM and writes down the graphs that it asks for.

`flagtree serve MODEL --bundle bundles/graphs-cpu --port 8000` serves from the bundle and compiles nothing; `--port` is vLLM's.

`flagtree serve MODEL --bundle bundles/graphs-cpu --show` prints the command of vLLM instead.
"""
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
PORT = 8000  # vLLM's own
# unless set otherwise.  Else vLLM's key of a traced graph holds the hash of all sources of torch and Triton, for Inductor's sake: half a
# CPU second a start; and weights lie on small pages, which decoding, limited by memory, pays for (glibc 2.35; docs/serving.md)
ENVIRONMENT = {"VLLM_USE_MEGA_AOT_ARTIFACT": "0", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
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
    from flagtree.settings import settings

    _check_asked(bundle, record, strict)
    _check_rest(model, context.args)
    architecture = "" if show else _architecture(model)
    if not show:
        _check_port(context.args)
    ours, backend = _chosen(bundle, record, strict, trust)
    if not show:
        _check_runs(bundle, trust, architecture)
    command = [sys.executable, "-m", "flagtree.serve.launch", "serve", model, "-cc.mode=2", f"-cc.backend={backend}"]
    command += ['-cc.custom_ops=["none"]', "--additional-config", json.dumps({"flagtree": ours})]
    command += ["--worker-extension-cls", "flagtree.serve.worker.Report", *context.args]
    environment = settings.child_environment(ENVIRONMENT)
    typer.echo(shlex.join([*(f"{k}={environment[k]}" for k in ENVIRONMENT), *command]), err=not show)
    if show:
        return
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def _check_asked(bundle: Path | None, record: Path | None, strict: str) -> None:
    """Our own options, before anything is imported.  FlagtreeError."""
    from flagtree.errors import FlagtreeError, UnknownName
    from flagtree.serve.configuration import Strict

    if (bundle is None) == (record is None):
        raise FlagtreeError("nothing to serve from" if bundle is None else "two ways to start", hint="either --bundle or --record")
    known = [name for name in get_args(Strict) if name != "off"]
    if strict not in known:
        raise UnknownName("strictness", strict, known)


def _chosen(bundle: Path | None, record: Path | None, strict: str, trust: str | None) -> tuple[dict[str, str], str]:
    """Our settings, and the name of the compiler that binds them."""
    from flagtree.artifact.bundle import open_bundle
    from flagtree.artifact.trust import check_trust
    from flagtree.serve.bundles import qualified

    if bundle is None:
        return {"strict": "off", "record": str(Path(str(record)).absolute())}, "flagtree.serve.bundles.store"
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


# -- what vLLM would find out later ------------------------------------------------------------------------------------------
def _check_runs(bundle: Path | None, trust: str | None, architecture: str) -> None:
    """vLLM is there; the bundle runs here and is of this model class.  FlagtreeError."""
    from flagtree.errors import FlagtreeError
    from flagtree.serve.agreement import check_agreement
    from flagtree.serve.opened import open_for_serving

    if bundle is not None:
        check_agreement(open_for_serving(bundle, trust), {"model": architecture})
    if importlib.util.find_spec("vllm") is None:
        raise FlagtreeError("vLLM is not installed", hint="pip install 'flagtree-toolkit[vllm]', or --show for its command")


def _architecture(model: str) -> str:
    """The model class that a local folder names; "" for a name, which vLLM looks up itself.  FlagtreeError for a folder without one."""
    from flagtree.errors import FlagtreeError

    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "~", "/")):
            raise FlagtreeError("there is no such model", where=model, hint="a folder with config.json and weights, or a name")
        return ""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str((described.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError) as error:
        raise FlagtreeError("the folder holds no model", where=str(folder), why=f"config.json: {error}") from None


def _check_port(rest: Sequence[str]) -> None:
    """FlagtreeError when vLLM could not listen where `rest`, its arguments, says."""
    from flagtree.errors import FlagtreeError

    if _value(rest, "--uds"):
        return
    host, port = _value(rest, "--host") or "", _value(rest, "--port") or str(PORT)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, int(port)))
    except (OSError, ValueError, OverflowError) as error:
        raise FlagtreeError(f"the server cannot listen on port {port}", where=host, why=str(error), hint="another one: --port N") from None


def _value(rest: Sequence[str], name: str) -> str:
    """The last value that vLLM's arguments give an option, "" for none."""
    found = ""
    for argument, following in zip(rest, [*rest[1:], ""]):
        if argument == name:
            found = following
        elif argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
    return found
