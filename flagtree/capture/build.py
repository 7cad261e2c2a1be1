"""From a description to the model whose parts are traced: on the meta device, at its true width, a few layers deep.

Invariant: no weight is allocated and no default of a library stands in for a field; what no operator of ours computes is refused.
Between `capture/model_spec.py` and `capture/model.py`; models that transformers lacks come from `capture/references`.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flagtree.capture.architectures import ARCHITECTURES, architecture
from flagtree.capture.attention import register_attention, take_packed_attention
from flagtree.capture.experts import register_experts, take_routing
from flagtree.capture.model_spec import ModelSpec
from flagtree.capture.quantised import take_quantisation
from flagtree.errors import CaptureError
from flagtree.passes.repeat import Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# what to try where a whole model cannot be captured
PER_GRAPH = '`torch.compile(model, backend="flagtree")` captures graph by graph and leaves the rest of the code as it is'
_COMPARE_CONFIG = "compare `config` in the description with the model's own config.json"
_VISION_DEPTH = ("depth", "num_hidden_layers")


def layer_runs(spec: ModelSpec, part: str, layers: int | None = None) -> tuple[Run, ...]:
    """The layers of a part as runs of one kind, and how many of each are traced: `layers`, or the recipe's number, at most all."""
    if part == "vision":
        kinds: Sequence[str] = ("block",) * vision_depth(spec)
    elif (reference := architecture(spec.architecture).reference) is not None:
        kinds = _reference(reference).layer_kinds(spec.config)
    else:
        kinds = ("decoder",) * spec.depth
    runs: list[Run] = []
    for number, kind in enumerate(kinds):
        if number and kind == kinds[number - 1]:
            runs[-1] = Run(runs[-1].first, runs[-1].count + 1, 0)
        else:
            runs.append(Run(number, 1, 0))
    traced = spec.capture.layers if layers is None else layers
    return tuple(Run(run.first, run.count, min(traced, run.count)) for run in runs)


def vision_depth(spec: ModelSpec) -> int:
    """Blocks of the vision tower."""
    vision = spec.config.get("vision_config") or {}
    return int(next(vision[name] for name in _VISION_DEPTH if name in vision))


def build(spec: ModelSpec, part: str, runs: Sequence[Run], element: torch.dtype) -> torch.nn.Module:
    """The model on the meta device with the layers of `runs`, our attention, routing and experts; the halves that `part` does not use
    are left out.  CaptureError where transformers lacks the class or refuses the numbers."""
    known = architecture(spec.architecture)
    vision = part == "vision"
    try:
        with _default_dtype(element), torch.device("meta"):
            if known.reference is not None:
                numbers = [run.first + k for run in runs for k in range(run.captured)]
                model = _reference(known.reference).build(spec.config, numbers, vision)
            else:
                model = _of_transformers(spec, sum(run.captured for run in runs), vision)
    except CaptureError:
        raise
    except Exception as error:  # whatever a model's own code raises for numbers that do not fit together
        why = f"{type(error).__name__}: {error}"
        raise CaptureError("the model cannot be built", where=spec.name, why=why, hint=_COMPARE_CONFIG) from error
    take_routing(model)
    if spec.capture.quantised:
        take_quantisation(model, spec.quantisation, spec.name)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        for pattern, dtype in spec.dtypes.items():
            if fnmatch.fnmatchcase(name, pattern):
                weight.data = weight.data.to(getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def _reference(name: str) -> Any:
    """The module that defines a model of ours."""
    import importlib

    return importlib.import_module(f"flagtree.capture.references.{name}")


def _of_transformers(spec: ModelSpec, layers: int, vision: bool) -> torch.nn.Module:
    try:
        import transformers
    except ImportError as error:
        hint = "pip install 'flagtree-toolkit[models]'"
        raise CaptureError("capturing a model needs transformers", where=spec.name, why=str(error), hint=hint) from error
    model_class = getattr(transformers, spec.architecture, None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        near = difflib.get_close_matches(spec.architecture, _decoder_classes(transformers), n=3, cutoff=0.4)
        raise CaptureError(
            f"transformers {transformers.__version__} has no model class '{spec.architecture}'",
            where=spec.name,
            why=f"closest: {', '.join(near)}" if near else "",
            hint='`architecture` is the class under "architectures" in config.json; supported: text decoders of transformers, and '
            + ", ".join(sorted(name for name, known in ARCHITECTURES.items() if known.reference)),
        )
    config = _configuration(spec, model_class.config_class, layers, vision)
    config._attn_implementation = register_attention()
    config._experts_implementation = register_experts()
    model: PreTrainedModel = model_class(config)
    constant_longrope(model)
    if architecture(spec.architecture).vision is not None:  # the other half would be weights that nobody reads
        if vision:
            take_packed_attention(model.model.visual)
            del model.model.language_model, model.lm_head
        else:
            del model.model.visual
    return model


def _decoder_classes(transformers: Any) -> list[str]:
    return sorted({name for name in dir(transformers) if name.endswith("ForCausalLM")} | set(ARCHITECTURES))


def constant_longrope(model: torch.nn.Module) -> None:
    """A longrope whose short and long factors are equal does not depend on the length of the text: it is a table like any other."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "default"  # type: ignore[assignment]  # after construction: the frequencies are those of the factors


def _configuration(spec: ModelSpec, config_class: type[PreTrainedConfig] | None, layers: int, vision: bool) -> PreTrainedConfig:
    """The description as transformers' configuration with `layers` layers of text, or of the tower.

    Refused: a field that transformers would ignore where another was meant, a width that transformers would make up, and what a plain
    full-attention decoder lacks, at any depth.
    """
    if config_class is None:
        raise CaptureError(f"{spec.architecture} has no configuration class", where=spec.name, hint="name the class of one model family")
    known = set(config_class().to_dict()) | set(config_class().get_text_config().to_dict()) | {"rope_theta", "rope_scaling", "model_type"}
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
        full = config_class(**_copied(fields))
        kinds = getattr(full.get_text_config(), "layer_types", None) or []
        config = config_class(**_shallow(fields, layers, kinds, vision))
    except Exception as error:  # transformers validates with several exception types; each means a wrong configuration
        raise CaptureError("transformers refuses the configuration", where=spec.name, why=str(error), hint=_COMPARE_CONFIG) from error
    if others := sorted(set(kinds) - {"full_attention"}):
        why = f"layer_types holds {', '.join(others)}"
        raise CaptureError("only full attention is captured", where=spec.name, why=why, hint=PER_GRAPH)
    refuse_changing_rotary(full, spec.name)
    full = full.get_text_config()
    for field, described in (("head_dim", spec.head_width), ("num_key_value_heads", spec.key_heads)):
        taken = getattr(full, field, None) or described
        if taken != described:
            why = f"the description means {described}, transformers would take {taken}"
            raise CaptureError(f"the field '{field}' is missing", where=spec.name, why=why, hint="give it; no default is taken")
    return config


def refuse_changing_rotary(config: PreTrainedConfig, where: str) -> None:
    """CaptureError where rotary frequencies are no table of the configuration alone."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    constant = rope.get("short_factor") is not None and rope.get("short_factor") == rope.get("long_factor")
    if rope.get("rope_type") in ("dynamic", "longrope") and not constant:
        why = f"rotary frequencies of type '{rope['rope_type']}' change with the length of the text"
        raise CaptureError("the rotary positions depend on data", where=where, why=why, hint=PER_GRAPH)


def _copied(fields: dict[str, Any]) -> dict[str, Any]:
    """transformers writes into the mappings that it is given."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()}


def _shallow(fields: dict[str, Any], layers: int, kinds: Sequence[str], vision: bool) -> dict[str, Any]:
    """The fields with another number of layers: of the text, or of the tower, whose blocks then all take the bounds they are given."""
    out = _copied(fields)
    if vision:
        out["vision_config"] |= {"depth": layers, "fullatt_block_indexes": []}
        text_layers = 1
    else:
        text_layers = layers
        if isinstance(out.get("vision_config"), dict):
            out["vision_config"] |= {"depth": 1}
    text = out["text_config"] if isinstance(out.get("text_config"), dict) else out
    text["num_hidden_layers"] = text_layers
    if kinds:
        text["layer_types"] = list(kinds[:text_layers])
    return out


@contextlib.contextmanager
def _default_dtype(element: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(element)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
