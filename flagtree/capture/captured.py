"""A captured part of a model: the traced graph, and a qualified name for every argument at any depth.

Invariant: `placeholders` are the graph's placeholders in order; a name of one layer gives the name of every layer.
Made by `capture/model.py`; read by lowering, which repeats an interior layer to the full depth, and by `capture/traffic.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from flagtree.capture.shares import Share
from flagtree.passes.repeat import Run


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One argument of the graph.  `role`: weight, constant, input or state; `qualified`: `model.layers.0.self_attn.q_proj.weight`,
    `ids` or `k_cache.0`; `value`: the fake tensor (CPU) with its symbolic shape."""

    name: str
    role: str
    qualified: str
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class CapturedModel:
    """A part of a model, traced at true width with a few layers of each kind.

    `graph_module` takes `placeholders` in order and returns a tuple of one tensor, called `result`: the logits [batch, vocabulary] of each
    sequence's last token (the caches are written in place), or a tower's features.  `dims` maps batch, sequence, context and the like to
    their symbol in the graph (a size whose bounds are equal is a number and has none), `ranges` each symbol to its inclusive bounds,
    `constants` each constant's qualified name to its values.  `layer_prefix` is `model.layers.`; names have the layer's number in the model
    at full depth, `runs` tells which layers are there.  `shares`: what each rank has of the weights that are divided, by name.
    """

    name: str
    part: str
    result: str
    graph_module: torch.fx.GraphModule
    placeholders: tuple[Placeholder, ...]
    dims: Mapping[str, str]
    ranges: Mapping[str, tuple[int, int]]
    constants: Mapping[str, torch.Tensor]
    runs: tuple[Run, ...]
    layer_prefix: str
    shares: Mapping[str, Share] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Layers of the full model."""
        return sum(run.count for run in self.runs)

    @property
    def captured_layers(self) -> int:
        """Layers of the graph."""
        return sum(run.captured for run in self.runs)

    @property
    def inner_layer(self) -> int:
        """A layer that stands for the most others: an interior one of the longest run."""
        run = max(self.runs, key=lambda run: run.count)
        return run.first + min(1, run.captured - 1)

    def layer_of(self, qualified: str) -> int | None:
        """The layer that a weight, cache or module path belongs to, None for what stands outside the layers."""
        found = re.match(self._layer_pattern, qualified)
        return int(found[2]) if found else None

    def at_layer(self, qualified: str, layer: int | str) -> str:
        """The same weight, cache or module of another layer; names outside the layers stay as they are."""
        return re.sub(self._layer_pattern, lambda found: f"{found[1]}{layer}", qualified, count=1)

    @property
    def _layer_pattern(self) -> str:
        return layer_pattern(self.layer_prefix)

    def layer_of_node(self, node: torch.fx.Node) -> int | None:
        """The layer in which a node of the graph was traced, None outside the layers."""
        stack = node.meta.get("nn_module_stack") or {}
        layers = [layer for path, _ in stack.values() if (layer := self.layer_of(path)) is not None]
        return layers[-1] if layers else None

    def qualified_names(self, role: str) -> tuple[str, ...]:
        """Names of one role at the full depth: those outside the layers, then layer by layer, in the order of the capture."""
        names = [p.qualified for p in self.placeholders if p.role == role]
        outside = [n for n in names if self.layer_of(n) is None]
        inside = {run.first: [n for n in names if self.layer_of(n) == run.first] for run in self.runs}
        each = [self.at_layer(n, run.first + k) for run in self.runs for k in range(run.count) for n in inside[run.first]]
        return (*outside, *each)

    def run(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Execute the traced graph eagerly on tensors by qualified name (constants may be left out): its result.

        KeyError names a tensor that is missing.
        """
        arguments = [values[p.qualified] if p.qualified in values else self.constants[p.qualified] for p in self.placeholders]
        with torch.no_grad():
            return torch.fx.Interpreter(self.graph_module).run(*arguments)[0]


def layer_pattern(prefix: str) -> str:
    """A regular expression for names inside layers: what stands before the number, the number."""
    return rf"^({re.escape(prefix)}|k_cache\.|v_cache\.|bounds\.)(\d+)(?=\.|$)"
