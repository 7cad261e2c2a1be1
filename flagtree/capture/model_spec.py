"""What a model is, as data: true dimensions, the parts to compile with their bounds, the capture recipe, serving and card inputs.

Invariant: a spec is complete (no library default stands in for a missing dimension) and a wrong field names file, line and closest name.
Read by the command line and `capture/model.py`; imports neither torch nor transformers, so that listing models and finding a key are cheap.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flagtree.capture.spec_file import SpecFile, read_spec_file
from flagtree.errors import CaptureError, UnknownName

PARTS = ("prefill", "decode")
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}  # the IR's short names and torch's
Size = Annotated[int, Field(ge=1, lt=2**31, strict=True)]

# without these a configuration is not a description: transformers would fill in another model's numbers
REQUIRED_CONFIG = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)


class _Record(BaseModel):
    """Frozen, and an unknown field is an error that lists the closest known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        for field in data if isinstance(data, dict) else ():
            if field not in cls.model_fields:
                known = sorted(cls.model_fields)
                near = difflib.get_close_matches(str(field), known, n=3, cutoff=0.5)
                hint = f"closest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
                raise PydanticCustomError("unknown_field", "unknown field '{field}'", {"field": str(field), "hint": hint})
        return data


class Bounds(_Record):
    """Inclusive bounds of one part's sizes: sequences in a batch, tokens of one call (1 when absent), rows of the KV cache."""

    batch: tuple[Size, Size]
    context: tuple[Size, Size]
    sequence: tuple[Size, Size] | None = None

    @field_validator("batch", "context", "sequence")
    @classmethod
    def _ordered(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise PydanticCustomError(
                "bounds", "the lower bound {low} is above the upper bound {high}", {"low": value[0], "high": value[1]}
            )
        return value


class Parts(_Record):
    """The graphs a bundle holds."""

    prefill: Bounds
    decode: Bounds

    @model_validator(mode="after")
    def _sequences(self) -> Parts:
        if self.prefill.sequence is None:
            raise PydanticCustomError("sequence", "prefill needs bounds for 'sequence'", {})
        if self.decode.sequence is not None:
            raise PydanticCustomError("sequence", "decode takes one token a sequence: 'sequence' has no place there", {})
        return self


class Recipe(_Record):
    """`layers` to trace (first, interior, last), decoder layers in one `period` of the repeat, `weights` tensors at full depth."""

    layers: Annotated[int, Field(ge=1, le=64)] = 3
    period: Literal[1] = 1
    weights: Size | None = None


class Benchmark(_Record):
    """One row of a card, as shares: `reference` on the vendor's own stack, `published` per target; `questions` gives the interval."""

    name: str
    reference: Annotated[float, Field(ge=0, le=1)]
    published: dict[str, float] = {}
    questions: Size | None = None


class Environment(_Record):
    """What a published card says about one target's machine."""

    driver: str = ""
    docker: str = ""
    system: str = ""
    flagscale: str = ""
    flaggems: str = ""
    image: str = ""
    container: str = ""


class Card(_Record):
    """Inputs of the model card."""

    introduction: str = ""
    weights: str = ""
    licence: str = ""
    benchmarks: tuple[Benchmark, ...] = ()
    environment: dict[str, Environment] = {}


class ModelSpec(_Record):
    """One model.  `config` holds the fields of the published config.json; `serving` holds vLLM's arguments with underscores."""

    name: str
    architecture: str
    dtype: Literal["bfloat16", "float16", "float32"]
    config: dict[str, Any]
    parts: Parts
    capture: Recipe = Recipe()
    aliases: tuple[str, ...] = ()
    title: str = ""
    sources: dict[str, str] = {}
    serving: dict[str, Any] = {}
    card: Card = Card()

    @field_validator("config")
    @classmethod
    def _complete(cls, config: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for field in REQUIRED_CONFIG:
            if config.get(field) is None:
                near = difflib.get_close_matches(field, [str(k) for k in config if k not in REQUIRED_CONFIG], n=1, cutoff=0.75)
                hint = f"is '{near[0]}' meant to be '{field}'?" if near else "a description is complete: no default is taken from a library"
                context = {"missing": field, "hint": hint, **({"field": near[0]} if near else {})}
                raise PydanticCustomError("config_missing", "the field '{missing}' is missing", context)
            if field != "tie_word_embeddings" and (type(config[field]) is not int or config[field] < 1):
                raise PydanticCustomError("config_size", "'{field}' must be a positive integer", {"field": field})
        if config["hidden_size"] % config["num_attention_heads"] and not config.get("head_dim"):
            raise PydanticCustomError(
                "config_heads", "'hidden_size' is no multiple of 'num_attention_heads' and 'head_dim' is missing", {"field": "hidden_size"}
            )
        return config

    @property
    def depth(self) -> int:
        """Decoder layers of the full model."""
        return int(self.config["num_hidden_layers"])

    @property
    def key_heads(self) -> int:
        """Heads of the KV cache."""
        return int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    def element(self, dtype: str | None = None) -> str:
        """torch's name of the element type: the model's own, or `dtype` by its short name or torch's.  UnknownName for any other."""
        name = DTYPES.get(dtype or self.dtype, dtype or self.dtype)
        if name not in DTYPES.values():
            raise UnknownName("dtype", name, [*DTYPES, *DTYPES.values()])
        return name

    def traced_layers(self, layers: int | None = None) -> int:
        """How many decoder layers a capture traces: `layers` or the recipe's number, at most all."""
        return min(self.capture.layers if layers is None else layers, self.depth)

    def with_depth(self, layers: int) -> ModelSpec:
        """The same model with another number of decoder layers; its weight count is then not known in advance."""
        config = {**self.config, "num_hidden_layers": layers}
        if isinstance(kinds := config.get("layer_types"), list):
            config["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
        capture = self.capture.model_copy(update={"weights": None})
        return self.model_copy(update={"config": config, "capture": capture})

    def bounds(self, part: str) -> Bounds:
        """The bounds of `prefill` or `decode`; UnknownName for another part."""
        if part not in PARTS:
            raise UnknownName("part", part, PARTS)
        return self.parts.prefill if part == "prefill" else self.parts.decode


def models_folder() -> Path:
    """The folder of model descriptions: `flagtree/_models` in an installed wheel, `models/` beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_models", package.parent / "models"):
        if folder.is_dir():
            return folder
    raise CaptureError("the folder of model descriptions is missing", where=str(package / "_models"), hint="reinstall the package")


def list_specs() -> tuple[ModelSpec, ...]:
    """Every model that ships, by name.  CaptureError when a file is wrong or two models claim one alias."""
    return tuple(spec for spec, _ in sorted(_shipped(models_folder()), key=lambda pair: pair[0].name))


@lru_cache(maxsize=4)
def _shipped(folder: Path) -> tuple[tuple[ModelSpec, Path], ...]:
    found = tuple((_parse(read_spec_file(path)), path) for path in sorted(folder.glob("*.yaml")))
    owner: dict[str, Path] = {}
    for spec, path in found:
        for name in {spec.name, *spec.aliases}:
            if (other := owner.setdefault(name.lower(), path)) != path:
                raise CaptureError(f"two models are called '{name}'", where=str(path), why=f"the other is {other}")
    return found


def load_spec(name_or_path: str | Path) -> ModelSpec:
    """A model by name, alias (case does not matter), description file, config.json or the folder that holds one.

    Raises UnknownName for a name that no model has, CaptureError for a file that is missing or wrong.
    """
    name = str(name_or_path)
    shipped = [spec for spec, _ in _shipped(models_folder())]
    for spec in shipped:
        if name.lower() in {n.lower() for n in (spec.name, *spec.aliases)}:
            return spec
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file() or path.suffix in (".yaml", ".yml", ".json"):
        file = read_spec_file(path)
        return _parse(_from_config(file) if path.suffix == ".json" else file)
    known = sorted({n for spec in shipped for n in (spec.name, *spec.aliases)})
    raise UnknownName("model", name, known, hint="`flagtree models` lists them; a path to a config.json works too")


def _parse(file: SpecFile) -> ModelSpec:
    try:
        return ModelSpec.model_validate(file.data)
    except ValidationError as error:
        first = error.errors()[0]
        context = first.get("ctx", {})
        field = tuple(first["loc"]) + ((context["field"],) if "field" in context else ())
        raise CaptureError(
            "the model description is wrong",
            where=file.where(field),
            why=f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}",
            hint=str(context.get("hint", "")),
        ) from error


def _from_config(file: SpecFile) -> SpecFile:
    """A Hugging Face config.json as a description: bounds come from its own `max_position_embeddings`, the name from its sizes."""
    config = dict(file.data)
    architectures = config.pop("architectures", None)
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise CaptureError("the configuration names no model class", where=str(file.path), why=f"architectures is {architectures!r}")
    dtype = config.pop("torch_dtype", None) or config.pop("dtype", None)
    if dtype is None:
        raise CaptureError("the configuration names no dtype", where=str(file.path), why="neither 'dtype' nor 'torch_dtype' is given",
                           hint='add "dtype": "bfloat16" to it')
    for note in ("transformers_version", "_name_or_path", "dtype"):
        config.pop(note, None)
    context = [1, config.get("max_position_embeddings", 1)]
    name = f"{config.get('model_type', 'model')}-{config.get('hidden_size')}x{config.get('num_hidden_layers')}"
    layers = config.get("num_hidden_layers")
    data = {
        "name": name,
        "architecture": architectures[0],
        "dtype": dtype,
        "config": config,
        "parts": {
            "prefill": {"batch": [1, 64], "sequence": context, "context": context},
            "decode": {"batch": [1, 64], "context": context},
        },
        "capture": {"layers": min(3, layers) if isinstance(layers, int) and layers > 0 else 3},
    }
    return SpecFile(file.path, data, {})


def spec_key(spec: ModelSpec, part: str, layers: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Every factor that decides what `capture(spec, part, layers, dtype)` returns, as JSON data, without importing torch or transformers.

    Aliases, serving and card inputs are no factors.  Two equal keys mean one captured graph.
    """
    bounds = spec.bounds(part)
    return {
        "model": {"architecture": spec.architecture, "config": spec.config, "weights": spec.capture.weights},
        "part": part,
        "bounds": bounds.model_dump(mode="json"),
        "layers": spec.traced_layers(layers),
        "dtype": spec.element(dtype),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "capture": _code_digest(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """SHA-256 over our own capture code and the operators it puts into graphs: a change there is another capture."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in (*sorted((package / "capture").glob("*.py")), package / "runtime" / "operators.py"):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
