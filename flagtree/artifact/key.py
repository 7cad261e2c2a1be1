"""Keys: the named factors that decide whether a stored result may be used again.

A key is the hash of its factors' canonical JSON, so every factor can be shown and compared; no factor may hold a place
on this machine.  `store.py` keeps the factors beside each entry, which is how a miss explains itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flagtree.artifact.files import canonical_json, sha256
from flagtree.errors import FlagtreeError

_SHOWN = 60  # characters of a value in an explanation


@dataclass(frozen=True, slots=True)
class KeyFactors:
    """Factor name to JSON value.  FlagtreeError when a value is an absolute path: a key must be the same in another home."""

    factors: Mapping[str, object]

    def __post_init__(self) -> None:
        for name, value in self.factors.items():
            if (where := _absolute_path(value)) is not None:
                raise FlagtreeError(f"the key factor '{name}' is a place on this machine", where=where, hint="use the hash of the content")

    def digest(self) -> str:
        """64 hex digits; equal factors give equal digests in any process and on any machine."""
        return sha256(canonical_json(dict(self.factors)))


def _absolute_path(value: object) -> str | None:
    if isinstance(value, str):
        return value if len(value) > 1 and "\n" not in value and os.path.isabs(value) else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((p for p in map(_absolute_path, value) if p is not None), None)
    return None


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Nested objects as dotted names, so that a difference is shown where it is."""
    if isinstance(value, Mapping) and value:
        return {k: v for key in sorted(value) for k, v in _flat(value[key], f"{name}.{key}" if name else str(key)).items()}
    return {name: value}


def diff(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """One line a factor that differs, by name: `torch: 2.12.0 -> 2.13.0`."""
    a, b = _flat(old) if old else {}, _flat(new) if new else {}
    lines = []
    for name in sorted(a.keys() | b.keys()):
        if name not in a:
            lines.append(f"{name}: absent -> {_short(b[name])}")
        elif name not in b:
            lines.append(f"{name}: {_short(a[name])} -> absent")
        elif canonical_json(a[name]) != canonical_json(b[name]):
            lines.append(f"{name}: {_short(a[name])} -> {_short(b[name])}")
    return lines


def _short(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value).decode().strip()
    if len(text) <= _SHOWN and "\n" not in text:
        return text
    return f"{text.splitlines()[0][:_SHOWN]}… ({len(text)} characters, sha256 {sha256(text.encode())[:12]})"


def explain_miss(wanted: Mapping[str, object], stored: Iterable[Mapping[str, object]]) -> list[str]:
    """Why no entry fits: the differences from the stored factors that are nearest to `wanted`."""
    nearest = min((diff(have, wanted) for have in stored), key=len, default=None)
    return ["nothing of this kind is stored"] if nearest is None else nearest
