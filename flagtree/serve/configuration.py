"""What a server says to flagtree: the object under "flagtree" in vLLM's `additional_config`, which every worker gets.

Strict: an unknown or wrong field is an error that names it.  Read wherever a configuration of vLLM is current.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flagtree.errors import FlagtreeError

SECTION = "flagtree"
EXAMPLE = '--additional-config \'{"flagtree": {"bundle": "bundles/qwen3-cpu", "strict": "start"}}\''
Strict = Literal["off", "start", "serve", "paranoid"]


class ServeSettings(BaseModel):
    """`bundle`: a folder or file.  `digest`: what it must be; naming it is to trust it.  `strict`: `off` compiles at start what is
    missing, `start` refuses to start, `serve` also keeps vLLM's own helpers from compiling, `paranoid` raises where they would.
    Default `start` with a bundle, else `off`.  `record`: a file that gets each missing graph.  `custom_ops`: replace vLLM's
    single operators where it does not compile."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    bundle: str | None = None
    digest: Annotated[str, Field(pattern=r"\A(sha256:)?[0-9a-fA-F]{64}\z")] | None = None
    strict: Strict = "off"
    record: str | None = None
    custom_ops: bool = False

    @model_validator(mode="before")
    @classmethod
    def _strict_with_a_bundle(cls, given: Any) -> Any:
        if isinstance(given, dict) and "strict" not in given and given.get("bundle") is not None:
            return {**given, "strict": "start"}
        return given

    @model_validator(mode="after")
    def _agree(self) -> ServeSettings:
        if self.bundle is None and self.strict != "off":
            raise ValueError(f"strict '{self.strict}' needs a bundle")
        if self.bundle is None and self.digest is not None:
            raise ValueError("a digest without a bundle")
        return self

    @property
    def quiets_helpers(self) -> bool:
        """Are vLLM's own compiled helpers kept from compiling?"""
        return self.strict in ("serve", "paranoid")


def read_settings(additional_config: object) -> ServeSettings:
    """The settings in vLLM's `additional_config`; defaults when it has none.  FlagtreeError naming the field that is wrong."""
    given = additional_config.get(SECTION) if isinstance(additional_config, dict) else None
    if given is None:
        return ServeSettings()
    if not isinstance(given, dict):
        raise FlagtreeError("the settings of flagtree are no object", where=f"additional_config.{SECTION}", hint=EXAMPLE)
    try:
        return ServeSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(x) for x in first["loc"])
        why = first["msg"]
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, ServeSettings.model_fields, n=1)
            why = f"no such setting; {'closest' if near else 'known'}: {', '.join(near or ServeSettings.model_fields)}"
        where = f"additional_config.{SECTION}{'.' if field else ''}{field}"
        raise FlagtreeError("a setting of flagtree is wrong", where=where, why=why, hint=EXAMPLE) from None


def current_vllm_config() -> Any:
    """vLLM's configuration where one is current (a model is being built or loaded), else None.  Never imports vLLM."""
    module = sys.modules.get("vllm.config")
    get = getattr(module, "get_current_vllm_config_or_none", None)
    return get() if get is not None else None


def serving_now() -> bool:
    """Is this call made inside a step of a vLLM engine?  Never imports vLLM."""
    module = sys.modules.get("vllm.forward_context")
    available = getattr(module, "is_forward_context_available", None)
    return bool(available()) if available is not None else False


def traces_ahead() -> bool:
    """Does vLLM trace a model by itself, outside of torch's frame evaluation, where a stance would keep our graph from being traced?"""
    return bool(getattr(sys.modules.get("vllm.envs"), "VLLM_USE_AOT_COMPILE", False))


def resolved(path: str) -> Path:
    """A path of the settings: `~` and the working directory of the process that starts."""
    return Path(path).expanduser().absolute()
