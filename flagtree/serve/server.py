"""One server's compiler: a graph of vLLM's in, a callable from the bundle out; at a miss what the settings say.

`graph` runs once a graph at start.  On a hit nothing of the compiler is imported; at a miss it stops, or records and builds.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from flagtree.artifact.recording import part_name
from flagtree.errors import BundleError, FlagtreeError
from flagtree.runtime.capture_key import CaptureKey, Unkeyed, capture_key, example_value
from flagtree.serve import stored
from flagtree.serve.callee import Eager, Handle, ServedGraph
from flagtree.serve.configuration import ServeSettings
from flagtree.serve.counts import COUNTS, line
from flagtree.serve.graph import Served, served_graph
from flagtree.serve.opened import OpenedBundle, open_for_serving

log = logging.getLogger("flagtree")
STANCES = {"off": "", "start": "", "serve": "eager_on_recompile", "paranoid": "fail_on_recompile"}
# what a bundle's graphs were recorded with and a server must agree in
AGREEMENT = {
    "model": "another model", "tensor_parallel": "another tensor-parallel degree", "dtype": "another element type",
    "vllm": "another release of vLLM",
}  # fmt: skip


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
            return self._without(module, served, None, f"it has no capture key: {reason}", example_inputs)
        opened = self.open()
        if opened is not None and opened.graph(key.digest) is not None:
            return self._serve(opened, key, served)
        known = stored.find(key.digest) if self.settings.strict == "off" else None
        if known is not None:
            return self._serve(open_for_serving(*known), key, served)
        COUNTS.graphs_missing += 1
        COUNTS.missing.append(part_name(key.digest))
        why = "no bundle is named" if opened is None else opened.difference(key.text)
        return self._without(module, served, key, why, example_inputs)

    def _serve(self, opened: OpenedBundle, key: CaptureKey, served: Served) -> ServedGraph:
        stance = STANCES[self.settings.strict]
        handle = Handle(str(opened.path), opened.digest, key.digest, served.extra, served.packed, served.marks, stance)
        graph = ServedGraph(handle, opened)
        log.info("flagtree: %s from %s; %s", part_name(key.digest), opened.path, line())
        return graph

    def _without(
        self, module: fx.GraphModule, served: Served, key: CaptureKey | None, why: str, example_inputs: Sequence[Any]
    ) -> Any:
        if self.settings.strict != "off":
            raise self._refusal(key, why)
        log.warning("flagtree: %s is not in a bundle: %s", part_name(key.digest) if key else "a graph", why)
        if key is not None:
            try:
                built = _miss(served, key, self, example_inputs, module)
                if built is not None:
                    COUNTS.graphs_compiled += 1
                    return self._serve(open_for_serving(*built), key, served)
            except FlagtreeError as error:
                log.warning("flagtree: the graph was not compiled: %s", error.render())
        return Eager(module.forward)

    def _refusal(self, key: CaptureKey | None, why: str) -> MissingGraph:
        named = f"{part_name(key.digest)}, capture key {key.digest}" if key else "a graph without a capture key"
        record = self.settings.record or "graphs.jsonl"
        hint = (
            f"start once with \"strict\": \"off\", \"record\": \"{record}\" and -cc.backend=flagtree.serve.bundles.store, then: "
            f"flagtree compile --graphs {record} --target cpu"
        )
        error = MissingGraph("the server needs a graph that the bundle does not have", where=f"{named}; {self.bundle}", why=why, hint=hint)
        sys.stderr.write(f"flagtree: error: {error.render()}\n")  # what a server prints last is a line of its own
        return error


def _miss(
    served: Served, key: CaptureKey, server: Server, example_inputs: Sequence[Any], module: fx.GraphModule
) -> tuple[Path, str] | None:
    """Record and, for the CPU, build: the one place of the serving side that imports the compiler."""
    from flagtree.capture.recorded import record, weights_among
    from flagtree.graphs import build_graphs
    from flagtree.runtime.cpu import levels
    from flagtree.settings import settings

    names = [n.name for n in served.module.graph.nodes if n.op == "placeholder"]
    given = [*example_inputs, *served.extra]
    facts = dict(server.facts)
    most = int(facts.get("max_tokens", "0"))
    versions = {"torch": torch.__version__, "vllm": facts.pop("vllm", "")}
    is_weight = weights_among(given, names)
    graph = record(served.module, key, most=most, is_weight=is_weight, versions=versions, facts=facts)
    if server.settings.record is not None:
        from flagtree.artifact.recording import append_recorded
        from flagtree.serve.configuration import resolved

        append_recorded(resolved(server.settings.record), graph)
    devices = {v.device.type for n in module.graph.nodes if n.op == "placeholder" and isinstance(v := example_value(n), torch.Tensor)}
    if devices != {"cpu"} or not levels():
        log.warning("flagtree: recorded; graphs on %s are compiled with: flagtree compile --graphs FILE --target T", ", ".join(devices))
        return None

    def build(target: Any, home: Path) -> Any:
        return build_graphs([graph], target, home, name=graph.name, jobs=settings.jobs, check=False)

    return stored.build(key.digest, build)


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



