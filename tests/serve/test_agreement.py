"""What a server and a bundle must agree in, and what no door works with: one clear error each, before weights are loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flagtree.artifact.bundle import write_bundle
from flagtree.errors import BundleError, DeviceError, FlagtreeError, UntrustedBundle
from flagtree.serve import bundles
from flagtree.serve.agreement import check_agreement, check_led, check_server, facts_of, mode_of, settings_of
from flagtree.serve.configuration import ServeSettings
from flagtree.serve.opened import open_for_serving
from flagtree.serve.server import Server
from tests.serve.conftest import Current, configuration

FACTS = {
    "model": "Decoder", "sizes": "hidden_size 64", "quantization": "none", "dtype": "float32", "tensor_parallel": "1", "vllm": "0.32.0",
}  # fmt: skip
LAUNCH = {"format": 1, "name": "g", "symbols": [], "buffers": [], "outputs": [], "steps": []}


def write(path: Path, *facts: dict[str, str], torch_version: str = torch.__version__, target: str = "cpu") -> tuple[str, str]:
    """A bundle with a graph for each of `facts` and no kernel."""
    graphs = {f"g{k}": {"graph": {"key": f"{k:064d}", "facts": f, "versions": {}, "results": []}} for k, f in enumerate(facts)}
    parts = dict.fromkeys(graphs, LAUNCH) or {"g": LAUNCH}
    digest = write_bundle(path, name="b", target=target, parts=parts, kernels=[], versions={"torch": torch_version}, coverage=graphs)
    return str(path), digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "Other"}, "another model"),
        ({"sizes": "hidden_size 128"}, "other sizes"),
        ({"quantization": "fp8"}, "another quantization"),
        ({"dtype": "bfloat16"}, "another element type"),
        ({"tensor_parallel": "2"}, "another tensor-parallel degree"),
        ({"vllm": "0.33.0"}, "another release of vLLM"),
        ({"max_tokens": "16384"}, "smaller server"),
    ],
)
def test_a_bundle_of_another_server_is_named(tmp_path: Path, change: dict[str, str], says: str) -> None:
    opened = open_for_serving(*write_path(write(tmp_path / "b", FACTS)))
    check_agreement(opened, FACTS)
    check_agreement(opened, {**FACTS, "vllm": "0.32.7", "max_tokens": "8192"})
    with pytest.raises(BundleError, match=says) as raised:
        check_agreement(opened, {**FACTS, **change})
    assert raised.value.where == str(tmp_path / "b")
    (value,) = change.values()
    assert value in raised.value.why


def write_path(written: tuple[str, str]) -> tuple[Path, str]:
    return Path(written[0]), written[1]


def test_one_graph_must_agree_in_everything(tmp_path: Path) -> None:
    """A bundle for (Decoder, 1) and (Other, 2) is none for (Decoder, 2)."""
    other = {**FACTS, "model": "Other", "tensor_parallel": "2", "max_tokens": "16384"}
    opened = open_for_serving(*write_path(write(tmp_path / "b", FACTS, other)))
    check_agreement(opened, FACTS)
    check_agreement(opened, {**other, "max_tokens": "10000"})
    with pytest.raises(BundleError, match="tensor parallel: the bundle has 1, the server 2"):
        check_agreement(opened, {**FACTS, "tensor_parallel": "2"})
    with pytest.raises(BundleError, match="up to 8192 tokens"):
        check_agreement(opened, {**FACTS, "max_tokens": "10000"})


def test_a_bundle_without_a_server_graph(tmp_path: Path) -> None:
    opened = open_for_serving(*write_path(write(tmp_path / "b")))
    with pytest.raises(BundleError, match="no graph of a server"):
        check_agreement(opened, FACTS)
    check_agreement(opened, FACTS, strict=False)


@pytest.mark.parametrize("made_with", ["2.11.0", "2.14.1+cu130", ""])
def test_another_release_of_torch(tmp_path: Path, made_with: str) -> None:
    with pytest.raises(BundleError, match="another release of torch"):
        open_for_serving(*write_path(write(tmp_path / "b", FACTS, torch_version=made_with)))


def test_nobody_vouches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: Current) -> None:
    """Naming a bundle is not to trust it: the digest stands in the compiler's name or the settings, or this machine built it."""
    from flagtree.serve.operators import operators_of

    path, digest = write(tmp_path / "b", FACTS)
    with pytest.raises(UntrustedBundle, match="not trusted"):
        open_for_serving(Path(path), None)
    with pytest.raises(UntrustedBundle, match="not trusted"):
        operators_of(current({"custom_ops": True, "bundle": path}, mode=0), "a door")
    with pytest.raises(UntrustedBundle, match="not the one"):
        operators_of(current({"custom_ops": True, "bundle": path, "digest": "1" * 64}, mode=0), "a door")
    named = f"flagtree.serve.bundles.d_{digest}"
    assert operators_of(current({"custom_ops": True, "bundle": path}, mode=2, backend=named), "a door") is not None


def test_a_bundle_that_changed_between_two_starts(tmp_path: Path, current: Current) -> None:
    path, digest = write(tmp_path / "b", FACTS)
    current({"bundle": path})
    assert callable(getattr(bundles, f"d_{digest}"))
    write(tmp_path / "b", {**FACTS, "note": "another"})
    bundles._once.cache_clear()  # another process
    with pytest.raises(UntrustedBundle, match="not the one"):
        getattr(bundles, f"d_{digest}")


@pytest.mark.parametrize(("name", "word"), [("launch/g0.json", b'"g"'), ("manifest.json", b'"b"')])
def test_a_damaged_bundle(tmp_path: Path, name: str, word: bytes) -> None:
    path, digest = write(tmp_path / "b", FACTS)
    file = tmp_path / "b" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(BundleError):
        open_for_serving(Path(path), digest)
    assert word in whole
    file.write_bytes(whole.replace(word, b'"h"'))  # of the same size
    with pytest.raises(BundleError):
        open_for_serving(Path(path), digest)


def test_kernels_for_another_device(tmp_path: Path) -> None:
    """A bundle for a GPU on a machine without it; one for the CPU on a server that computes elsewhere."""
    opened = open_for_serving(*write_path(write(tmp_path / "b", FACTS)))
    opened.library = SimpleNamespace(tensors=torch.device("cpu"))  # type: ignore[assignment]
    with pytest.raises(BundleError, match="its kernels run on cpu, the server on cuda"):
        check_agreement(opened, {**FACTS, "device": "cuda"})
    opened.library = None
    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    from tests.runtime.test_gpu_load import Kernel

    launch = {"function": "f", "grid": [1, 1, 1], "signature": [], "threads": 32, "variants": {}}
    kernel = Kernel("ab" * 32, launch)
    facts = {"g": {"graph": {"key": "0" * 64, "facts": FACTS, "versions": {}, "results": []}}}
    for target, error in (("metax", DeviceError), ("rocm:gfx942", DeviceError)):
        path = tmp_path / target.replace(":", "-")
        versions = {"torch": torch.__version__}
        digest = write_bundle(path, name="b", target=target, parts={"g": LAUNCH}, kernels=[kernel], versions=versions, coverage=facts)
        with pytest.raises(error, match=f"the bundle is for {target}"):
            open_for_serving(path, digest)


# -- configurations ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": 0}, "mode is 0, it compiles nothing"),
        ({"mode": 0, "lora": object()}, "LoRA is on"),
        ({"mode": 2, "backend": "inductor"}, "its compiler is 'inductor'"),
        ({"mode": 3, "backend": "inductor"}, "its compiler is 'inductor'"),
    ],
)
def test_a_bundle_to_which_no_door_leads(changes: dict[str, Any], says: str) -> None:
    config = configuration(None, **changes)
    with pytest.raises(FlagtreeError, match=says) as raised:
        check_led(config, ServeSettings(bundle="b"))
    assert "no door leads to it" in raised.value.what
    assert says in check_led(config, ServeSettings(bundle="b", strict="off"))  # a step aside, to be counted
    assert says in check_led(config, ServeSettings(record="graphs.jsonl"))
    assert check_led(config, ServeSettings(bundle="b", custom_ops=True)) == ""
    assert check_led(config, ServeSettings()) == ""


def test_doors_that_lead_to_a_bundle() -> None:
    settings = ServeSettings(bundle="b")
    assert check_led(configuration(None, backend="flagtree.serve.bundles.d_0"), settings) == ""
    assert check_led(configuration(None, mode=3, backend="a_vendor.Compiler"), settings) == ""


def test_a_vllm_that_lacks_what_we_need_is_one_line() -> None:
    config = configuration()
    del config.additional_config
    with pytest.raises(FlagtreeError, match="no additional_config"):
        settings_of(config)
    config = configuration()
    del config.compilation_config.mode
    with pytest.raises(FlagtreeError, match="no compile modes"):
        check_server(config)
    assert mode_of(configuration(None, mode=None)) == 0


def test_facts_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.__version__ = "0.32.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    config = configuration(None, degree=2, dtype=torch.bfloat16, device="cuda")
    config.model_config.hf_text_config = SimpleNamespace(hidden_size=64, num_hidden_layers=3, head_dim=None)
    config.model_config.quantization = "fp8"
    assert dict(facts_of(config)) == {
        "model": "Decoder", "sizes": "num_hidden_layers 3, hidden_size 64", "quantization": "fp8", "dtype": "bfloat16",
        "tensor_parallel": "2", "max_tokens": "64", "device": "cuda", "vllm": "0.32.0",
    }  # fmt: skip


def test_the_check_is_made_when_a_server_opens_its_bundle(tmp_path: Path) -> None:
    path, digest = write(tmp_path / "b", FACTS)
    with pytest.raises(BundleError, match="another element type"):
        Server(ServeSettings(bundle=path), (("dtype", "bfloat16"),), bundle=path, digest=digest).open()
