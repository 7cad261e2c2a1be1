"""`flagtree.load` of bundles for GPUs: over the recording driver where a device is stood in for, and as it is on this machine without one.

CPU tensors lend their addresses, no kernel runs; tests/runtime/test_gpu_execute.py runs kernels through the same path.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import flagtree
from flagtree.artifact.bundle import write_bundle
from flagtree.errors import BindError, BundleError, DeviceError, UntrustedBundle
from flagtree.runtime import gpu
from flagtree.targets import find_target, target_of_device
from tests.runtime.stand_in import Recording, StandIn, Toy, compile_launcher, driver_bytes, kinds_of, toy

PROGRAM = """
program toy
  symbol s0 in 1..64 from dim x 0
  buffer x: f32[s0, 8] input
  buffer w: f32[8] weight
  buffer table: f32[8] constant
  buffer y: f32[s0, 8] temp
  kernel k {i0 < s0, i1 < 8}
    v0: f32 = load x[i0, i1]
    v1: f32 = load w[i1]
    v2: f32 = load table[i1]
    v3: f32 = mul v0, v1
    v4: f32 = mul v3, v2
    store y[i0, i1] = v4
  outputs y
"""


@dataclass(frozen=True)
class Kernel:
    digest: str
    launch: dict
    tier: str = "binary"
    missing: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"aligned.bin": b"the aligned one", "generic.bin": b"the generic one"})
    facts: dict = field(default_factory=dict)


def write(path: Path, target: str, made: Toy, **changes: object) -> str:
    kernels = [replace(Kernel(digest, record), **changes) for digest, record in made.records.items()]  # type: ignore[arg-type]
    return write_bundle(path, name="toy", target=target, parts={"step": made.launch}, kernels=kernels, constants={"table": torch.ones(8)})


@pytest.fixture
def made() -> Toy:
    return toy(PROGRAM, {"k": ["n0", 1, 1]})


StandsIn = Callable[[str], Recording]


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: Toy) -> StandsIn:
    """(target) -> the recording behind the device that `find_device` then gives."""

    def make(target: str) -> Recording:
        recording = Recording(target, tmp_path)
        for record in made.records.values():
            recording.describe(record["function"], kinds_of(record))
        device = StandIn(recording.driver, "compiled", compile_launcher(tmp_path))
        monkeypatch.setattr(gpu, "find_device", lambda name, tensors=None: device)
        return recording

    return make


@pytest.mark.parametrize("target", ["cuda:sm90", "rocm:gfx942", "metax"])
def test_a_finished_bundle_is_launched(target: str, made: Toy, stands_in: StandsIn, tmp_path: Path) -> None:
    digest = write(tmp_path / "b", target, made)
    recording = stands_in(target)
    with pytest.raises(UntrustedBundle):
        flagtree.load(tmp_path / "b")
    assert recording.lines("load") == []
    bundle = flagtree.load(tmp_path / "b", trust=digest)
    assert [line.split(" at ")[0] for line in recording.lines("load")] == ["load the aligned one", "load the generic one"]
    step = bundle.parts["step"].bind({"w": (w := torch.ones(8))})
    x = torch.ones(5, 8)
    y = step({"x": x})["y"]
    (launch,) = recording.lines("launch")
    for tensor in (x, w, y):
        assert f"ptr:{tensor.data_ptr():x}" in launch
    assert "i32:5 null null" in launch
    with pytest.raises(BindError, match="out of range"):
        step({"x": torch.ones(65, 8)})
    assert len(recording.lines("launch")) == 1


def test_what_is_below_the_last_tier_says_how_to_finish_it(made: Toy, tmp_path: Path) -> None:
    digest = write(tmp_path / "b", "metax", made, tier="llir", missing="binary (mcfatbin) needs MetaX's SDK")
    with pytest.raises(BundleError) as caught:
        flagtree.load(tmp_path / "b", trust=digest)
    assert "1 of 1 kernels are at tier llir" in caught.value.what
    assert caught.value.why == "binary (mcfatbin) needs MetaX's SDK"
    assert "flagtree finalize" in caught.value.hint


def test_without_the_device_it_is_one_error(made: Toy, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    for target in ("rocm:gfx942", "metax"):
        digest = write(tmp_path / target.replace(":", ""), target, made)
        with pytest.raises(DeviceError) as caught:
            flagtree.load(tmp_path / target.replace(":", ""), trust=digest)
        assert "is not on this machine" in caught.value.what
        assert "where the device and its driver are" in caught.value.hint


LOAD = """
import sys
import flagtree
try:
    flagtree.load(sys.argv[1], trust=sys.argv[2])
except flagtree.errors.FlagtreeError as error:
    print(type(error).__name__, error)
"""


def in_process(tmp_path: Path, repository: Path, *arguments: str, code: str = LOAD) -> subprocess.CompletedProcess[str]:
    """A process that finds the recording driver under the name of the CUDA driver."""
    home = tmp_path / "driver"
    home.mkdir()
    (home / "libcuda.so.1").write_bytes(driver_bytes("cuda:sm90"))
    env = {**os.environ, "LD_LIBRARY_PATH": str(home), "PYTHONPATH": str(repository), "RECORDING": str(tmp_path / "recording")}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False)


def test_a_driver_but_a_torch_without_it(made: Toy, tmp_path: Path, repository: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this torch has its device")
    digest = write(tmp_path / "b", "cuda:sm90", made)
    done = in_process(tmp_path, repository, str(tmp_path / "b"), digest)
    assert "DeviceError the bundle is for cuda:sm90: this torch cannot use the device for cuda:sm90" in done.stdout
    assert (tmp_path / "recording").read_text().startswith("init 0")


WHOLE = """
import sys
from pathlib import Path
import torch
import flagtree
from flagtree.runtime import gpu, launcher
from flagtree.runtime.driver import OpenDriver
from flagtree.targets import find_target

class StandIn(gpu.Device):
    def queue(self): return 7
    def capturing(self): return False

facts = find_target("cuda").driver
driver = OpenDriver(facts)
device = StandIn(driver, 0, torch.device("cpu"), launcher.Interpreted(driver.launch_function))
gpu.find_device = lambda target, tensors=None: device
part = flagtree.load(sys.argv[1], trust=sys.argv[2]).parts["step"]
part({"x": torch.ones(3, 8), "w": torch.ones(8)})
print([m for m in sys.modules if m.split(".")[0] in ("triton", "jinja2", "networkx")])
"""


def test_no_triton_and_a_clean_end(made: Toy, tmp_path: Path, repository: Path) -> None:
    """Load and launch import no Triton; at exit the process says nothing more to the driver, which may be gone by then."""
    digest = write(tmp_path / "b", "cuda:sm90", made)
    done = in_process(tmp_path, repository, str(tmp_path / "b"), digest, code=WHOLE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "[]"
    lines = (tmp_path / "recording").read_text().splitlines()
    assert lines[-1].startswith("launch")
    assert "stream 7" in lines[-1]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """The driver's own attributes decide: code for 8.0 runs on 8.6, code for 9.0 on 9.0 alone."""
    for target, capability, runs in (("cuda:sm80", (8, 6), True), ("cuda:sm80", (9, 0), False), ("cuda:sm90", (9, 0), True),
                                     ("cuda:sm90", (10, 0), False), ("cuda:sm86", (8, 0), False)):  # fmt: skip
        facts = find_target(target)
        recording = Recording(target, tmp_path)
        for name, value in zip(("capability_major", "capability_minor"), capability):
            ctypes.c_int.in_dll(recording.library, name).value = value
        assert facts.executes(recording.driver.attributes(0)) is runs


@dataclass(frozen=True)
class Properties:
    """What torch tells of a device."""

    name: str
    major: int
    minor: int
    gcnArchName: str = ""  # torch's own spelling


@pytest.mark.parametrize(("properties", "target"), [
    (Properties("NVIDIA H100 80GB HBM3", 9, 0), "cuda:sm90"), (Properties("NVIDIA A100-SXM4-80GB", 8, 0), "cuda:sm80"),
    (Properties("NVIDIA GeForce RTX 3090", 8, 6), "cuda:sm86"), (Properties("NVIDIA Thing", 8, 7), "cuda:sm86"),
    (Properties("NVIDIA L4", 8, 9), "cuda:sm89"), (Properties("NVIDIA B200", 10, 0), "cuda:sm100"), (Properties("Tesla T4", 7, 5), None),
    (Properties("NVIDIA Next", 11, 0), None), (Properties("AMD Instinct MI300X", 9, 4, "gfx942:sramecc+:xnack-"), "rocm:gfx942"),
    (Properties("MetaX C500", 8, 0), None),
])  # fmt: skip
def test_the_target_of_a_device(properties: Properties, target: str | None) -> None:
    found = target_of_device(properties)
    assert (found.name if found else None) == target
