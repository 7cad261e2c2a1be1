"""Weight-free capture of one part of a model: a description in, the traced graph with named weights, inputs and state out.

Invariant: no weight is read or allocated and no network is touched; every dynamic size keeps exactly the bounds of the description.
Between `capture/build.py` and `capture/normalise.py`; a few layers are traced and `CapturedModel` names those of the full depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from flagtree.capture.architectures import architecture
from flagtree.capture.build import PER_GRAPH, build, layer_runs
from flagtree.capture.captured import CapturedModel, Placeholder, layer_pattern
from flagtree.capture.inputs import Argument, Part, arguments_of, part_module
from flagtree.capture.model_spec import Bounds, ModelSpec
from flagtree.capture.ranks import divide
from flagtree.capture.shares import Share
from flagtree.errors import CaptureError
from flagtree.passes.repeat import Run

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# example sizes of a trace: distinct, and none that a model might use as a width, so that a specialised size shows
_EXAMPLE = {"batch": 3, "sequence": 11, "context": 53, "features": 7, "images": 5, "patches": 19, "tokens": 13, "edges": 6, "side": 9}

_WRAPPER = "model."  # where a part keeps the model


def capture(spec: ModelSpec, part: str, layers: int | None = None, dtype: str | None = None) -> CapturedModel:
    """Trace `prefill`, `decode` or `vision` of a model with `layers` layers of each kind (the recipe's number by default) at true width.

    Raises CaptureError when transformers lacks the class, the configuration is not one of its kind, the model needs what our operators
    do not compute, or a dynamic size was specialised; UnknownName for a part that the model lacks, or another dtype.
    """
    bounds, element = spec.bounds(part), getattr(torch, spec.element(dtype))
    where, runs = f"{spec.name}, {part}", layer_runs(spec, part, layers)
    model = build(spec, part, runs, element)
    shares = divide(model, spec, part)
    constants = constants_of(model)
    arguments = arguments_of(spec, part, runs, element)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        _replace_tensors(model)
        values, dims = _examples(bounds, arguments)
    program = _export(part_module(spec, part, model), values, dims, where)
    prefix = _layer_prefix(model, sum(run.captured for run in runs), where)
    return _Naming(spec, part, runs, prefix, constants, _tied_names(model)).captured(program, arguments, shares)


def constants_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Values of the tables that are not weights (rotary frequencies): the owning modules built once more, on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if module._non_persistent_buffers_set:
            try:
                with torch.device("cpu"):
                    real = type(module)(module.config)
            except (TypeError, AttributeError) as error:
                why = f"{type(module).__name__} cannot be built from the configuration alone: {error}"
                raise CaptureError("a table that is not a weight cannot be computed", where=path, why=why, hint=PER_GRAPH) from error
            for name in sorted(module._non_persistent_buffers_set):
                found[f"{path}.{name}"] = real.get_buffer(name).detach().clone()
    return found


def _replace_tensors(model: torch.nn.Module) -> None:
    """Meta tensors become fake CPU tensors: decompositions on meta leave calls behind that no lowering knows."""
    made: dict[int, torch.nn.Parameter] = {}  # tied weights stay one tensor
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                module._parameters[name] = made.setdefault(id(weight), torch.nn.Parameter(empty, requires_grad=False))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _examples(bounds: Bounds, arguments: Sequence[Argument]) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]]]:
    """Fake arguments of a part by name, and their dynamic dimensions."""
    limits = {name: _traced(value) for name, value in bounds.sizes.items()}
    sizes = {name: max(low, min(_EXAMPLE[name], high)) for name, (low, high) in limits.items()}
    dim = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in limits.items() if low < high}
    values: dict[str, torch.Tensor] = {}
    dims: dict[str, dict[int, Any]] = {}
    for argument in arguments:
        shape = [sizes[n] if isinstance(n, str) else n for n in argument.shape]
        values[argument.name] = torch.empty(shape, dtype=argument.dtype)
        dims[argument.name] = {d: dim[n] for d, n in enumerate(argument.shape) if isinstance(n, str) and n in dim}
    return values, dims


def _traced(limits: tuple[int, int]) -> tuple[int, int]:
    """The bounds that are traced: export treats 1 apart, so a size of 1 to 2 would be the number 2 to it."""
    low, high = limits
    return (low, max(high, 3)) if low < high else limits


def _export(part: Part, values: dict[str, torch.Tensor], dims: dict[str, dict[int, Any]], where: str) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(part.eval(), (values,), dynamic_shapes=(dims,), strict=False)
    except CaptureError:
        raise
    except Exception as error:  # export raises what the model's own code raises, and its own constraint violations
        hint = f"TORCH_LOGS=+dynamic names the line of the model's code; {PER_GRAPH}"
        raise CaptureError("the model cannot be traced", where=where, why=f"{type(error).__name__}: {error}", hint=hint) from error


def _layer_prefix(model: torch.nn.Module, layers: int, where: str) -> str:
    """`model.layers.`: the only list of `layers` modules that each hold an attention of that layer."""
    found = [
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == layers
        and all(any(getattr(m, "layer_idx", None) == i for m in layer.modules()) for i, layer in enumerate(module))
    ]
    if len(found) != 1:
        why = f"candidates: {', '.join(found) or 'none'}"
        raise CaptureError("the decoder layers cannot be told apart", where=where, why=why, hint=PER_GRAPH)
    return found[0]


class _Naming:
    """Names and roles for the placeholders of an exported graph, in the model's own names at full depth; sizes and counts checked."""

    def __init__(
        self, spec: ModelSpec, part: str, runs: tuple[Run, ...], prefix: str, tables: Mapping[str, torch.Tensor], tied: Mapping[str, str]
    ) -> None:
        self.spec, self.part, self.runs, self.tables, self.tied = spec, part, runs, tables, tied
        self.where = f"{spec.name}, {part}"
        self.traced_pattern = layer_pattern(prefix)
        self.numbers = [run.first + k for run in runs for k in range(run.captured)]
        self.prefix = self._renamed(prefix)

    def _renamed(self, name: str) -> str:
        for old, new in architecture(self.spec.architecture).renamed:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def actual(self, name: str) -> str:
        """A traced name as the checkpoint says it: layers by their number at full depth."""
        numbered = re.sub(self.traced_pattern, lambda found: f"{found[1]}{self.numbers[int(found[2])]}", name, count=1)
        return self._renamed(numbered)

    def captured(self, program: ExportedProgram, arguments: Sequence[Argument], shares: Mapping[str, Share]) -> CapturedModel:
        """The captured model.  CaptureError where the trace is not what the description promises."""
        placeholders = self._placeholders(program, arguments)
        program.graph_module.recompile()
        self._name_modules(program.graph_module)
        dims, ranges = _sizes(self.spec.bounds(self.part), arguments, placeholders, program, self.where)
        constants = {p.qualified: self._table(p.qualified) for p in placeholders if p.role == "constant"}
        found = CapturedModel(
            f"{self.spec.name}.{self.part}", self.part, "features" if self.part == "vision" else "logits", program.graph_module,
            tuple(placeholders), dims, ranges, constants, self.runs, self.prefix, {self.actual(n): share for n, share in shares.items()},
        )  # fmt: skip
        self._check(found)
        return found

    def _placeholders(self, program: ExportedProgram, arguments: Sequence[Argument]) -> list[Placeholder]:
        graph = program.graph_module.graph
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        given = iter(arguments)
        placeholders: list[Placeholder] = []
        for argument in program.graph_signature.input_specs:
            node = nodes[argument.arg.name]
            value = node.meta.get("val")
            target = (argument.target or "").removeprefix(_WRAPPER)
            if argument.kind is InputKind.PARAMETER or (argument.kind is InputKind.BUFFER and argument.persistent):
                role, qualified = "weight", self.actual(self.tied.get(target, target))
            elif argument.kind is InputKind.BUFFER and target in self.tables:
                role, qualified = "constant", self.actual(target)
            elif argument.kind is InputKind.USER_INPUT:
                declared = next(given)
                role, qualified = declared.role, self.actual(declared.name)
            else:
                hint = "register the tensor that the model's code makes as a buffer of its module"
                why = f"kind {argument.kind.name}"
                raise CaptureError(f"the trace holds a tensor of its own, {argument.arg.name}", where=self.where, why=why, hint=hint)
            tied = target in self.tied.values() or target in self.tied
            if not node.users and (role == "constant" or tied):  # a table nobody reads, the second name of a tied weight
                graph.erase_node(node)
            else:
                placeholders.append(Placeholder(node.name, role, qualified, value))
        return placeholders

    def _table(self, qualified: str) -> torch.Tensor:
        return next(value for name, value in self.tables.items() if self.actual(name) == qualified)

    def _name_modules(self, graph_module: torch.fx.GraphModule) -> None:
        """Module paths as the model's own: `model.layers.0.mlp`, without the wrapper that was exported."""
        for node in graph_module.graph.nodes:
            if stack := node.meta.get("nn_module_stack"):
                inside = {key: (path, kind) for key, (path, kind) in stack.items() if path.startswith(_WRAPPER)}
                named = {key: (self.actual(path.removeprefix(_WRAPPER)), kind) for key, (path, kind) in inside.items()}
                node.meta["nn_module_stack"] = named

    def _check(self, found: CapturedModel) -> None:
        for run in self.runs:
            by_layer = [sorted(found.at_layer(n, 0) for n in _weights_of(found, run.first + k)) for k in range(run.captured)]
            if any(names != by_layer[0] for names in by_layer):
                hint = "only models whose layers repeat are captured"
                raise CaptureError("the decoder layers are not alike", where=self.where, hint=hint)
        recipe = self.spec.capture
        promised = recipe.vision_weights if self.part == "vision" else recipe.weights
        count = len(found.qualified_names("weight"))
        if promised not in (None, count):
            hint = f"correct `config` or `capture`; {count} is what follows from this configuration"
            raise CaptureError(f"the model has {count} weights, its description says {promised}", where=self.where, hint=hint)


def _weights_of(captured: CapturedModel, layer: int) -> list[str]:
    return [p.qualified for p in captured.placeholders if p.role == "weight" and captured.layer_of(p.qualified) == layer]


def _tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Every further name of a weight that has several, with the first one: that is the name in a checkpoint."""
    first: dict[int, str] = {}
    tied = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(weight), name)) != name:
            tied[name] = known
    return tied


def _sizes(
    bounds: Bounds, arguments: Sequence[Argument], placeholders: Sequence[Placeholder], program: ExportedProgram, where: str
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """The symbol of each dynamic size and its range.  CaptureError when a size became a number, a range shrank or a symbol is unknown."""
    values = [p.value for p in placeholders if p.role in ("input", "state")]
    found: dict[str, object] = {}
    for argument, value in zip(arguments, values, strict=True):
        found |= {name: size for name, size in zip(argument.shape, value.shape, strict=True) if isinstance(name, str)}
    dims: dict[str, str] = {}
    ranges = {str(symbol): (int(limits.lower), int(limits.upper)) for symbol, limits in program.range_constraints.items()}
    for name, size in found.items():
        limits = bounds.sizes.get(name, (1, 1))
        if limits[0] == limits[1]:
            continue
        symbol = str(size.node.expr) if isinstance(size, torch.SymInt) else None
        if symbol is None or ranges.get(symbol) != _traced(limits):
            got = f"the fixed size {size}" if symbol is None else f"{symbol} in {ranges.get(symbol)}"
            why = f"{got} where {limits} is promised"
            hint = f"TORCH_LOGS=+dynamic names the line; or bound `{name}` to what the code allows"
            raise CaptureError(f"the {name} size was specialised by the model's code", where=where, why=why, hint=hint)
        dims[name], ranges[symbol] = symbol, limits
    if extra := set(ranges) - set(dims.values()):
        why = f"symbols {', '.join(sorted(extra))}"
        raise CaptureError("the model has sizes that depend on data", where=where, why=why, hint=PER_GRAPH)
    return dims, ranges
