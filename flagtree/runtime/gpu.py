"""Kernels on a GPU: the device of this process, and compiled kernels as launches on it.

A kernel's modules are loaded when it is bound, once a device and binary, so that no call, and no capture of a graph, loads anything.
Imports no triton and no compiler; which driver and which devices belong to a target is the target's data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from flagtree.artifact.files import sha256
from flagtree.errors import BundleError, DeviceError, UnknownName
from flagtree.runtime import launcher
from flagtree.runtime.driver import OpenDriver


class Device:
    """One device that torch's tensors live on and the driver launches on.

    `tensors`: torch's device.  `driver`, `place`: how the driver names it.  `queue`: its current stream, asked once a call;
    `capturing`: is that stream being recorded into a graph.
    """

    def __init__(self, driver: OpenDriver, ordinal: int, tensors: torch.device, route: launcher.Route | None = None) -> None:
        self.driver, self.ordinal, self.tensors = driver, ordinal, tensors
        self.place = driver.place(ordinal)
        self.route = route or launcher.route(driver.launch_function)
        self.attributes = driver.attributes(ordinal)
        self._functions: dict[tuple[str, str, int], int] = {}
        self._modules: dict[str, int] = {}
        self._lock = threading.Lock()

    def queue(self) -> int:
        return torch.cuda.current_stream(self.tensors).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def here(self) -> AbstractContextManager[None]:
        """For a block, this thread's driver calls are for this device."""
        return self.driver.at(self.place)

    def function(self, image: bytes, name: str, shared: int) -> int:
        """A kernel of a binary, loaded once, allowed to ask for `shared` bytes.  DeviceError when the driver refuses it."""
        digest = sha256(image)
        key = (digest, name, shared)
        with self._lock:
            if key not in self._functions:
                with self.here():
                    if digest not in self._modules:
                        self._modules[digest] = self.driver.load(image, name)
                    function = self.driver.function(self._modules[digest], name, name)
                    self.driver.allow_shared(function, shared, name)
                self._functions[key] = function
            return self._functions[key]


Read = Callable[[str, str], bytes]  # (kernel digest, file) -> its bytes


class GpuLibrary:
    """A `prepare.Library` of GPU kernels.  `launches`: digest to launch record; `read` gives the binary that a record names."""

    def __init__(self, device: Device, launches: Mapping[str, Mapping[str, Any]], read: Read, where: str = "") -> None:
        self.device, self.tensors, self.where = device, device.tensors, where
        self._launches, self._read = launches, read
        self._records: dict[str, launcher.LaunchRecord] = {}

    def kernel(self, digest: str) -> launcher.LaunchRecord:
        """The kernel with its modules loaded on the device.  BundleError when the library lacks it, DeviceError from the driver."""
        if digest not in self._records:
            launch = self._launches.get(digest)
            if launch is None:
                raise BundleError(f"the library lacks the kernel {digest[:16]}", where=self.where, hint="build it again")

            def load(variant: str, file: str, shared: int) -> int:
                return self.device.function(self._read(digest, file), launch["function"], shared)

            self._records[digest] = launcher.read_record(launch, load)
        return self._records[digest]

    def launch(self, calls: Sequence[launcher.Call], stream: int) -> list[Callable[[], object]]:
        """Neighbouring launches as one closure."""
        return [self.device.route.run(calls, stream, self._refused)]

    def _refused(self, record: launcher.LaunchRecord, code: int) -> DeviceError:
        return launcher.refusal(code, record) or self.device.driver.error("launch", code, record.name)


# -- which device, which target --------------------------------------------------------------------------------------
_devices: dict[tuple[str, int], Device] = {}


def target_name(tensors: torch.device) -> str | None:
    """The name of the target whose code this device of torch's executes best, None where no target's does."""
    from flagtree.targets import target_of_device

    target = target_of_device(torch.cuda.get_device_properties(tensors))
    return None if target is None else target.name


def launches(target: str) -> bool:
    """Is `target` the name of a target whose kernels are launched through a driver?"""
    from flagtree.targets import find_target

    try:
        return find_target(target).driver is not None
    except UnknownName:
        return False


def find_device(target: str, tensors: torch.device | str | int | None = None) -> Device:
    """This machine's device for a target's kernels; `tensors`: which of torch's, the current one by default.

    DeviceError: no driver, no device, another architecture, a torch that was built without it.
    """
    from flagtree.targets import find_target

    facts = find_target(target)
    if facts.driver is None:
        raise DeviceError(f"kernels for {target} are not launched through a driver")
    driver = _driver(target)
    if not torch.cuda.is_available():
        raise DeviceError(f"this torch cannot use the device for {target}", why=f"torch {torch.__version__} has no such device at hand",
                          hint="install a build of torch for this device")  # fmt: skip
    chosen = torch.device(facts.driver.device, torch.cuda.current_device()) if tensors is None else torch.device(tensors)
    ordinal = torch.cuda.current_device() if chosen.index is None else chosen.index
    if chosen.type != facts.driver.device:
        raise DeviceError(f"{chosen} does not execute kernels for {target}", hint=f"name a device such as {facts.driver.device}:0")
    found = driver.attributes(ordinal)
    if not facts.executes(found):
        raise DeviceError(f"device {ordinal} does not execute kernels for {target}", why=f"it is of another architecture: {found}",
                          hint="flagtree targets shows what runs here; compile for the device's own target")  # fmt: skip
    key = (facts.driver.name, ordinal)
    if key not in _devices:
        _devices[key] = Device(driver, ordinal, torch.device(facts.driver.device, ordinal))
    return _devices[key]


_drivers: dict[str, OpenDriver] = {}


def _driver(target: str) -> OpenDriver:
    """The target's driver, opened once a process."""
    from flagtree.targets import find_target

    facts = find_target(target).driver
    assert facts is not None
    if facts.name not in _drivers:
        _drivers[facts.name] = OpenDriver(facts)
    return _drivers[facts.name]
