"""What a model is, as data: true dimensions, the parts to compile with their bounds, the capture recipe, serving and card inputs.

Invariant: a spec is complete (no library default stands in for a missing dimension) and a wrong field names file, line and closest name.
Read by the command line and `capture/model.py`; imports neither torch nor transformers, so that listing models and finding a key are cheap.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flagtree.capture.architectures import VISION_SIZES, architecture
from flagtree.capture.published import from_config
from flagtree.capture.spec_fields import Bounds, Bridge, Card, Element, Parts, Quantisation, Recipe, Record
from flagtree.capture.spec_file import SpecFile, read_spec_file
from flagtree.capture.spec_rules import LARGEST_DEPTH, check_config, degrees, named, text_config, undivided
from flagtree.errors import CaptureError, UnknownName

PARTS = ("prefill", "decode", "vision")
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}  # the IR's short names and torch's


class ModelSpec(Record):
    """One model.  `config` holds the fields of the published config.json; `serving` holds vLLM's arguments with underscores.

    `dtypes`: element type of weights whose name matches a pattern (shell style), where it is not `dtype`; `inferred`: fields that no
    public source states, with the reason for their value.
    """

    name: str
    architecture: str
    dtype: Element
    config: dict[str, Any]
    parts: Parts
    bridge: Bridge | None = None
    capture: Recipe = Recipe()
    aliases: tuple[str, ...] = ()
    title: str = ""
    dtypes: dict[str, Element] = Field(default={})
    quantisation: Quantisation | None = None
    sources: dict[str, str] = Field(default={})
    inferred: dict[str, str] = Field(default={})
    serving: dict[str, Any] = Field(default={})
    card: Card = Card()

    @field_validator("config")
    @classmethod
    def _complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        check_config(config)
        return config

    @model_validator(mode="after")
    def _fits(self) -> ModelSpec:
        kind = architecture(self.architecture).vision
        if self.parts.vision is not None:
            if kind is None:
                message = "{architecture} has no vision tower that is known here"
                raise PydanticCustomError("vision", message, {"architecture": self.architecture, "field": ("parts", "vision")})
            needed, given = VISION_SIZES[kind], tuple(self.parts.vision.sizes)
            if set(needed) != set(given):
                context = {"needed": ", ".join(needed), "given": ", ".join(given) or "none", "field": ("parts", "vision")}
                raise PydanticCustomError("vision", "its vision part needs bounds for {needed}, {given} are given", context)
        if why := undivided(self.config, self.capture.ranks):
            raise PydanticCustomError("ranks", "{why}", {"why": why, "field": ("capture", "ranks")})
        if self.bridge is not None and self.bridge.width != self.text["hidden_size"]:
            sizes = {"width": self.bridge.width, "hidden": self.text["hidden_size"]}
            message = "the bridge makes rows of {width}, the text has {hidden}"
            raise PydanticCustomError("bridge", message, {**sizes, "field": ("bridge", "width")})
        for field in self.inferred:
            if not _has(self.config, field):
                raise PydanticCustomError("inferred", "config has no field '{name}'", {"name": field, "field": ("inferred", field)})
        return self

    @property
    def text(self) -> Mapping[str, Any]:
        """The fields of the text model: those of `text_config` where the configuration nests them."""
        return text_config(self.config)

    @property
    def depth(self) -> int:
        """Decoder layers of the full model."""
        return int(self.text["num_hidden_layers"])

    @property
    def key_heads(self) -> int:
        """Heads of the KV cache, of all ranks."""
        return int(named(self.text, "num_key_value_heads")[1] or self.text["num_attention_heads"])

    @property
    def cache_heads(self) -> int:
        """Heads of one rank's KV cache."""
        return max(1, self.key_heads // self.capture.ranks)

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return int(self.text.get("head_dim") or self.text["hidden_size"] // self.text["num_attention_heads"])

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts that this model has."""
        return tuple(part for part in PARTS if getattr(self.parts, part) is not None)

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
        if layers > LARGEST_DEPTH:
            raise CaptureError(f"{layers} layers are more than any model has", where=self.name, hint=f"at most {LARGEST_DEPTH} are taken")
        text = {**self.text, "num_hidden_layers": layers}
        if isinstance(kinds := text.get("layer_types"), list):
            text["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
        config = text if self.text is self.config else {**self.config, "text_config": text}
        capture = self.capture.model_copy(update={"weights": None})
        return self.model_copy(update={"config": config, "capture": capture})

    def with_ranks(self, ranks: int) -> ModelSpec:
        """The same model with its weights divided over `ranks` ranks.  CaptureError where its sizes do not divide."""
        if why := undivided(self.config, ranks):
            possible = ", ".join(map(str, degrees(self.config)))
            raise CaptureError(f"tensor parallel {ranks} does not fit {self.name}", why=why, hint=f"--tp with one of {possible}")
        return self.model_copy(update={"capture": self.capture.model_copy(update={"ranks": ranks})})

    def bounds(self, part: str) -> Bounds:
        """The bounds of one part; UnknownName for a part that there is not, or that this model lacks."""
        if part not in self.part_names:
            hint = f"{self.name} has no {part} part" if part in PARTS else ""
            raise UnknownName("part", part, self.part_names, hint=hint)
        return getattr(self.parts, part)


def _has(config: Mapping[str, Any], field: str) -> bool:
    """Whether a field, by its path with points, stands in a configuration."""
    value: Any = config
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


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
    found = tuple((_parse(_extended(read_spec_file(path))), path) for path in sorted(folder.glob("*.yaml")))
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
        return _parse(from_config(file) if path.suffix == ".json" else _extended(file))
    known = sorted({n for spec in shipped for n in (spec.name, *spec.aliases)})
    raise UnknownName("model", name, known, hint="`flagtree models` lists them; a path to a config.json works too")


def _extended(file: SpecFile, above: tuple[str, ...] = ()) -> SpecFile:
    """A description that says `extends: NAME`, with the fields of that file beside it, or of that shipped model, under its own.

    What belongs to one model alone is not handed on: names, title, card, what was inferred.
    """
    base = file.data.get("extends")
    if base is None:
        return file
    where = file.where(("extends",))
    if not isinstance(base, str) or Path(base).name != base:
        raise CaptureError("'extends' names a description without folder and suffix", where=where, why=f"it is {base!r}")
    if base in above or len(above) > 3:
        raise CaptureError("descriptions extend each other", where=where, why=" > ".join((*above, base)))
    places = [folder / f"{base}.yaml" for folder in (file.path.parent, models_folder())]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = sorted({each.stem for place in places for each in place.parent.glob("*.yaml")} - {file.path.stem})
        near = UnknownName("description", base, known)
        raise CaptureError(f"there is no description '{base}' to extend", where=where, why=near.hint or near.render().split("why: ")[-1])
    return file.over(_extended(read_spec_file(path), (*above, base)), drop=("name", "aliases", "title", "card", "inferred"))


def _parse(file: SpecFile) -> ModelSpec:
    try:
        return ModelSpec.model_validate(file.data)
    except ValidationError as error:
        first = error.errors()[0]
        context = first.get("ctx", {})
        inner = context.get("field", ())
        field = tuple(first["loc"]) + (inner if isinstance(inner, tuple) else (inner,))
        raise CaptureError(
            "the model description is wrong",
            where=file.where(field),
            why=f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}",
            hint=str(context.get("hint", "")),
        ) from error


def spec_key(spec: ModelSpec, part: str, layers: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Every factor that decides what `capture(spec, part, layers, dtype)` returns, as JSON data, without importing torch or transformers.

    Aliases, serving and card inputs are no factors.  Two equal keys mean one captured graph.
    """
    bounds = spec.bounds(part)
    return {
        "model": {"architecture": spec.architecture, "config": spec.config, "dtypes": spec.dtypes,
                  "weights": [spec.capture.weights, spec.capture.vision_weights],
                  "quantised": spec.quantisation.model_dump(mode="json") if spec.capture.quantised and spec.quantisation else None},
        "part": part,
        "bounds": bounds.model_dump(mode="json"),
        "layers": spec.traced_layers(layers),
        "ranks": spec.capture.ranks,
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
    for path in (*sorted((package / "capture").rglob("*.py")), package / "runtime" / "operators.py"):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
