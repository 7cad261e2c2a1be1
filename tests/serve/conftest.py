"""A stand-in of vLLM's current configuration, each test as a process of its own, and beds for the real engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flagtree.serve import opened
from flagtree.serve.counts import COUNTS, Counts
from tests.serve.architectures import ARCHITECTURES
from tests.serve.bed import VISION, Bed, make_bed

Current = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing counted, no bundle open, nothing kept from compiling: as a process of a server begins."""
    monkeypatch.setattr(opened, "_opened", {})
    vars(COUNTS).update(vars(Counts()))
    yield
    torch.compiler.set_stance("default")


def configuration(flagtree: Any = None, **changes: Any) -> SimpleNamespace:
    """What of vLLM's configuration our doors read; `changes` to it by short names."""
    values = {"mode": 2, "custom_ops": ["none"], "lora": None, "degree": 1, "backend": "flagtree", "device": "cpu"} | changes
    compilation = SimpleNamespace(mode=values["mode"], custom_ops=values["custom_ops"], backend=values["backend"])
    return SimpleNamespace(
        additional_config={"flagtree": flagtree} if flagtree is not None else {},
        compilation_config=compilation,
        lora_config=values["lora"],
        model_config=SimpleNamespace(architectures=["Decoder"], dtype=values.get("dtype", torch.float32)),
        parallel_config=SimpleNamespace(tensor_parallel_size=values["degree"]),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=values.get("tokens", 64)),
        device_config=SimpleNamespace(device_type=values["device"]),
    )


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Current:
    """Make a configuration of vLLM current, with arguments as of `configuration`; `current.none()` takes it away."""
    state: list[Any] = [None]
    module = ModuleType("vllm.config")
    module.get_current_vllm_config_or_none = lambda: state[0]  # type: ignore[attr-defined]

    def make(flagtree: Any = None, **changes: Any) -> Any:
        monkeypatch.setitem(sys.modules, "vllm.config", module)
        state[0] = configuration(flagtree, **changes)
        return state[0]

    make.none = lambda: state.__setitem__(0, None)  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "vllm.config", raising=False)
    return make


@pytest.fixture(scope="session")
def beds(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Callable[..., Bed]:
    """`beds(kind, name, **arguments)`: the bed of an architecture; `name` tells several of one architecture apart."""
    kept = os.environ.get("ENGINE_BEDS")
    home = Path(kept) / _code(repository) if kept else tmp_path_factory.mktemp("beds")
    made: dict[tuple[str, str], Bed] = {}

    def bed(kind: str, name: str = "plain", **arguments: Any) -> Bed:
        if ARCHITECTURES[kind].image and not VISION and find_spec("torchvision") is None:
            pytest.skip("models that see need torchvision (docs/serving.md)")
        if (kind, name) not in made:
            made[kind, name] = make_bed(kind, home / f"{kind}-{name}", repository, **arguments)
        return made[kind, name]

    return bed


def _code(repository: Path) -> str:
    """Of flagtree and of what runs the engine."""
    from flagtree.artifact.code import code_digest
    from flagtree.artifact.files import sha256

    sources = [path.read_bytes() for name in ("architectures", "checkpoints", "engine", "supplied") for path in [_here(repository, name)]]
    return sha256(code_digest().encode() + b"".join(sources))[:12]


def _here(repository: Path, name: str) -> Path:
    return repository / "tests" / "serve" / f"{name}.py"
