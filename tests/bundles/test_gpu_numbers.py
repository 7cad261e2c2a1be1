"""A whole model's bundle for a GPU, loaded by `flagtree.load` and launched kernel by kernel, gives transformers' logits.

The bundle is MetaX's, compiled to MACA LLVM IR; where MetaX's compiler would finish it, the emulator's does, and a driver that is this
processor executes it (tests/runtime/executing.py), attention included.  Matrix products are torch's, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import flagtree
from flagtree.artifact.bundle import open_bundle, write_bundle
from flagtree.compile import compile_model
from flagtree.errors import BundleError
from flagtree.runtime import gpu
from flagtree.toolchain.base import BuiltKernel
from tests.bundles import reference
from tests.bundles.serving import serve
from tests.runtime import executing
from tests.runtime.stand_in import compile_launcher

CONFIG = {**reference.SMALL, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Finished:
    """A kernel of the bundle with binaries for the executing driver."""

    digest: str
    launch: dict[str, Any]
    files: dict[str, bytes]
    facts: dict[str, object]
    tier: str = "binary"
    missing: str = ""


def finish(path: Path, out: Path) -> str:
    """The bundle with each variant made executable here; its digest.  The place of `flagtree finalize` with MetaX's SDK."""
    bundle = open_bundle(path)
    kernels = []
    for digest, kernel in bundle.manifest.kernels.items():
        files = {name: bundle.read(f"kernels/{digest[:16]}/{name}") for name in kernel.files}
        launch: Any = kernel.launch
        built = BuiltKernel(digest, kernel.tier, kernel.missing, files, launch)
        variants = {name: {**v, "file": f"{name}.bin"} for name, v in launch["variants"].items()}
        binaries = {f"{name}.bin": executing.image(built, name) for name in variants}
        kernels.append(Finished(digest, {**launch, "variants": variants}, {**files, **binaries}, kernel.facts))
    parts = {name: bundle.part(name) for name in bundle.manifest.parts}
    return write_bundle(out, name=bundle.manifest.name, target=bundle.manifest.target, parts=parts, kernels=kernels,
                        constants=bundle.constants())  # fmt: skip


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def test_prefill_and_decode_through_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = reference.describe(tmp_path / "model.yaml", CONFIG, "float32")
    (built,) = compile_model(str(description), ["metax"], out=tmp_path / "bundles").bundles
    with pytest.raises(BundleError, match="flagtree finalize"):
        flagtree.load(built.path)
    device = executing.device("compiled", compile_launcher(tmp_path))
    monkeypatch.setattr(gpu, "find_device", lambda target, tensors=None: device)
    digest = finish(Path(built.path), tmp_path / "finished")
    bundle = flagtree.load(tmp_path / "finished", trust=digest)
    (request,) = reference.requests(CONFIG["vocab_size"], ((5, 2),)).values()
    model = reference.random_model(CONFIG, torch.float32)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    before = executing.launches(device)
    found = serve(bundle, weights, request.ids, request.lengths, request.following)
    assert executing.launches(device) - before > (1 + reference.STEPS) * CONFIG["num_hidden_layers"]
    eager = reference.eager(model, request)
    truth = reference.truth(reference.in_float64(model), request)
    for step in range(len(found)):
        own = rms(eager[step] - truth[step])
        assert rms(found[step] - truth[step]) <= 4 * own + 1e-6 * float(truth[step].abs().mean()), step
