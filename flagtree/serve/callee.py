"""A graph of a bundle as the callable that vLLM keeps and saves: its bytes are JSON that names the bundle and the graph.

vLLM saves the bytes with what Dynamo found, so that the second start traces nothing; reading them opens the bundle again and checks
that it is the same one.  No code and no pickle of ours.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.aot_compile import SerializableCallable

from flagtree.artifact.bundle import summarise
from flagtree.artifact.files import canonical_json, parse_json
from flagtree.errors import BundleError, FlagtreeError
from flagtree.runtime.bind import Checker
from flagtree.runtime.dtypes import DTYPES
from flagtree.runtime.launch import Executable, Session
from flagtree.runtime.results import Results
from flagtree.serve.counts import COUNTS
from flagtree.serve.graph import ONEDNN, TILED, Packed
from flagtree.serve.launch_list import distinct_kernels, fitted
from flagtree.serve.metrics import publish, watch_compilations
from flagtree.serve.opened import OpenedBundle, open_for_serving

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Handle:
    """All that a later process needs.  `bundle`: path; `digest`, `key`: identities; `takes`, `extra`, `packed`, `marks`: of serve/graph.py;
    `stance`: what torch's compiler may do once the model runs, empty for anything."""

    bundle: str
    digest: str
    key: str
    takes: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    packed: tuple[Packed, ...] = ()
    marks: tuple[tuple[int | str, int | str], ...] = ()
    stance: str = ""

    def encode(self) -> bytes:
        """Canonical JSON."""
        return canonical_json({"format": FORMAT, **asdict(self)})

    @classmethod
    def decode(cls, data: bytes) -> Handle:
        """Inverse of `encode`.  BundleError for bytes that are no handle."""
        record = parse_json(data, "a saved graph")
        try:
            if not isinstance(record, dict) or record.pop("format") != FORMAT:
                raise ValueError("another format")
            takes, extra = (tuple(int(v) for v in record.pop(name)) for name in ("takes", "extra"))
            packed = tuple(_packed(**p) for p in record.pop("packed"))
            marks = tuple((_plain(a), _plain(b)) for a, b in record.pop("marks"))
            bundle, digest, key, stance = (str(record.pop(name)) for name in ("bundle", "digest", "key", "stance"))
            return cls(bundle, digest, key, takes, extra, packed, marks, stance)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError("a saved graph is not one of this flagtree", why=str(error), hint="delete vLLM's compile cache") from None


def _packed(position: int, callee: str, dtype: str, shape: Sequence[int]) -> Packed:
    if callee not in (ONEDNN, TILED) or dtype not in DTYPES:
        raise ValueError("no form of a packed weight")
    return Packed(int(position), callee, dtype, tuple(int(n) for n in shape))


def _plain(value: object) -> int | str:
    if not isinstance(value, (int, str)):
        raise ValueError("a mark is neither number nor text")
    return value


class ServedGraph(SerializableCallable):
    """Call it with the graph's arguments in order; it returns the tuple that the graph returns.

    Weights are bound at the first call and whenever one is another tensor; every other argument is checked against the
    promises of the bundle when its type, sizes or strides change.  BindError names what does not fit.
    """

    def __init__(self, handle: Handle, opened: OpenedBundle) -> None:
        graph = opened.graph(handle.key)
        if graph is None:
            raise BundleError("the bundle no longer has the graph", where=handle.bundle, why=f"capture key {handle.key[:16]}")
        self.handle = handle
        packed = {graph.arguments[p.position]: p for p in handle.packed}
        launch = fitted(graph.launch, packed, dict(handle.marks))
        self.executable = Executable(launch, opened.library)
        names = [b.name for b in self.executable.inputs]
        self._results = Results(graph.results, graph.launch["symbols"], names)
        self._fixed = [k for k, b in enumerate(self.executable.inputs) if b.role == "weight"]
        self._moving = [k for k in range(len(names)) if k not in set(self._fixed)]
        self._names = names
        self._bound: list[torch.Tensor] = []
        self._session: Session | None = None
        self._checker: Checker | None = None
        COUNTS.graphs_found += 1
        COUNTS.add_graph(summarise(launch), distinct_kernels(launch))
        publish()

    def __call__(self, *args: Any) -> tuple:
        args = (*[args[k] for k in self.handle.takes], *self.handle.extra)
        if self._session is None or not all(map(operator.is_, (args[k] for k in self._fixed), self._bound)):
            self._bind(args)
        assert self._session is not None and self._checker is not None
        moving = [args[k] for k in self._moving]
        self._checker.check(dict(zip(self._checker.names, moving)))
        return self._results(self._session(moving), args)

    def _bind(self, args: Sequence[Any]) -> None:
        if len(args) != len(self._names):
            raise BundleError("the server brings other arguments than the graph takes", why=f"{len(args)} instead of {len(self._names)}")
        if self._session is None:
            if self.handle.stance:
                # legal here: the server calls us directly, outside of any traced region.  What runs later, sampling, is covered
                torch.compiler.set_stance(self.handle.stance)
            watch_compilations()
        self._bound = [args[k] for k in self._fixed]
        weights = {self._names[k]: _plain_tensor(args[k]) for k in self._fixed}
        Checker(self.executable.prepared, list(weights)).check(weights)
        self._session = self.executable.bind(weights)
        self._checker = Checker(self.executable.prepared, [self._names[k] for k in self._moving], weights)

    # -- vLLM's contract ---------------------------------------------------------------------------------------------
    @classmethod
    def serialize_compile_artifacts(cls, fn: ServedGraph) -> bytes:
        return fn.handle.encode()

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> ServedGraph:
        """Raises when the bundle is gone or another one; the server then traces again and asks the backend."""
        handle = Handle.decode(data)
        graph = cls(handle, open_for_serving(Path(handle.bundle), handle.digest))
        COUNTS.loaded_warm += 1
        return graph

    def finalize_loading(self, vllm_config: Any) -> None:
        """vLLM calls it after a load; all checks were made when the backend was looked up."""


def _plain_tensor(value: torch.Tensor) -> torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else value


class Eager(SerializableCallable):
    """A graph that nobody compiled, node by node as it was traced.  It is not saved: the next start asks again."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Eager) -> bytes:
        raise FlagtreeError("a graph that no bundle has is not saved", hint="record it and compile it")

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Eager:
        raise FlagtreeError("a graph that no bundle has is not saved")
