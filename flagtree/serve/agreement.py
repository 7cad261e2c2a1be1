"""What is known of a server, and what of it a bundle must agree in; what no door of ours can work with.

Read from vLLM's configuration where a name is looked up or a layer is made, so that all of it is said before weights are loaded.
Which release has what is found by looking, never by version.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from flagtree.artifact.recording import LEAST_PROMISE
from flagtree.errors import BundleError, FlagtreeError
from flagtree.serve.configuration import EXAMPLE, ServeSettings, read_settings
from flagtree.serve.opened import OpenedBundle

Facts = tuple[tuple[str, str], ...]
# what a bundle's graphs were recorded with and a server must agree in
AGREEMENT = {
    "model": "another model", "sizes": "a model of other sizes", "quantization": "another quantization", "dtype": "another element type",
    "tensor_parallel": "another tensor-parallel degree", "vllm": "another release of vLLM",
}  # fmt: skip
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip
WHOLE_GRAPH, PIECES, NOTHING = 2, 3, 0  # of vLLM's compile modes
OURS, THEIRS = "flagtree", ("", "eager", "inductor")  # how each name of ours begins; vLLM's own compilers


def facts_of(config: Any) -> Facts:
    """What is known of the model and the server, by name."""
    model = config.model_config
    architectures = getattr(model, "architectures", None) or ["?"]
    scheduler = getattr(config, "scheduler_config", None)
    text = getattr(model, "hf_text_config", None)
    sizes = {name: getattr(text, name, None) for name in SIZES}
    return (
        ("model", str(architectures[0])),
        ("sizes", ", ".join(f"{name} {value}" for name, value in sizes.items() if isinstance(value, int))),
        ("quantization", str(getattr(model, "quantization", None) or "none")),
        ("dtype", str(model.dtype).removeprefix("torch.")),
        ("tensor_parallel", str(config.parallel_config.tensor_parallel_size)),
        ("max_tokens", str(getattr(scheduler, "max_num_batched_tokens", 0) or 0)),
        ("device", str(getattr(getattr(config, "device_config", None), "device_type", "") or "")),
        ("vllm", str(getattr(sys.modules.get("vllm"), "__version__", ""))),
    )


def settings_of(config: Any) -> ServeSettings:
    """The settings that a configuration carries.  FlagtreeError when one is wrong, or this vLLM carries none."""
    try:
        additional = config.additional_config
    except AttributeError:
        what = "this vLLM has no additional_config, which brings our settings to every worker"
        raise FlagtreeError(what, hint="vLLM 0.14 and later have it") from None
    return read_settings(additional)


def mode_of(config: Any) -> int:
    """vLLM's compile mode.  FlagtreeError where it has none."""
    try:
        return int(config.compilation_config.mode or NOTHING)
    except (AttributeError, TypeError, ValueError):
        what = "this vLLM has no compile modes, and a whole graph is served in mode 2"
        raise FlagtreeError(what, hint="vLLM 0.14 and later have them; single operators need none: custom_ops") from None


def check_server(config: Any, mode: int = WHOLE_GRAPH) -> None:
    """What a door through vLLM's compile mode cannot work with, said before weights are loaded.  FlagtreeError."""
    if mode_of(config) != mode:
        found = config.compilation_config.mode
        raise FlagtreeError(f"vLLM's compile mode is not {mode}", why=f"it is {found}", hint=f"-cc.mode={mode}")
    if getattr(config, "lora_config", None) is not None:
        why = "its adapters change what is computed from request to request"
        raise FlagtreeError("LoRA is on", why=why, hint="serve without flagtree, or without LoRA")
    operators = list(getattr(config.compilation_config, "custom_ops", []))
    if "none" not in operators:
        raise FlagtreeError(
            "vLLM's own operators are on: the graph would hold calls where it could hold what they compute",
            why=f"custom_ops is {operators}, the default beside another compiler than Inductor",
            hint="-cc.custom_ops='[\"none\"]'",
        )


def check_led(config: Any, settings: ServeSettings) -> str:
    """Why no door leads to the bundle or recording that the settings name, as when LoRA or `enforce_eager` switched compilation off; ""
    where one does or may.  FlagtreeError when the server is to be strict."""
    if settings.custom_ops or (settings.bundle is None and settings.record is None):
        return ""
    mode, given = mode_of(config), str(getattr(config.compilation_config, "backend", ""))
    # in mode 3 the compiler is the platform's; any but vLLM's own may be ours under a vendor's name
    if (mode == PIECES and given not in THEIRS) or (mode == WHOLE_GRAPH and given.startswith(OURS)):
        return ""
    why = "it compiles nothing" if mode == NOTHING else f"its compiler is '{given}'"
    why = f"vLLM's compile mode is {mode}, {why}" + (", and LoRA is on" if getattr(config, "lora_config", None) is not None else "")
    if settings.strict != "off":
        hint = f'-cc.mode=2 with the name that flagtree compile printed, or "custom_ops": true; {EXAMPLE}'
        raise FlagtreeError("a bundle is named, and no door leads to it", where=str(settings.bundle), why=why, hint=hint)
    return why


def check_agreement(opened: OpenedBundle, facts: Mapping[str, str], strict: bool = True) -> None:
    """BundleError unless one of the bundle's graphs is of this server: `facts` as of `facts_of`."""
    where, hint = str(opened.path), "record the graphs of this server and compile them: docs/serving.md"
    graphs = opened.facts()
    if not graphs and strict:
        raise BundleError("the bundle has no graph of a server", where=where, why="it was compiled from a model", hint=hint)
    device = facts.get("device", "")
    if opened.device and device and opened.device != device:
        why = f"its kernels run on {opened.device}, the server on {device}"
        raise BundleError(f"the bundle is for {opened.bundle.manifest.target}", where=where, why=why, hint=hint)
    differences = [[name for name in AGREEMENT if _differs(name, known, facts)] for known in graphs]
    if differences and all(differences):
        closest, known = min(zip(differences, graphs), key=lambda pair: len(pair[0]))
        why = "; ".join(f"{name.replace('_', ' ')}: the bundle has {known[name]}, the server {facts[name]}" for name in closest)
        raise BundleError(f"the bundle is for {AGREEMENT[closest[0]]}", where=where, why=why, hint=hint)
    promised = max((_promise(known) for known, wrong in zip(graphs, differences) if not wrong), default=None)
    wanted = int(facts.get("max_tokens") or 0)
    if promised is not None and wanted > promised:
        why = f"its graphs take up to {promised} tokens a step, the server brings {wanted}"
        hint = f"--max-num-batched-tokens={promised}, or record and compile with {wanted}"
        raise BundleError("the bundle is for a smaller server", where=where, why=why, hint=hint)


def _differs(name: str, known: Mapping[str, str], facts: Mapping[str, str]) -> bool:
    """Do bundle and server both say, and not the same?"""
    a, b = known.get(name), facts.get(name)
    if not a or not b:
        return False
    return a.split(".")[:2] != b.split(".")[:2] if name == "vllm" else a != b


def _promise(known: Mapping[str, str]) -> int:
    return max(LEAST_PROMISE, int(known["max_tokens"]) if known.get("max_tokens", "").isdigit() else 0)
