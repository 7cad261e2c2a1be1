"""A vendor's driver library, opened: devices, contexts, modules and functions, by the names that a target's `Driver` lists.

Every call's code is looked at; a refusal is one DeviceError with the driver's own code and name.  Nothing here launches: `launcher.py`
does, with the address of the driver's launch function.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flagtree.errors import DeviceError

if TYPE_CHECKING:
    from flagtree.targets.base import Driver

# What each role is called with.  CUDA, HIP and MACA agree on all of them; where there is no role "retain" (HIP) what is made
# current is the device's number, else its primary context.
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "init": (ctypes.c_uint,),                      # flags
    "count": (_POINTER,),                          # int *count
    "device": (_POINTER, _INT),                    # int *device, ordinal
    "attribute": (_POINTER, _INT, _INT),           # int *value, attribute, device
    "retain": (_POINTER, _INT),                    # context *, device
    "current": (_POINTER,),                        # context * or int *device
    "set_current": (ctypes.c_uint64,),             # context or int device: a word holds both on a little-endian machine
    "load": (_POINTER, ctypes.c_char_p),           # module *, image
    "function": (_POINTER, _POINTER, ctypes.c_char_p),  # function *, module, name
    "set_attribute": (_POINTER, _INT, _INT),       # function, attribute, value
    # function, grid x y z, block x y z, bytes of shared memory, stream, void **arguments, void **extra
    "launch": (_POINTER, *[ctypes.c_uint] * 7, _POINTER, _POINTER, _POINTER),
}  # fmt: skip
OPTIONAL = frozenset(("attribute", "retain", "set_attribute", "error_name"))


class OpenDriver:
    """The library of `facts`, initialised.  DeviceError: it is not here, lacks a function, or finds no device."""

    def __init__(self, facts: Driver) -> None:
        self.facts = facts
        self.library = _open(facts)
        self._functions = {}
        for role, arguments in ARGUMENTS.items():
            name = facts.symbols.get(role)
            if name is None and role in OPTIONAL:
                continue
            try:
                function = self.library[name or role]
            except AttributeError:
                raise DeviceError(f"{facts.name} has no function {name or role}", where=self.library._name,
                                  hint="install a newer driver") from None  # fmt: skip
            function.argtypes, function.restype = arguments, ctypes.c_int
            self._functions[role] = function
        self.launch_function = self._functions["launch"]
        self.call("init", 0)
        self.count = self._integer("count")
        if not self.count:
            raise DeviceError("there is no device here", where=facts.name, why="the driver counts none")

    def call(self, role: str, *arguments: object, where: str = "") -> None:
        """Call the function of a role.  DeviceError when it refuses."""
        code = self._functions[role](*arguments)
        if code:
            raise self.error(role, code, where)

    def error(self, role: str, code: int, where: str = "") -> DeviceError:
        """What to raise for the driver's `code`."""
        return DeviceError(f"{self.facts.name} refused {self.facts.symbols[role]}", where=where, why=f"code {code}{self._name(code)}")

    def _name(self, code: int) -> str:
        symbol = self.facts.symbols.get("error_name")
        function = None if symbol is None else getattr(self.library, symbol, None)
        if function is None:
            return ""
        text = ctypes.c_char_p()
        if self.facts.error_returned:
            function.argtypes, function.restype = (_INT,), ctypes.c_char_p
            text.value = function(code)
        else:
            function.argtypes, function.restype = (_INT, _POINTER), _INT
            function(code, ctypes.addressof(text))
        return f", {text.value.decode('ascii', 'replace')}" if text.value else ""

    def _integer(self, role: str, *arguments: object) -> int:
        value = ctypes.c_int()
        self.call(role, ctypes.addressof(value), *arguments)
        return value.value

    def _word(self, role: str, *arguments: object, where: str = "") -> int:
        value = ctypes.c_uint64()
        self.call(role, ctypes.addressof(value), *arguments, where=where)
        return value.value

    # -- devices -----------------------------------------------------------------------------------------------------
    def device(self, ordinal: int) -> int:
        """The driver's handle of device `ordinal`.  DeviceError when there are fewer."""
        if not 0 <= ordinal < self.count:
            raise DeviceError(f"there is no device {ordinal} here", where=self.facts.name, why=f"it counts {self.count}")
        return self._integer("device", ordinal)

    def attributes(self, ordinal: int) -> tuple[int, ...]:
        """The device attributes that the facts name, in their order."""
        return tuple(self._integer("attribute", a, self.device(ordinal)) for a in self.facts.attributes)

    def place(self, ordinal: int) -> int:
        """What is made current to work on a device: its primary context, which torch uses as well, or its number."""
        device = self.device(ordinal)
        return self._word("retain", device) if "retain" in self._functions else device

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """Make a place current in this thread for a block; another device's place comes back afterwards."""
        before = self._word("current")
        if before == place:
            yield
            return
        self.call("set_current", place)
        try:
            yield
        finally:
            if before:  # a thread that had no context keeps this one
                self.call("set_current", before)

    # -- code --------------------------------------------------------------------------------------------------------
    def load(self, image: bytes, where: str) -> int:
        """A module from a binary, in the current place.  It stays loaded until the process ends, as the driver's own end removes it."""
        return self._word("load", image, where=where)

    def function(self, module: int, name: str, where: str) -> int:
        """A module's function.  CUDA's lazy loading ends here: nothing is left to load during a graph's capture."""
        return self._word("function", module, name.encode(), where=where)

    def allow_shared(self, function: int, size: int, where: str) -> None:
        """Let launches of `function` ask for `size` bytes of dynamic shared memory, where the driver wants to be told."""
        if self.facts.shared_attribute is not None and size > self.facts.shared_free:
            self.call("set_attribute", function, self.facts.shared_attribute, size, where=where)


def _open(facts: Driver) -> ctypes.CDLL:
    """The first library that this process has already, else the first that opens: torch may have brought its own."""
    why = ""
    for flags in (os.RTLD_NOLOAD, 0):
        for name in facts.libraries:
            try:
                return ctypes.CDLL(name, mode=ctypes.RTLD_LOCAL | flags)
            except OSError as error:
                why = str(error)
    raise DeviceError(f"{facts.name} is not on this machine", why=why, hint="run where the device and its driver are")
