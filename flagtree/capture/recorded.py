"""A server's graph as a recording: normalised, lowered and written down, for a compile here or elsewhere.

The server has dropped the guards of its trace, so sizes start at one and end at what the recording promises.  Called on a miss only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from flagtree.artifact.recording import LEAST_PROMISE, RecordedGraph
from flagtree.capture.dynamo import placeholder_names, result_of
from flagtree.capture.normalise import normalise
from flagtree.capture.periods import Periods, find_periods
from flagtree.errors import CaptureError, IRError
from flagtree.ir.program import Program, Symbol
from flagtree.ir.text import print_program
from flagtree.lower.decompositions import DECOMPOSITIONS
from flagtree.lower.lowering import lower, lowers
from flagtree.passes.repeat import fold_layers, named_layers
from flagtree.runtime.capture_key import CaptureKey, example_value
from flagtree.serve.graph import Served


def record(
    module: fx.GraphModule,
    key: CaptureKey,
    *,
    most: int,
    is_weight: Callable[[int], bool] = lambda position: False,
    versions: Mapping[str, str] | None = None,
    facts: Mapping[str, str] | None = None,
) -> RecordedGraph:
    """The recording of `module`, whose key is `key`.

    `most`: the largest size that the server will bring; `is_weight` tells which arguments stay the same from call to call.  Raises
    CaptureError when no program carries the graph, or it holds tensors of its own.
    """
    names = placeholder_names(module)
    weights = {name for k, name in enumerate(names) if is_weight(k)}
    periods = find_periods(module, names)
    if periods is not None:
        program, results = _lowered(periods.module, key, weights, most)
        if _repeats(program, periods):
            return _recording(key, program, results, versions, facts, periods)
    return _recording(key, *_lowered(module, key, weights, most), versions, facts)


def _lowered(module: fx.GraphModule, key: CaptureKey, weights: AbstractSet[str], most: int) -> tuple[Program, list[object]]:
    """The program of `module` with the sizes that the recording promises, and what the graph returns."""
    names = placeholder_names(module)
    own = _Own()
    values = [own.value(example_value(n)) for n in module.graph.nodes if n.op == "placeholder"]
    normal = normalise(module, names, values, lowers, DECOMPOSITIONS, own.mode)
    own.check()
    if normal.constants:
        shapes = ", ".join(str(tuple(t.shape)) for t in normal.constants.values())
        raise CaptureError("the graph holds tensors of its own, and a recording carries none", why=f"shapes {shapes}")
    roles = {name: "weight" for name, value in zip(names, values) if isinstance(value, torch.Tensor) and name in weights}
    lowered = lower(normal.graph, f"graph_{key.digest[:16]}", roles)
    return _unguarded(lowered.program, max(most, LEAST_PROMISE)), lowered.results


def _repeats(program: Program, periods: Periods) -> bool:
    """Are the inner layers still equal as lowered?"""
    try:
        fold_layers(program, named_layers(periods.layers))
    except IRError:
        return False
    return True


def _recording(
    key: CaptureKey,
    program: Program,
    results: list[object],
    versions: Mapping[str, str] | None,
    facts: Mapping[str, str] | None,
    periods: Periods | None = None,
) -> RecordedGraph:
    return RecordedGraph(
        key=key.digest,
        text=key.text,
        program=print_program(program),
        results=[tuple(result_of(r, program)) for r in results],
        layers=[list(layer) for layer in periods.layers] if periods else [],
        arguments=list(periods.arguments) if periods else [],
        versions=dict(versions or {}),
        facts=dict(facts or {}),
    )


def record_served(served: Served, key: CaptureKey, example_inputs: Sequence[Any], **about: Any) -> RecordedGraph:
    """As `record`, of a server's prepared graph; `example_inputs` are those of the graph as it came."""
    names = [n.name for n in served.module.graph.nodes if n.op == "placeholder"]
    is_weight = weights_among([*(example_inputs[k] for k in served.takes), *served.extra], names)
    packed = {p.position for p in served.packed}
    return record(served.module, key, is_weight=lambda k: k in packed or is_weight(k), **about)


class _Own:
    """Sizes and tensors like those of the server's trace in a shape environment of our own: what our trace guards on must not become
    a condition of the server's, and what it makes a constant is no size any more."""

    def __init__(self) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.sizes: dict[str, torch.SymInt] = {}

    def value(self, value: Any) -> Any:
        """The value of a placeholder, ours."""
        if isinstance(value, torch.Tensor):
            shape, stride = ([self.size(n) for n in sizes] for sizes in (value.shape, value.stride()))
            with self.mode:
                return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return self.size(value) if isinstance(value, torch.SymInt) else value

    def size(self, value: int | torch.SymInt) -> Any:
        """An integer as it is, a symbol of the server's as ours."""
        if isinstance(value, int):
            return value
        name = str(value.node.expr)
        if not value.node.expr.is_Symbol:
            raise CaptureError(f"the size {name} of an argument is an expression")
        if name not in self.sizes:
            found = value.node.shape_env.var_to_range.get(value.node.expr)
            signed = found is not None and bool(found.lower < 0)
            self.sizes[name] = free_size(self.env, name, int(value.node.hint), signed)
        return self.sizes[name]

    def check(self) -> None:
        """CaptureError when the trace holds for one size only."""
        for name, size in self.sizes.items():
            if not self.env.replace(size.node.expr).free_symbols:
                raise CaptureError(f"the graph works for one size only: {name} = {size.node.hint}")


def free_size(env: ShapeEnv, name: str, hint: int, signed: bool = False) -> Any:
    """A size that the trace may not take for a constant; `signed`: a number rather than a size."""
    source = ConstantSource(f"flagtree_{name}")
    positive = None if signed else True
    symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC, None, positive=positive, do_not_specialize_zero_one=True)
    return env.create_symintnode(symbol, hint=hint, source=source)


def _unguarded(program: Program, most: int) -> Program:
    """Sizes from 1: the trace saw at least 2, since it takes 0 and 1 apart, and the server calls it with 1 all the same."""
    return program.with_(symbols=tuple(_promise(s, most) for s in program.symbols))


def _promise(symbol: Symbol, most: int) -> Symbol:
    if symbol.lo < 0:
        return symbol  # a rank's own number
    return replace(symbol, lo=min(symbol.lo, 1), hi=symbol.hi if symbol.source[0] == "stride" else min(symbol.hi, most))


def weights_among(example_inputs: Sequence[object], names: Sequence[str]) -> Callable[[int], bool]:
    """Parameters and buffers of the model: the tensors that a server passes anew in each call without changing them.  Known by Dynamo's
    names where the example is a fake tensor, as for the pieces of a graph."""
    return lambda k: isinstance(example_inputs[k], torch.nn.Parameter) or "_buffers_" in names[k] or "_parameters_" in names[k]
