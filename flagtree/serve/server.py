"""One server's compiler: a graph of vLLM's in, a callable from the bundle out; at a miss what the settings say.

`graph` runs once a graph at start.  On a hit nothing of the compiler is imported; at a miss it stops, or records and builds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from flagtree.artifact.recording import RecordedGraph, append_recorded, part_name
from flagtree.errors import BundleError, FlagtreeError
from flagtree.runtime.capture_key import Unkeyed, capture_key, example_value
from flagtree.runtime.cpu import levels
from flagtree.serve import stored
from flagtree.serve.callee import Eager, Handle, ServedGraph
from flagtree.serve.configuration import ServeSettings, resolved
from flagtree.serve.counts import COUNTS, line, logger
from flagtree.serve.graph import Served, served_graph
from flagtree.serve.opened import OpenedBundle, open_for_serving

STANCES = {"off": "", "start": "", "serve": "eager_on_recompile", "paranoid": "fail_on_recompile"}
# what a bundle's graphs were recorded with and a server must agree in
AGREEMENT = {
    "model": "another model", "tensor_parallel": "another tensor-parallel degree", "dtype": "another element type",
    "vllm": "another release of vLLM",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FormulaCall:
    """What is traced when a single operator has no kernel: `formula(*rows, *fixed, *numbers)`, of which `text` is the key's text;
    `dense`: which of `rows` lie one after another."""

    formula: Callable[..., Any]
    text: str
    rows: tuple[torch.Tensor, ...]
    dense: tuple[bool, ...]
    fixed: tuple[torch.Tensor | None, ...]
    numbers: tuple


GRAPH_HINT = '"strict": "off", no bundle and -cc.backend=flagtree.serve.bundles.store'
OPERATORS_HINT = '"strict": "off", no bundle and "custom_ops": true'


class MissingGraph(FlagtreeError):
    """A graph of the server that the bundle does not have, in a strict mode."""


@dataclass(frozen=True)
class Server:
    """`settings` and `facts` of one server, hashable.  `bundle`: path; `digest`: what it has to be."""

    settings: ServeSettings
    facts: tuple[tuple[str, str], ...]
    bundle: str = ""
    digest: str = ""

    def open(self) -> OpenedBundle | None:
        """The bundle, checked against the server.  BundleError, UntrustedBundle."""
        if not self.bundle:
            return None
        opened = open_for_serving(Path(self.bundle), self.digest)
        _check_agreement(opened, dict(self.facts))
        return opened

    def graph(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        """The callable for one graph: vLLM's contract of a compiler in mode 2."""
        served = served_graph(module)
        try:
            key = capture_key(served.module, {"format": "vllm 1"}, inference=True)
        except Unkeyed as reason:
            return self._eager(module, "a graph", f"it has no capture key: {reason}")
        known = self._known(key.digest)
        if known is not None:
            return self._serve(known, key.digest, served)
        name = part_name(key.digest)
        why = self._missing(name, key.digest, key.text)
        tensors = [v for n in module.graph.nodes if n.op == "placeholder" and isinstance(v := example_value(n), torch.Tensor)]

        def record(**about: Any) -> RecordedGraph:
            from flagtree.capture.recorded import record, weights_among

            names = [n.name for n in served.module.graph.nodes if n.op == "placeholder"]
            is_weight = weights_among([*(example_inputs[k] for k in served.takes), *served.extra], names)
            return record(served.module, key, is_weight=is_weight, **about)

        try:
            built = self._built(record, {t.device.type for t in tensors})
        except FlagtreeError as error:
            return self._eager(module, name, f"{why}; it was not compiled: {error.render()}")
        return self._eager(module, name, why) if built is None else self._serve(built, key.digest, served)

    def operator(self, digest: str, call: FormulaCall) -> ServedGraph:
        """The callable for a single operator with this key.  MissingGraph, and what building it raises."""
        found = self._known(digest)
        if found is None:
            why = self._missing(part_name(digest), digest, call.text, OPERATORS_HINT)

            def record(**about: Any) -> RecordedGraph:
                from flagtree.capture.formula import record_formula

                return record_formula(call.formula, call.text, call.rows, call.dense, call.fixed, call.numbers, **about)

            found = self._built(record, {"cpu"})
            if found is None:
                raise MissingGraph("no kernel for an operator", where=part_name(digest), why=why, hint="docs/serving.md")
        return self._serve(found, digest)

    # -- from a bundle -------------------------------------------------------------------------------------------------
    def _known(self, digest: str) -> OpenedBundle | None:
        """A bundle that has the graph: the named one, else for a lenient server what an earlier start built."""
        opened = self.open()
        if opened is not None and digest in opened.parts:
            return opened
        known = stored.find(digest) if self.settings.strict == "off" else None
        return None if known is None else open_for_serving(*known)

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
        if self.settings.strict != "off":
            raise self._refusal(f"{name}, capture key {digest}", why, start)
        logger().warning("flagtree: %s is not in a bundle: %s", name, why)
        return why

    def _eager(self, module: fx.GraphModule, name: str, why: str) -> Eager:
        if self.settings.strict != "off":
            raise self._refusal(name, why)
        logger().warning("flagtree: %s runs call by call: %s", name, why)
        return Eager(module.forward)

    def _refusal(self, where: str, why: str, start: str = GRAPH_HINT) -> MissingGraph:
        record = self.settings.record or "graphs.jsonl"
        hint = f'start once with "record": "{record}", {start}, then: flagtree compile --graphs {record} --target cpu'
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

        built = stored.build(graph.key, build)
        COUNTS.graphs_compiled += 1
        return open_for_serving(*built)


def facts_of(config: Any) -> tuple[tuple[str, str], ...]:
    """What is known of the model and the server, by name."""
    model = config.model_config
    architectures = getattr(model, "architectures", None) or ["?"]
    scheduler = getattr(config, "scheduler_config", None)
    return (
        ("model", str(architectures[0])),
        ("dtype", str(model.dtype).removeprefix("torch.")),
        ("tensor_parallel", str(config.parallel_config.tensor_parallel_size)),
        ("max_tokens", str(getattr(scheduler, "max_num_batched_tokens", 0) or 0)),
        ("vllm", _vllm_version()),
    )


def _vllm_version() -> str:
    return str(getattr(sys.modules.get("vllm"), "__version__", ""))


def check_server(config: Any) -> None:
    """What a whole graph cannot work with, said before weights are loaded.  FlagtreeError."""
    compilation = config.compilation_config
    if int(getattr(compilation, "mode", 0) or 0) != 2:
        raise FlagtreeError("vLLM's compile mode is not 2", why=f"it is {compilation.mode}", hint="-cc.mode=2")
    if "none" not in list(getattr(compilation, "custom_ops", [])):
        raise FlagtreeError(
            "vLLM's own operators are on: the graph would hold calls where it could hold what they compute",
            why=f"custom_ops is {list(compilation.custom_ops)}, the default beside another compiler than Inductor",
            hint="-cc.custom_ops='[\"none\"]'",
        )
    if getattr(config, "lora_config", None) is not None:
        why = "its adapters change what is computed from request to request"
        raise FlagtreeError("LoRA is on", why=why, hint="serve without flagtree, or without LoRA")


def _check_agreement(opened: OpenedBundle, facts: Mapping[str, str]) -> None:
    for name, what in AGREEMENT.items():
        known = sorted({f[name] for f in opened.facts() if f.get(name)})
        if known and facts.get(name) and not any(_agree(name, facts[name], k) for k in known):
            raise BundleError(
                f"the bundle is for {what}",
                where=str(opened.path),
                why=f"{name.replace('_', ' ')}: the bundle has {', '.join(known)}, the server {facts[name]}",
                hint="record the graphs of this server and compile them: docs/serving.md",
            )


def _agree(name: str, a: str, b: str) -> bool:
    if name == "vllm":
        return a.split(".")[:2] == b.split(".")[:2]
    return a == b



