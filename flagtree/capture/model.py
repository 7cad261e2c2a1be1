"""Weight-free capture of a decoder: a model description in, the traced graph with named weights, inputs and state out.

Invariant: no weight is read or allocated and no network is touched; every dynamic size keeps exactly the bounds of the description.
Between `capture/model_spec.py` and `capture/normalise.py`; a few layers are traced and `CapturedModel` names those of the full depth.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from flagtree.capture.attention import register_attention
from flagtree.capture.cache import ExplicitCache
from flagtree.capture.captured import CapturedModel, Placeholder
from flagtree.capture.model_spec import Bounds, ModelSpec
from flagtree.errors import CaptureError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers import PreTrainedConfig, PreTrainedModel

# example sizes of a trace: distinct, and none that a model might use as a width, so that a specialised size shows
_EXAMPLE = {"batch": 3, "sequence": 11, "context": 53}

_WRAPPER = "model."  # where `_Part` keeps the model

# what to try where a whole model cannot be captured
_PER_GRAPH = '`torch.compile(model, backend="flagtree")` captures graph by graph and leaves the rest of the code as it is'
_COMPARE_CONFIG = "compare `config` in the description with the model's own config.json"


class _Part(torch.nn.Module):
    """What is exported: ids [B, S], start [B], last [B] (prefill only) and the caches in, logits [B, vocabulary] out.

    The rows that the output head shall see are picked in a hook before the head, so that whatever a model class computes after its
    head (scaling, soft caps) stays in the graph.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: torch.Tensor,
        start: torch.Tensor,
        last: torch.Tensor | None,
        k_cache: Sequence[torch.Tensor],
        v_cache: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        def pick(head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            hidden = arguments[0]
            return (hidden[:, 0] if last is None else hidden[torch.arange(hidden.shape[0], device=hidden.device), last],)

        positions = start[:, None]
        if last is not None:
            positions = positions + torch.arange(ids.shape[1], device=ids.device)
        cache = ExplicitCache(k_cache, v_cache, start)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            found = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, flagtree_cache=cache)
        finally:
            hook.remove()
        return found.logits


def capture(spec: ModelSpec, part: str, layers: int | None = None, dtype: str | None = None) -> CapturedModel:
    """Trace `prefill` or `decode` of a model with `layers` decoder layers (the recipe's number by default) at its true width.

    Raises CaptureError when transformers lacks the class, the configuration is not one of its kind, the model needs what
    `flagtree::attention` does not compute, or a dynamic size was specialised; UnknownName for another part or dtype.
    """
    bounds = spec.bounds(part)
    layers, element = spec.traced_layers(layers), getattr(torch, spec.element(dtype))
    where = f"{spec.name}, {part}"
    model, config = _build(spec, layers, element)
    constants = _constants(model, config)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        _replace_tensors(model)
        arguments, dims = _arguments(spec, part, bounds, layers, element)
    program = _export(_Part(model), arguments, dims, where)
    names = _argument_names(part, layers)
    return _captured(spec, part, layers, program, names, constants, _tied_names(model), _layer_prefix(model, layers, where))


def _build(spec: ModelSpec, layers: int, element: torch.dtype) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """The model on the meta device, `layers` deep, with our attention."""
    try:
        import transformers
    except ImportError as error:
        hint = "pip install 'flagtree-toolkit[models]'"
        raise CaptureError("capturing a model needs transformers", where=spec.name, why=str(error), hint=hint) from error
    model_class = getattr(transformers, spec.architecture, None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        raise CaptureError(
            f"transformers {transformers.__version__} has no model class '{spec.architecture}'", where=spec.name,
            hint="`architecture` in the description is the class named under \"architectures\" in the model's config.json",
        )
    config = _configuration(spec, model_class.config_class, layers)
    config._attn_implementation = register_attention()
    try:
        with _default_dtype(element), torch.device("meta"):
            model: PreTrainedModel = model_class(config)
    except Exception as error:  # whatever a model's own code raises for numbers that do not fit together
        why = f"{type(error).__name__}: {error}"
        raise CaptureError("the model cannot be built", where=spec.name, why=why, hint=_COMPARE_CONFIG) from error
    return model.eval().requires_grad_(False), config


def _configuration(spec: ModelSpec, config_class: type[PreTrainedConfig] | None, layers: int) -> PreTrainedConfig:
    """The description as transformers' configuration with `layers` layers.

    Refused: a field that transformers would ignore where another was meant, a width that transformers would make up, and what a plain
    full-attention decoder lacks, at any depth.
    """
    if config_class is None:
        raise CaptureError(f"{spec.architecture} has no configuration class", where=spec.name, hint="name the class of one model family")
    known = set(config_class().to_dict()) | {"rope_theta", "rope_scaling", "model_type"}
    for field in spec.config:
        near = difflib.get_close_matches(field, sorted(known - set(spec.config)), n=1, cutoff=0.85) if field not in known else ()
        if near:
            raise CaptureError(f"{config_class.__name__} has no field '{field}'", where=spec.name, hint=f"closest: {near[0]}")
    kind = spec.config.get("model_type", config_class.model_type)
    if kind != config_class.model_type:
        raise CaptureError(
            f"model_type '{kind}' is not that of {spec.architecture}", where=spec.name, hint=f"it is {config_class.model_type}"
        )
    if spec.config.get("quantization_config"):
        raise CaptureError("a quantised configuration cannot be captured", where=spec.name, hint="describe the unquantised model")
    fields = {name: value for name, value in spec.config.items() if name != "model_type"}
    try:
        full = config_class(**fields)
        kinds = getattr(full, "layer_types", None) or []
        config = config_class(**{**fields, "num_hidden_layers": layers, **({"layer_types": kinds[:layers]} if kinds else {})})
    except Exception as error:  # transformers validates with several exception types; each means a wrong configuration
        raise CaptureError("transformers refuses the configuration", where=spec.name, why=str(error), hint=_COMPARE_CONFIG) from error
    if others := sorted(set(kinds) - {"full_attention"}):
        why = f"layer_types holds {', '.join(others)}"
        raise CaptureError("only full attention is captured", where=spec.name, why=why, hint=_PER_GRAPH)
    rope = getattr(full, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        why = f"rotary frequencies of type '{rope['rope_type']}' change with the length of the text"
        raise CaptureError("the rotary positions depend on data", where=spec.name, why=why, hint=_PER_GRAPH)
    for field, described in (("head_dim", spec.head_width), ("num_key_value_heads", spec.key_heads)):
        taken = getattr(full, field, None) or described
        if taken != described:
            why = f"the description means {described}, transformers would take {taken}"
            raise CaptureError(f"the field '{field}' is missing", where=spec.name, why=why, hint="give it; no default is taken")
    return config


@contextlib.contextmanager
def _default_dtype(element: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(element)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _constants(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Values of the tables that are not weights (rotary frequencies): the owning modules built once more, on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if module._non_persistent_buffers_set:
            try:
                with torch.device("cpu"):
                    real = type(module)(config)
            except TypeError as error:
                why = f"{type(module).__name__} cannot be built from the configuration alone: {error}"
                raise CaptureError("a table that is not a weight cannot be computed", where=path, why=why, hint=_PER_GRAPH) from error
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


def _arguments(spec: ModelSpec, part: str, bounds: Bounds, layers: int, element: torch.dtype) -> tuple[tuple, tuple]:
    """Fake arguments of `_Part.forward` and their dynamic dimensions."""
    limits = {name: _traced(value) for name in _EXAMPLE if (value := getattr(bounds, name))}
    sizes = {name: max(low, min(_EXAMPLE[name], high)) for name, (low, high) in limits.items()}
    dim = {name: torch.export.Dim(name, min=low, max=high) if low < high else None for name, (low, high) in limits.items()}
    batch, tokens, context = sizes["batch"], sizes.get("sequence", 1), sizes["context"]

    def cache() -> list[torch.Tensor]:
        return [torch.empty(batch, spec.key_heads, context, spec.head_width, dtype=element) for _ in range(layers)]

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64)

    last = integers(batch) if part == "prefill" else None
    arguments = (integers(batch, tokens), integers(batch), last, cache(), cache())
    rows = {0: dim["batch"]}
    cached = [{0: dim["batch"], 2: dim["context"]}] * layers
    ids = {0: dim["batch"], 1: dim["sequence"]} if "sequence" in dim else rows
    return arguments, (ids, rows, None if last is None else rows, cached, cached)


def _traced(limits: tuple[int, int]) -> tuple[int, int]:
    """The bounds that are traced: export treats 1 apart, so a size of 1 to 2 would be the number 2 to it."""
    low, high = limits
    return (low, max(high, 3)) if low < high else limits


def _argument_names(part: str, layers: int) -> list[str]:
    caches = [f"{cache}.{layer}" for cache in ("k_cache", "v_cache") for layer in range(layers)]
    return ["ids", "start", *(["last"] if part == "prefill" else []), *caches]


def _export(part: _Part, arguments: tuple, dims: tuple, where: str) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(part.eval(), arguments, dynamic_shapes=dims, strict=False)
    except CaptureError:
        raise
    except Exception as error:  # export raises what the model's own code raises, and its own constraint violations
        hint = f"TORCH_LOGS=+dynamic names the line of the model's code; {_PER_GRAPH}"
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
        raise CaptureError("the decoder layers cannot be told apart", where=where, why=why, hint=_PER_GRAPH)
    return found[0]


def _captured(
    spec: ModelSpec,
    part: str,
    layers: int,
    program: ExportedProgram,
    names: list[str],
    tables: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    layer_prefix: str,
) -> CapturedModel:
    """Names and roles for the placeholders of the exported graph; sizes and weight count checked against the description."""
    graph_module, where = program.graph_module, f"{spec.name}, {part}"
    nodes = {node.name: node for node in graph_module.graph.nodes if node.op == "placeholder"}
    user_names = iter(names)
    placeholders: list[Placeholder] = []
    for argument in program.graph_signature.input_specs:
        node = nodes[argument.arg.name]
        value = node.meta.get("val")
        target = (argument.target or "").removeprefix(_WRAPPER)
        if argument.kind is InputKind.PARAMETER or (argument.kind is InputKind.BUFFER and argument.persistent):
            role, qualified = "weight", tied.get(target, target)
        elif argument.kind is InputKind.BUFFER and target in tables:
            role, qualified = "constant", target
        elif argument.kind is InputKind.USER_INPUT:
            if value is not None:
                qualified = next(user_names)
                role = "state" if "_cache." in qualified else "input"
        else:
            hint = "register the tensor that the model's code makes as a buffer of its module"
            why = f"kind {argument.kind.name}"
            raise CaptureError(f"the trace holds a tensor of its own, {argument.arg.name}", where=where, why=why, hint=hint)
        unused = not node.users and (value is None or role == "constant" or target in tied.values() or target in tied)
        if unused:  # the absent `last`, a table nobody reads, the second name of a tied weight
            graph_module.graph.erase_node(node)
        else:
            placeholders.append(Placeholder(node.name, role, qualified, value))
    graph_module.recompile()
    _strip_wrapper(graph_module)
    dims, ranges = _sizes(spec.bounds(part), placeholders, program, where)
    constants = {p.qualified: tables[p.qualified] for p in placeholders if p.role == "constant"}
    captured = CapturedModel(
        f"{spec.name}.{part}", part, graph_module, tuple(placeholders), dims, ranges, constants, spec.depth, layers, layer_prefix
    )
    by_layer = [sorted(captured.at_layer(n, 0) for n in _weights_of(captured, layer)) for layer in range(layers)]
    if any(names != by_layer[0] for names in by_layer):
        raise CaptureError("the decoder layers are not alike", where=where, hint="only models whose layers repeat are captured")
    count = len(captured.qualified_names("weight"))
    if spec.capture.weights not in (None, count):
        hint = f"correct `config` or `capture.weights`; {count} is what transformers builds from this configuration"
        raise CaptureError(f"the model has {count} weights, its description says {spec.capture.weights}", where=where, hint=hint)
    return captured


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


def _strip_wrapper(graph_module: torch.fx.GraphModule) -> None:
    """Module paths as the model's own: `model.layers.0.mlp`, without the wrapper that was exported."""
    for node in graph_module.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            inner = {key: (path.removeprefix(_WRAPPER), kind) for key, (path, kind) in stack.items() if path.startswith(_WRAPPER)}
            node.meta["nn_module_stack"] = inner


def _sizes(
    bounds: Bounds, placeholders: Sequence[Placeholder], program: ExportedProgram, where: str
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """The symbol of each dynamic size and its range.  CaptureError when a size became a number, a range shrank or a symbol is unknown."""
    tensors = {p.qualified: p.value for p in placeholders}
    found = {"batch": tensors["ids"].shape[0], "sequence": tensors["ids"].shape[1], "context": tensors["k_cache.0"].shape[2]}
    dims: dict[str, str] = {}
    ranges = {str(symbol): (int(limits.lower), int(limits.upper)) for symbol, limits in program.range_constraints.items()}
    for name, size in found.items():
        limits = getattr(bounds, name) or (1, 1)
        if limits[0] == limits[1]:
            continue
        symbol = str(size.node.expr) if isinstance(size, torch.SymInt) else None
        if symbol is None or ranges.get(symbol) != _traced(tuple(limits)):
            got = f"the fixed size {size}" if symbol is None else f"{symbol} in {ranges.get(symbol)}"
            why = f"{got} where {limits} is promised"
            hint = f"TORCH_LOGS=+dynamic names the line; or bound `{name}` to what the code allows"
            raise CaptureError(f"the {name} size was specialised by the model's code", where=where, why=why, hint=hint)
        dims[name], ranges[symbol] = symbol, tuple(limits)
    if extra := set(ranges) - set(dims.values()):
        why = f"symbols {', '.join(sorted(extra))}"
        raise CaptureError("the model has sizes that depend on data", where=where, why=why, hint=_PER_GRAPH)
    return dims, ranges
