"""The names that a server gives as its compiler: `flagtree`, `flagtree.serve.bundles.store`, `flagtree.serve.bundles.d_<digest>`.

No configuration is current when vLLM calls a compiler, but one is when it looks the name up: so looking a name up binds the settings,
and everything that does not fit is said then, before weights are loaded.  The digest in the name enters vLLM's own cache key.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from flagtree.errors import FlagtreeError
from flagtree.serve.agreement import check_server, facts_of, settings_of
from flagtree.serve.configuration import EXAMPLE, current_vllm_config, resolved, serving_now, traces_ahead
from flagtree.serve.counts import COUNTS
from flagtree.serve.server import Server

Backend = Callable[..., Any]
_BUNDLE = re.compile(r"d_([0-9a-f]{64})\Z")
DOOR = "the whole graph"
_PREFIX = "flagtree.serve.bundles"


def __getattr__(name: str) -> Backend:
    found = _BUNDLE.match(name)
    if found is not None:
        return _with_bundle(found.group(1))
    if name == "store":
        return _from_store()
    if name == "flagtree":
        return _plain()
    if name.startswith("d_"):
        raise FlagtreeError("not the name of a bundle", where=f"{_PREFIX}.{name}"[:200], why="d_ and the 64 digits of its digest")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def qualified(digest: str) -> str:
    """The name that binds the bundle with this digest."""
    return f"{_PREFIX}.d_{digest.removeprefix('sha256:').lower()}"


def _config(what: str) -> Any:
    """vLLM's configuration, which is current where it looks a name up.  FlagtreeError elsewhere, and where this vLLM does not tell it."""
    config = current_vllm_config()
    if config is None:
        lacks = "vllm.config" in sys.modules and not hasattr(sys.modules["vllm.config"], "get_current_vllm_config_or_none")
        why = "this vLLM has no get_current_vllm_config_or_none" if lacks else "no configuration is current"
        hint = "give the name to vLLM: -cc.mode=2 -cc.backend=<name>"
        raise FlagtreeError(f"{what} is bound where vLLM builds a model", why=why, hint=hint)
    return config


def _with_bundle(digest: str) -> Backend:
    config = _config("a bundle")
    settings = settings_of(config)
    if settings.bundle is None:
        raise FlagtreeError("the compiler's name has a digest, and no bundle is named", where=f"d_{digest[:16]}…", hint=EXAMPLE)
    if settings.digest is not None and settings.digest.lower().removeprefix("sha256:") != digest:
        why = f"the name says {digest[:16]}…, the settings {settings.digest[:16]}…"
        raise FlagtreeError("two digests are named", why=why, hint="leave the one in the settings out")
    facts = facts_of(config)
    check_server(config)
    server = Server(settings, facts, bundle=str(resolved(settings.bundle)), digest=digest)
    compiler = _once(server)
    if settings.quiets_helpers and traces_ahead():
        server.quiet()  # already now: the encoder of a model that sees runs before our graph, with helpers of its own
    return compiler


def _from_store() -> Backend:
    config = _config("the store")
    settings = settings_of(config)
    if settings.bundle is not None:
        raise FlagtreeError("a bundle is named, and the compiler's name does not bind it", hint=f"-cc.backend={_name_for(settings.bundle)}")
    check_server(config)
    return _once(Server(settings, facts_of(config)))


@functools.cache
def _once(server: Server) -> Backend:
    """vLLM looks a name up once for each decorated class of a model; equal settings are one compiler."""
    server.open()
    where = server.bundle and f"{server.bundle}, digest {server.digest[:16]}"
    COUNTS.took_over(DOOR, f"from {where or 'the store'}, strict '{server.settings.strict}'")

    def flagtree(module: fx.GraphModule, example_inputs: Sequence[Any], **options: object) -> Any:
        return server.graph(module, example_inputs)

    return flagtree


def _plain() -> Backend:
    """`backend="flagtree"`, in and out of a server.  A server whose settings say anything needs a name that binds them."""
    config = current_vllm_config()
    if config is not None:
        settings = settings_of(config)
        if settings.bundle is not None or settings.record is not None:
            name = f"{_PREFIX}.store" if settings.bundle is None else _name_for(settings.bundle)
            what = "the name 'flagtree' cannot bind the settings of a server"
            raise FlagtreeError(what, why="no configuration is current when the graph comes", hint=f"-cc.backend={name}")
        check_server(config)
        COUNTS.took_over(DOOR, "from the store, strict 'off'")
    return plain


def plain(module: fx.GraphModule, example_inputs: Sequence[Any], **options: object) -> Any:
    """`torch.compile(backend="flagtree")`; inside a step of vLLM the same from the store, in the form that vLLM saves."""
    if serving_now():
        from flagtree.serve.configuration import ServeSettings

        return Server(ServeSettings(), ()).graph(module, example_inputs)
    from flagtree.runtime.compile import backend

    return backend(module, example_inputs, **options)


def _name_for(bundle: str) -> str:
    from flagtree.artifact.bundle import open_bundle

    return qualified(open_bundle(resolved(bundle)).digest)
