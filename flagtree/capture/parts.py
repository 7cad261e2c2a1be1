"""One part of a model (prefill, decode), captured and lowered once for all targets, with its bytes before fusion.

Between `capture/model.py` and the pipeline; what a target changes starts after this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

import flagtree.runtime.operators  # noqa: F401  the operators that the capture records
from flagtree.capture.captured import CapturedModel
from flagtree.capture.model import capture
from flagtree.capture.model_spec import ModelSpec
from flagtree.capture.normalise import normalise
from flagtree.capture.traffic import Traffic, count_traffic
from flagtree.lower.decompositions import DECOMPOSITIONS
from flagtree.lower.lowering import Lowered, lower, lowers
from flagtree.passes.repeat import Layers

# the sizes at which bytes are counted and reported: one sequence of 2048 tokens, and one token after 2047 others
# (an image of 1024 tokens or patches in 64 windows, or one whole image, for a tower)
REFERENCE = {
    "prefill": {"batch": 1, "sequence": 2048, "context": 2048, "features": 1},
    "decode": {"batch": 1, "context": 2048},
    "vision": {"images": 1, "patches": 1024, "tokens": 1024, "edges": 65, "side": 13},
}


@dataclass(frozen=True)
class CapturedPart:
    """`graph`: normalised ATen FX; `lowered`: its Program, a few layers deep; `before`: bytes of each call unfused at `reference`."""

    captured: CapturedModel
    graph: fx.Graph
    lowered: Lowered
    before: Traffic
    reference: Mapping[str, int]

    @property
    def name(self) -> str:
        return self.captured.part

    @property
    def constants(self) -> Mapping[str, torch.Tensor]:
        return self.captured.constants

    @property
    def layers(self) -> Layers:
        c = self.captured
        return Layers(c.runs, c.layer_of, c.at_layer)


def capture_part(spec: ModelSpec, part: str, dtype: str | None = None) -> CapturedPart:
    """Capture, normalise and lower one part.  Raises CaptureError as `capture` does."""
    captured = capture(spec, part, dtype=dtype)
    names = [p.qualified for p in captured.placeholders]
    normal = normalise(captured.graph_module, names, [p.value for p in captured.placeholders], lowers, DECOMPOSITIONS)
    roles = {p.qualified: p.role for p in captured.placeholders}
    named = {symbol: name for name, symbol in captured.dims.items()}
    lowered = _promised(lower(normal.graph, captured.name, roles, symbols=named), captured)
    bounds = spec.bounds(part).sizes
    sizes = {name: _within(size, bounds[name]) for name, size in REFERENCE[part].items() if name in bounds}
    if "context" in sizes:
        sizes["sequence"] = min(sizes.get("sequence", 1), sizes["context"])
    reference = {name: size for name, size in sizes.items() if name in captured.dims}
    return CapturedPart(captured, normal.graph, lowered, count_traffic(captured, **sizes), reference)


def _within(size: int, bounds: tuple[int, int]) -> int:
    return min(max(size, bounds[0]), bounds[1])


def _promised(lowered: Lowered, captured: CapturedModel) -> Lowered:
    """The bounds of the description in place of the trace's, which leave out size 1; `capture` has checked that they hold."""
    ranges = {name: captured.ranges[symbol] for name, symbol in captured.dims.items()}
    symbols = (replace(s, lo=ranges[s.name][0], hi=ranges[s.name][1]) if s.name in ranges else s for s in lowered.program.symbols)
    return replace(lowered, program=lowered.program.with_(symbols=tuple(symbols)))
