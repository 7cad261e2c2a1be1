"""One server's compiler: a graph of vLLM's in, a callable from the bundle out; at a miss what the settings say.

`graph` runs once a graph at start.  On a hit nothing of the compiler is imported; at a miss it stops, or records and builds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from flagtree.artifact.recording import RecordedGraph, append_recorded, part_name
from flagtree.errors import FlagtreeError
from flagtree.runtime.capture_key import Unkeyed, example_value
from flagtree.runtime.cpu import levels
from flagtree.serve import stored
from flagtree.serve.agreement import Facts, check_agreement
from flagtree.serve.callee import Eager, Handle, ServedGraph
from flagtree.serve.configuration import ServeSettings, resolved
from flagtree.serve.counts import COUNTS, line, logger
from flagtree.serve.graph import Served, key_of, served_graph
from flagtree.serve.metrics import publish
from flagtree.serve.opened import OpenedBundle, open_for_serving

STANCES = {"off": "", "start": "", "serve": "eager_on_recompile", "paranoid": "fail_on_recompile"}


@dataclass(frozen=True, slots=True)
class FormulaCall:
    """A single operator: `formula(*rows, *fixed, *numbers)`, of which `text` is the key's text; `dense`: which of `rows` lie one
    after another."""

    formula: Callable[..., Any]
    text: str
    rows: tuple[torch.Tensor, ...]
    dense: tuple[bool, ...]
    fixed: tuple[torch.Tensor | None, ...]
    numbers: tuple

    def eager(self) -> Callable[..., tuple]:
        """The formula call by call, without the tensors of this call: it takes the rows, then what there is of `fixed`."""
        formula, rows, numbers = self.formula, len(self.rows), self.numbers
        given = [x is not None for x in self.fixed]

        def run(*tensors: torch.Tensor) -> tuple:
            rest = iter(tensors[rows:])
            result = formula(*tensors[:rows], *[next(rest) if there else None for there in given], *numbers)
            return result if isinstance(result, tuple) else (result,)

        return run


GRAPH_HINT = '"strict": "off", no bundle and -cc.backend=flagtree.serve.bundles.store'
OPERATORS_HINT = '"strict": "off", no bundle and "custom_ops": true'


class MissingGraph(FlagtreeError):
    """A graph of the server that the bundle does not have, in a strict mode."""


@dataclass(frozen=True)
class Server:
    """`settings` and `facts` of one server, hashable.  `bundle`: path; `digest`: what it has to be, "" where this machine's store has
    to vouch for it."""

    settings: ServeSettings
    facts: Facts
    bundle: str = ""
    digest: str = ""

    def open(self) -> OpenedBundle | None:
        """The bundle, checked against the server.  BundleError, UntrustedBundle."""
        if not self.bundle:
            return None
        opened = open_for_serving(Path(self.bundle), self.digest or None)
        check_agreement(opened, dict(self.facts), strict=self.settings.strict != "off")
        return opened

    def graph(self, module: fx.GraphModule, example_inputs: Sequence[Any], piece: str = "the whole graph") -> ServedGraph | Eager:
        """The callable for one graph: vLLM's contract of a compiler in mode 2.  `piece`: what messages call it."""
        served = served_graph(module)
        try:
            key = key_of(served)
        except Unkeyed as reason:
            return self._eager(module.forward, piece, f"it has no capture key: {reason}")
        known = self._known(key.digest)
        if known is not None:
            return self._serve(known, key.digest, served)
        name = f"{piece}, {part_name(key.digest)}"
        why = self._missing(name, key.digest, key.text)
        tensors = [v for n in module.graph.nodes if n.op == "placeholder" and isinstance(v := example_value(n), torch.Tensor)]

        def record(**about: Any) -> RecordedGraph:
            from flagtree.capture.recorded import record_served

            return record_served(served, key, example_inputs, **about)

        try:
            built = self._built(record, {t.device.type for t in tensors})
        except FlagtreeError as error:
            return self._eager(module.forward, name, f"{why}; it was not compiled: {error.render()}")
        return self._eager(module.forward, name, why) if built is None else self._serve(built, key.digest, served)

    def operator(self, digest: str, call: FormulaCall) -> ServedGraph | Eager:
        """The callable for a single operator with this key; a lenient server runs its formula call by call where none was built.
        MissingGraph."""
        found = self._known(digest)
        if found is None:
            name = f"operator {call.formula.__name__}, {part_name(digest)}"
            why = self._missing(name, digest, call.text, OPERATORS_HINT)

            def record(**about: Any) -> RecordedGraph:
                from flagtree.capture.formula import record_formula

                return record_formula(call.formula, call.text, call.rows, call.dense, call.fixed, call.numbers, **about)

            try:
                found = self._built(record, {x.device.type for x in call.rows})
            except FlagtreeError as error:
                why += f"; it was not compiled: {error.render()}"
            if found is None:
                return self._eager(call.eager(), name, why)
        return self._serve(found, digest)

    def quiet(self) -> None:
        """Keep vLLM's own compiled helpers from compiling in this process, as the settings say."""
        torch.compiler.set_stance(STANCES[self.settings.strict] or "default")

    # -- from a bundle -------------------------------------------------------------------------------------------------
    def _known(self, digest: str) -> OpenedBundle | None:
        """A bundle that has the graph: the named one, else for a lenient server what an earlier start built."""
        opened = self.open()
        if opened is not None and digest in opened.parts:
            return opened
        known = stored.find(digest) if self.settings.strict == "off" and not self._to_record(digest) else None
        return None if known is None else open_for_serving(*known)

    def _to_record(self, digest: str) -> bool:
        """Is the graph still to be written down?  Also where an earlier start built it: a recording is of everything that was met."""
        if self.settings.record is None:
            return False
        path = resolved(self.settings.record)
        return not path.exists() or digest.encode() not in path.read_bytes()

    def _serve(self, opened: OpenedBundle, digest: str, served: Served | None = None) -> ServedGraph:
        stance = STANCES[self.settings.strict]
        handle = Handle(str(opened.path), opened.digest, digest, tuple(range(len(opened.arguments(digest)))), stance=stance)
        if served is not None:
            handle = replace(handle, takes=served.takes, extra=served.extra, packed=served.packed, marks=served.marks)
        graph = ServedGraph(handle, opened)
        logger().info("flagtree: %s from %s; %s", part_name(digest), opened.path, line())
        return graph

    # -- at a miss -----------------------------------------------------------------------------------------------------
    def _missing(self, name: str, digest: str, text: str, start: str = GRAPH_HINT) -> str:
        """Count the miss and say what differs; a strict server stops here."""
        opened = self.open()
        why = "no bundle is named" if opened is None else opened.difference(text)
        COUNTS.graphs_missing += 1
        COUNTS.missing.append(name)
        publish()
        if self.settings.strict != "off":
            raise self._refusal(f"{name}, capture key {digest}", why, start)
        logger().warning("flagtree: %s is not in a bundle: %s", name, why)
        return why

    def _eager(self, run: Callable[..., Any], name: str, why: str) -> Eager:
        if self.settings.strict != "off":
            raise self._refusal(name, why)
        logger().warning("flagtree: %s runs call by call: %s", name, why)
        return Eager(run)

    def _refusal(self, where: str, why: str, start: str = GRAPH_HINT) -> MissingGraph:
        record, opened = self.settings.record or "graphs.jsonl", self.open()
        target = opened.bundle.manifest.target if opened is not None else "TARGET"
        hint = f'start once with "record": "{record}", {start}, then: flagtree compile --graphs {record} --target {target}'
        if start == GRAPH_HINT:
            hint += "; for the CPU also without a start: flagtree compile MODEL --for vllm"
        error = MissingGraph("the server needs a graph that the bundle does not have", where=f"{where}; {self.bundle}", why=why, hint=hint)
        sys.stderr.write(f"flagtree: error: {error.render()}\n")  # what a server prints last is a line of its own
        return error

    def _built(self, record: Callable[..., RecordedGraph], devices: set[str]) -> OpenedBundle | None:
        """Record, and on the CPU build: the one place of the serving side that imports the compiler."""
        from flagtree.graphs import build_graphs
        from flagtree.settings import settings

        facts = dict(self.facts)
        versions = {"torch": torch.__version__, "vllm": facts.pop("vllm", "")}
        graph = record(most=int(facts.get("max_tokens", "0")), versions=versions, facts=facts)
        if self.settings.record is not None:
            append_recorded(resolved(self.settings.record), graph)
        if devices != {"cpu"} or not levels():
            logger().warning("flagtree: recorded; for %s compile it: flagtree compile --graphs FILE --target T", ", ".join(devices))
            return None

        def build(target: Any, home: Path) -> Any:
            return build_graphs([graph], target, home, name=graph.name, jobs=settings.jobs, check=False)

        built = stored.find(graph.key)
        if built is None:
            built = stored.build(graph.key, build)
            COUNTS.graphs_compiled += 1
            publish()
        return open_for_serving(*built)
