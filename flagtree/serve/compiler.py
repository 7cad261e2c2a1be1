"""vLLM's compile mode 3 over the same bundles: `flagtree.serve.compiler.Compiler`, for who owns a platform and names it there.

A vendor's platform class returns that name from `get_compile_backend`; vLLM splits the graph at attention and hands over each piece.
What vLLM keeps of a piece are two strings, our handle and its key; no code and no pickle.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from flagtree.artifact.files import canonical_json, sha256
from flagtree.errors import BundleError, FlagtreeError
from flagtree.serve.agreement import PIECES, check_server, facts_of, settings_of
from flagtree.serve.callee import Eager, ServedGraph
from flagtree.serve.configuration import current_vllm_config, resolved
from flagtree.serve.counts import COUNTS, logger
from flagtree.serve.server import Server

DOOR = "the pieces between attention"
TAKES = ("graph", "example_inputs", "compiler_config", "compile_range", "key")  # of its `compile`


class Pieces:
    """The contract of vLLM's `CompilerInterface`, without vLLM.  One is made for each compiled part of a model, at model build, where a
    configuration is current: what is wrong with the settings or the bundle is said then."""

    name = "flagtree"

    def __init__(self) -> None:
        self._server: Server | None = None
        config = current_vllm_config()
        if config is not None:
            self._bind(config)

    def _bind(self, config: Any) -> Server:
        settings = settings_of(config)
        check_server(config, PIECES)
        bundle = "" if settings.bundle is None else str(resolved(settings.bundle))
        server = Server(settings, facts_of(config), bundle=bundle, digest=settings.digest or "")
        if server != self._server:
            server.open()
            self._server = server
            COUNTS.took_over(DOOR, f"from {bundle or 'the store'}, strict '{settings.strict}'")
            if getattr(sys.modules.get("vllm.envs"), "VLLM_USE_MEGA_AOT_ARTIFACT", False):
                logger().info("flagtree: each start traces again; VLLM_USE_MEGA_AOT_ARTIFACT=0 keeps what a start has found")
        return server

    def compute_hash(self, vllm_config: Any) -> str:
        """What besides vLLM's own factors decides the pieces: bundle, strictness, release of torch."""
        server = self._bind(vllm_config)
        opened = server.open()
        bundle = opened.digest if opened is not None else ""
        return sha256(canonical_json({"bundle": bundle, "strict": server.settings.strict, "torch": torch.__version__}))[:16]

    def initialize_cache(self, cache_dir: str, disable_cache: bool = False, prefix: str = "") -> None:
        """vLLM keeps the handles; we keep nothing there."""

    def compile(
        self, graph: fx.GraphModule, example_inputs: Sequence[Any], compiler_config: Any, compile_range: Any, key: str | None = None
    ) -> tuple[Callable[..., Any], tuple[str, str] | None]:
        """The callable of a piece and what finds it again; no handle for a piece that runs call by call, so that the next start asks."""
        found = self._find(graph, example_inputs, f"piece {str(key).rpartition('_')[2]} for {compile_range}")
        return found, None if isinstance(found, Eager) else (found.handle.encode().decode(), str(key))

    def load(
        self, handle: Any, graph: fx.GraphModule, example_inputs: Sequence[Any], graph_index: int, compile_range: Any
    ) -> Callable[..., Any]:
        """The callable of an earlier start; a bundle that is gone or another one is asked for the piece again."""
        try:
            return ServedGraph.deserialize_compile_artifacts(str(handle[0]).encode())
        except BundleError as error:
            logger().warning("flagtree: a saved piece does not fit any more: %s", error.what)
            return self._find(graph, example_inputs, f"piece {graph_index} for {compile_range}")

    def _find(self, graph: fx.GraphModule, example_inputs: Sequence[Any], piece: str) -> ServedGraph | Eager:
        if self._server is None:
            raise FlagtreeError("a bundle is bound where vLLM builds a model", where=piece, hint="give the class to vLLM by a platform")
        return self._server.graph(graph, example_inputs, piece)


def __getattr__(name: str) -> Any:
    if name == "Compiler":
        return _compiler()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


@functools.cache
def _compiler() -> type:
    """`Pieces` as a subclass of vLLM's own class.  FlagtreeError where this vLLM has another contract."""
    try:
        interface = importlib.import_module("vllm.compilation.compiler_interface").CompilerInterface
        takes = inspect.signature(interface.compile).parameters
    except (ImportError, AttributeError) as error:
        raise FlagtreeError("this vLLM has no compiler interface for pieces", why=str(error), hint="-cc.mode=2 needs none") from None
    if missing := [name for name in TAKES if name not in takes]:
        why = f"its compile takes no {', '.join(missing)}"
        raise FlagtreeError("this vLLM has another compiler interface than we know", why=why, hint="-cc.mode=2 needs none")
    return type("Compiler", (Pieces, interface), {"__module__": __name__, "__doc__": Pieces.__doc__})
