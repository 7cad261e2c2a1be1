"""What must hold between the fields of a model's configuration: complete, of sizes that a model can have, and without contradiction.

Invariant: checked on plain numbers, before anything is built, so a hostile size takes no memory; the message names the field.
Called by `capture/model_spec.py` while it validates; each rule raises PydanticCustomError, which becomes file, line and hint.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

# without these a configuration is not a description: transformers would fill in another model's numbers
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_TIED = "tie_word_embeddings"  # stands beside the text's own numbers in some
# the same fact under the name that another family gives it
OTHER_NAMES = {
    "max_position_embeddings": ("max_position_embedding", "max_seq_len"),
    "num_key_value_heads": ("num_attention_groups",),
    "num_experts": ("num_local_experts", "moe_num_experts", "n_routed_experts"),
    "num_experts_per_tok": ("moe_top_k",),
    "num_heads": ("num_attention_heads",),
}
# far above any published model, far below what exhausts this machine's memory by names and tables alone
LARGEST = {
    "vocab_size": 2**24, "hidden_size": 2**18, "intermediate_size": 2**20, "num_hidden_layers": 2**12, "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12, "head_dim": 2**12, "max_position_embeddings": 2**28, "num_experts": 2**14, "num_experts_per_tok": 2**10,
    "moe_intermediate_size": 2**20, "share_q_dim": 2**18, "share_expert_dim": 2**20, "rotary_dim": 2**12, "depth": 2**12,
    "num_heads": 2**12, "patch_size": 2**10, "image_size": 2**16, "out_hidden_size": 2**18, "output_hidden_size": 2**18, "query_num": 2**16,
}  # fmt: skip
LARGEST_DEPTH = LARGEST["num_hidden_layers"]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the text model: `text_config` where a configuration nests them, else the configuration itself."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def named(config: Mapping[str, Any], field: str) -> tuple[str, Any]:
    """A field's name in this configuration and its value; (field, None) where it has none."""
    for name in (field, *OTHER_NAMES.get(field, ())):
        if config.get(name) is not None:
            return name, config[name]
    return field, None


def token_side(config: Mapping[str, Any]) -> int:
    """Patches on a side of what becomes one token behind step3's tower: the steps of its two convolutions."""
    return 2 * int(config["understand_projector_stride"])


def check_config(config: Mapping[str, Any]) -> None:
    """All rules on one published config.json.  Raises PydanticCustomError whose context names the field."""
    text = text_config(config)
    at = ("text_config",) if text is not config else ()
    _complete(text, config, at)
    _possible(text, at)
    _attention(text, at)
    _experts(text, at)
    vision = config.get("vision_config")
    if isinstance(vision, dict):
        _possible(vision, ("vision_config",))
        _divides(vision, "num_heads", "hidden_size", ("vision_config",))


def _error(kind: str, message: str, at: tuple[str, ...], field: str, **context: Any) -> PydanticCustomError:
    return PydanticCustomError(kind, message, {"field": (*at, field), **context})


def _complete(text: Mapping[str, Any], config: Mapping[str, Any], at: tuple[str, ...]) -> None:
    given = {field: named(text, field) for field in REQUIRED}
    if given[_TIED][1] is None:
        given[_TIED] = _TIED, config.get(_TIED)
    missing = [field for field, (_, value) in given.items() if value is None]
    if missing:
        near = difflib.get_close_matches(missing[0], [str(k) for k in text if k not in REQUIRED], n=1, cutoff=0.75)
        hint = f"is '{near[0]}' meant to be '{missing[0]}'?" if near else "a description is complete: no default is taken from a library"
        place = {"field": (*at, near[0])} if near else {"field": at} if at else {}
        also = f", and so are {', '.join(map(repr, missing[1:]))}" if missing[1:] else ""
        context = {"missing": missing[0], "also": also, "hint": hint, **place}
        raise PydanticCustomError("config_missing", "the field '{missing}' is missing{also}", context)
    for field, (name, value) in given.items():
        if field == _TIED:
            if not isinstance(value, bool):
                raise _error("config_flag", "'{name}' must be true or false", at, name, name=name)
        elif type(value) is not int or value < 1:
            raise _error("config_size", "'{name}' must be a positive integer", at, name, name=name)


def _possible(fields: Mapping[str, Any], at: tuple[str, ...]) -> None:
    """Sizes are positive integers that a model can have."""
    for field, largest in LARGEST.items():
        name, value = named(fields, field)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise _error("config_size", "'{name}' must be a positive integer", at, name, name=name)
        if value > largest:
            raise _error("config_huge", "'{name}' = {value} is more than any model has", at, name, name=name, value=str(value)[:40],
                         hint=f"at most {largest} is taken; nothing was allocated")


def _divides(fields: Mapping[str, Any], part: str, whole: str, at: tuple[str, ...]) -> None:
    (small, a), (large, b) = named(fields, part), named(fields, whole)
    if a is not None and b is not None and b % a:
        raise _error("config_heads", "'{large}' = {b} is no multiple of '{small}' = {a}", at, large, large=large, small=small, a=a, b=b)


def _attention(text: Mapping[str, Any], at: tuple[str, ...]) -> None:
    if not text.get("head_dim"):
        if text["hidden_size"] % text["num_attention_heads"]:
            message = "'hidden_size' is no multiple of 'num_attention_heads' and 'head_dim' is missing"
            raise _error("config_heads", message, at, "hidden_size")
    _divides(text, "num_key_value_heads", "num_attention_heads", at)
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    if (rotary := text.get("rotary_dim")) is not None and rotary > width:
        raise _error("config_rotary", "'rotary_dim' = {a} is more than a head's width, {b}", at, "rotary_dim", a=rotary, b=width)
    scaling = text.get("rope_scaling")
    sections = scaling.get("mrope_section") if isinstance(scaling, dict) else None
    if isinstance(sections, list) and 2 * sum(s for s in sections if isinstance(s, int)) != width:
        raise _error("config_rotary", "'mrope_section' {sections} does not fill half a head, {half}", at, "rope_scaling",
                     sections=str(sections), half=width // 2)


def _experts(text: Mapping[str, Any], at: tuple[str, ...]) -> None:
    (chosen, k), (count, n) = named(text, "num_experts_per_tok"), named(text, "num_experts")
    if k is not None and n is not None and k > n:
        raise _error("config_experts", "'{chosen}' = {k} is more than '{count}' = {n}", at, chosen, chosen=chosen, count=count, k=k, n=n)
    if k is not None and n is None:
        raise _error("config_experts", "'{chosen}' is given, the number of experts is not", at, chosen, chosen=chosen)


# -- ranks ---------------------------------------------------------------------------------------------------------------
def undivided(config: Mapping[str, Any], ranks: int) -> str:
    """Why the weights of a model cannot be divided over `ranks` ranks; empty when they can.

    Attention heads of text and tower divide evenly, key heads too or one stands on several ranks; so do the inner widths of gated layers,
    of each expert and of a shared one.
    """
    text, vision = text_config(config), config.get("vision_config")
    keys = named(text, "num_key_value_heads")[1] or text["num_attention_heads"]
    if keys % ranks and ranks % keys:
        return f"{keys} key heads neither divide by {ranks} nor stand on {ranks} ranks evenly"
    inner = ("num_attention_heads", "moe_intermediate_size", "share_expert_dim")
    sizes = [(text, field, "") for field in (*inner, *(() if text.get("moe_intermediate_size") and not text.get("moe_layers_enum") else
             ("intermediate_size",)))]
    sizes += [(vision, field, "vision_config.") for field in ("num_heads", "intermediate_size")] if isinstance(vision, dict) else []
    for fields, field, at in sizes:
        name, size = named(fields, field)
        if size is not None and size % ranks:
            return f"'{at}{name}' = {size} is no multiple of {ranks}"
    return ""


def degrees(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of ranks over which a model can be divided."""
    return tuple(n for n in range(1, text_config(config)["num_attention_heads"] + 1) if not undivided(config, n))
