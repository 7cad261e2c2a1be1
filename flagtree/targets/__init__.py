"""The registry of targets: which module holds a chip family, and how a name that a user types finds its Target.

A family is one module with `TARGETS: tuple[Target, ...]`; a name or an alias belongs to one target only, a clash is an error.
Families outside this tree come in through the entry point group `flagtree.targets`, each entry naming such a module.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points

from flagtree.errors import FlagtreeError, UnknownName
from flagtree.targets.base import Target

FAMILIES: Mapping[str, str] = {
    "cpu": "flagtree.targets.cpu",
    "cuda": "flagtree.targets.cuda",
    "rocm": "flagtree.targets.rocm",
    "metax": "flagtree.targets.metax",
    "flagos": "flagtree.targets.flagos",
}
GROUP = "flagtree.targets"


class TargetError(FlagtreeError):
    """A family that cannot be loaded, or two that claim one name."""


def find_target(name: str) -> Target:
    """The target of that name or alias, upper or lower case.  Raises UnknownName with the closest names."""
    names = _registry()
    found = names.get(name.strip().lower())
    if found is None:
        raise UnknownName("target", name, names, hint="`flagtree targets` lists them")
    return found


def all_targets() -> tuple[Target, ...]:
    """Every target once, in-tree families first, each in the order of its file."""
    return tuple({target.name: target for target in _registry().values()}.values())


def target_of_device(properties: object) -> Target | None:
    """The target whose code a device executes best, from torch's properties of the device; None where no target's does."""
    best = max(all_targets(), key=lambda target: target.fit(properties), default=None)
    return best if best is not None and best.fit(properties) else None


@functools.cache
def _registry() -> Mapping[str, Target]:
    return register(FAMILIES, entry_points(group=GROUP))


def register(families: Mapping[str, str], outside: Iterable[EntryPoint]) -> dict[str, Target]:
    """Names and aliases, in lower case, to targets.  Raises TargetError on a clash or a family that does not load."""
    names: dict[str, Target] = {}
    owners: dict[str, str] = {}
    modules: list[tuple[str, object]] = [(module, importlib.import_module(module)) for module in families.values()]
    modules += [(point.value, _load(point)) for point in sorted(outside, key=lambda p: (p.name, p.value))]
    for module_name, module in modules:
        for target in _targets_of(module_name, module):
            for name in (target.name, *target.aliases):
                key = name.lower()
                if key in names:
                    raise TargetError(
                        f"two targets are called '{name}'", where=f"{owners[key]} and {module_name}",
                        why=f"it names both {names[key].name} and {target.name}", hint="rename one or uninstall its package",
                    )
                names[key], owners[key] = target, module_name
    return names


def _load(point: EntryPoint) -> object:
    try:
        module = point.load()
    except Exception as error:
        raise TargetError(
            f"the target family '{point.name}' does not load", where=f"entry point {GROUP}: {point.value}",
            why=f"{type(error).__name__}: {error}", hint="repair or uninstall the package that brings it",
        ) from error
    return module


def _targets_of(module_name: str, module: object) -> tuple[Target, ...]:
    found = getattr(module, "TARGETS", None)
    if not isinstance(found, tuple) or not all(isinstance(t, Target) for t in found):
        raise TargetError(
            "a target family without a table of targets", where=module_name, why="`TARGETS` is no tuple of Target",
            hint="see examples/a_chip_in_an_hour.py",
        )
    return found
