"""`flagtree.load`: a bundle as callables, without any compiler.

Trust is asked for before code is mapped, promises are checked before a kernel runs, and the ATen calls that are left
are listed.  Imports neither the compiler's packages nor what they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flagtree.artifact.bundle import Bundle, open_bundle, summarise
from flagtree.artifact.trust import check_trust
from flagtree.errors import BundleError, DeviceError
from flagtree.runtime import cpu, gpu
from flagtree.runtime.bind import Checker, check_names, describe
from flagtree.runtime.cpu import CpuLibrary
from flagtree.runtime.gpu import GpuLibrary
from flagtree.runtime.launch import Executable, Session


@dataclass(frozen=True, slots=True)
class ExternUse:
    """A call that is left to the platform's library: how often it runs in one call of the part, and why it is left."""

    callee: str
    reason: str
    count: int


class BoundPart:
    """A part whose weights are bound: call it with inputs and states by name.  States are written in place."""

    def __init__(self, part: Part, weights: Mapping[str, torch.Tensor]) -> None:
        executable = part.executable
        self.name = part.name
        self._session: Session = executable.bind(weights)
        self.takes: tuple[str, ...] = tuple(b.name for b in self._session.inputs)
        self._checker = Checker(executable.prepared, self.takes, self._session.bound)
        self._names = frozenset(self.takes)
        self._outputs = part.outputs

    def __call__(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs and states in, outputs by name out.  BindError naming the tensor and the promise that it breaks."""
        if tensors.keys() != self._names:
            check_names(tensors.keys(), self.takes, self.name)
        self._checker.check(tensors)
        with torch.no_grad():
            results = self._session([tensors[n] for n in self.takes])
        return dict(zip(self._outputs, results))


class Part:
    """One entry of a bundle, such as prefill.  `inputs`, `states`, `weights`: name to declaration; `outputs`: names."""

    def __init__(self, name: str, launch: Mapping[str, Any], executable: Executable) -> None:
        self.name, self.executable = name, executable
        self.inputs = {b.name: describe(b) for b in executable.inputs if b.role in ("input", "scalar", "opaque")}
        self.states = {b.name: describe(b) for b in executable.inputs if b.role == "state"}
        self.weights = {b.name: describe(b) for b in executable.inputs if b.role in ("weight", "constant")}
        self.outputs = tuple(o if isinstance(o, str) else f"output{i}" for i, o in enumerate(launch["outputs"]))
        self.externs = tuple(ExternUse(e["callee"], e["reason"], e["count"]) for e in summarise(launch)["externs"])
        self._bound: tuple[list[int], BoundPart] | None = None

    def bind(self, weights: Mapping[str, torch.Tensor]) -> BoundPart:
        """Check and bind the weights once.  They are read in place: keep them where they are.  BindError for a missing or
        unknown name, or a promise that a weight breaks."""
        check_names(weights.keys(), list(self.weights), self.name)
        weights = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in weights.items()}
        Checker(self.executable.prepared, list(self.weights), self.executable.constants).check(weights)
        return BoundPart(self, weights)

    def __call__(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Weights, inputs and states in one mapping.  Binds on the first call, and again when a weight is another tensor."""
        check_names(tensors.keys(), [*self.weights, *self.inputs, *self.states], self.name)
        weights = {n: tensors[n] for n in self.weights}
        held = [t.data_ptr() if isinstance(t, torch.Tensor) else 0 for t in weights.values()]
        if self._bound is None or self._bound[0] != held:
            self._bound = (held, self.bind(weights))
        else:
            Checker(self.executable.prepared, list(self.weights), self.executable.constants).check(weights)
        return self._bound[1]({n: t for n, t in tensors.items() if n not in weights})


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """`parts`: name to callable.  `level`: the CPU level that runs, "" on another device.  `device`: where its tensors live."""

    bundle: Bundle
    level: str
    parts: Mapping[str, Part]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def digest(self) -> str:
        return self.bundle.digest


def load(
    path: str | Path, *, trust: str | None = None, threads: int | None = None, device: torch.device | str | None = None
) -> LoadedBundle:
    """Load a bundle for execution on this machine.

    `trust`: the digest of the bundle, where this machine did not build it.  `threads`: threads of this process's OpenMP,
    torch's operators included (`torch.set_num_threads`).  `device`: for a GPU's bundle which of torch's devices, by default the
    current one.  BundleError: no bundle, damaged, for a CPU that is not here, made for an operator that this torch lacks, kernels
    that no vendor's compiler has finished; UntrustedBundle: nobody vouched for its code; DeviceError: its device is not here.
    """
    bundle = open_bundle(path)
    check_trust(bundle.digest, trust, where=str(path))
    level, library = kernel_library(bundle, device)
    constants = bundle.constants()
    if threads is not None:
        torch.set_num_threads(threads)
    launches = {name: bundle.part(name) for name in bundle.manifest.parts}
    parts = {name: Part(name, launch, Executable(launch, library, constants)) for name, launch in launches.items()}
    return LoadedBundle(bundle, level, parts, library.tensors)


def kernel_library(bundle: Bundle, device: torch.device | str | None = None) -> tuple[str, CpuLibrary | GpuLibrary]:
    """The bundle's kernels mapped on this machine, with the CPU level that runs ("" on another device).  Who calls it asked for trust.
    BundleError and DeviceError as of `load`."""
    if bundle.manifest.libraries:
        level = cpu.best_level(bundle.manifest.libraries, str(bundle.path))
        return level, cpu.load_library(bundle.library(level), f"{bundle.path}/lib/{level}.so")
    return "", _gpu_library(bundle, device)


def _gpu_library(bundle: Bundle, device: torch.device | str | None) -> GpuLibrary:
    """The bundle's kernels on this machine's device.  BundleError for a kernel below the tier `binary`, DeviceError without the device."""
    manifest, where = bundle.manifest, str(bundle.path)
    if not gpu.launches(manifest.target):
        raise BundleError(
            f"the bundle is for {manifest.target}, which is not in this machine's reach",
            where=where,
            why="it holds no library for a CPU, and flagtree knows no driver for its target",
            hint="flagtree targets shows what runs here; compile for the target 'cpu' to run on the CPU",
        )
    unfinished = {digest: kernel for digest, kernel in manifest.kernels.items() if kernel.tier != "binary"}
    if unfinished:
        first = next(iter(unfinished.values()))
        raise BundleError(
            f"the bundle for {manifest.target} cannot run: {len(unfinished)} of {len(manifest.kernels)} kernels are at tier {first.tier}",
            where=where,
            why=first.missing or "no binary was built",
            hint="`flagtree finalize BUNDLE` raises the tier where the vendor's toolchain is installed",
        )

    def read(digest: str, file: str) -> bytes:
        return bundle.read(f"kernels/{digest[:16]}/{file}")

    try:
        found = gpu.find_device(manifest.target, device)
    except DeviceError as error:
        raise DeviceError(
            f"the bundle is for {manifest.target}: {error.what}", where=where, why=error.why,
            hint=f"{error.hint + '; ' if error.hint else ''}flagtree targets shows what runs here",
        ) from error  # fmt: skip
    return GpuLibrary(found, {digest: kernel.launch for digest, kernel in manifest.kernels.items()}, read, where)
