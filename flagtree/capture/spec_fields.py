"""The records of a model description: what each section may hold, as frozen pydantic models.

Invariant: an unknown field is an error that lists the closest known ones; bounds are ordered; nothing here knows a single model.
`capture/model_spec.py` puts them together; `capture/spec_rules.py` has what must hold between fields.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

Size = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Range = tuple[Size, Size]
Element = Literal["bfloat16", "float16", "float32"]
Share = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
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


class Bounds(Record):
    """Inclusive bounds of one part's sizes; which a part has, the architecture says (`capture/architectures.py`).

    `batch`: sequences; `sequence`: tokens of one call of a sequence (1 when absent); `context`: rows of the KV cache; `features`: rows
    of image features that a prefill may merge; `images`; `patches`: of the largest image of a call; `tokens`: of all images after a merge
    of patches; `edges`: of the groups of patches that see each other, one more than groups;
    `side`: tokens on a side of a square image.
    """

    batch: Range | None = None
    sequence: Range | None = None
    context: Range | None = None
    features: Range | None = None
    images: Range | None = None
    patches: Range | None = None
    tokens: Range | None = None
    edges: Range | None = None
    side: Range | None = None

    @field_validator("*")
    @classmethod
    def _ordered(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise PydanticCustomError(
                "bounds", "the lower bound {low} is above the upper bound {high}", {"low": value[0], "high": value[1]}
            )
        return value

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """The sizes that are bounded, in the order of declaration."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class Parts(Record):
    """The graphs that a bundle holds; `vision` is the tower with its bridge to the text's width."""

    prefill: Bounds
    decode: Bounds
    vision: Bounds | None = None

    @model_validator(mode="after")
    def _sequences(self) -> Parts:
        for name, part in (("prefill", self.prefill), ("decode", self.decode)):
            for size in ("batch", "context"):
                if getattr(part, size) is None:
                    raise PydanticCustomError("bound", "{part} needs bounds for '{size}'", {"part": name, "size": size})
        if self.prefill.sequence is None:
            raise PydanticCustomError("bound", "prefill needs bounds for 'sequence'", {})
        if self.decode.sequence is not None:
            raise PydanticCustomError("bound", "decode takes one token a sequence: 'sequence' has no place there", {})
        return self


class Bridge(Record):
    """From the tower's rows to rows of the text's width: the module, and either how many patches make a token or how many tokens an
    image has."""

    module: str
    width: Size
    patches_per_token: Size | None = None
    tokens_per_image: Size | None = None


class Recipe(Record):
    """`layers` to trace of each kind of layer (first, interior, last), decoder layers in one `period` of the repeat, `weights`: tensors
    of the text parts at full depth, `vision_weights`: those of the tower and its bridge.  `ranks`: of tensor parallelism, over which the
    weights are divided; every rank runs the same bundle.  `quantised`: the graph computes with what `quantisation` says the checkpoint
    stores, activations quantised as they come; else in `dtype`, from weights taken back."""

    layers: Annotated[int, Field(ge=1, le=64)] = 3
    period: Literal[1] = 1
    weights: Size | None = None
    vision_weights: Size | None = None
    ranks: Annotated[int, Field(ge=1, le=1024)] = 1
    quantised: bool = False


class Quantisation(Record):
    """What the checkpoint stores instead of `dtype`; the captured graph computes in `dtype` unless the recipe says `quantised`.

    `weights` in blocks of `block` [rows, columns] with one `scale` each, named `scale_name` beside the weight; activations are
    quantised when the model runs, in groups of `activation_group` elements of a row.  `excluded`: patterns of names kept as they are.
    """

    weights: Literal["float8_e4m3fn", "int8"]
    block: tuple[Size, Size] | None = None
    scale: Literal["float32", "bfloat16"] = "float32"
    scale_name: str = "weight_scale_inv"
    activations: Literal["float8_e4m3fn", "int8"] | None = None
    activation_group: Size | None = None
    excluded: tuple[str, ...] = ()


class Benchmark(Record):
    """One row of a card, as shares: `reference` on the vendor's own stack, `published` per target; `questions` gives the interval."""

    name: str
    reference: Share
    published: dict[str, Share] = {}
    questions: Size | None = None


class Environment(Record):
    """What a published card says about one target's machine."""

    driver: str = ""
    docker: str = ""
    system: str = ""
    flagscale: str = ""
    flaggems: str = ""
    image: str = ""
    container: str = ""


class Card(Record):
    """Inputs of the model card; `printed`: whether the published card prints its figures as shares or in percent."""

    introduction: str = ""
    weights: str = ""
    licence: str = ""
    printed: Literal["share", "percent"] = "share"
    benchmarks: tuple[Benchmark, ...] = ()
    environment: dict[str, Environment] = {}
