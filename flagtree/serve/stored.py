"""Bundles of single graphs that this machine's store keeps for a lenient server: capture key to bundle.

Written when a server with `strict` off builds a graph at its start, read by the next start.  A damaged or missing bundle is a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flagtree.artifact.bundle import open_bundle
from flagtree.artifact.code import code_digest
from flagtree.artifact.files import canonical_json, parse_json, sha256
from flagtree.artifact.store import Store
from flagtree.errors import BundleError, StoreError
from flagtree.runtime.cpu import levels
from flagtree.settings import settings

KIND = "served"


def _identity(key: str) -> str:
    factors = {"graph": key, "torch": torch.__version__, "code": code_digest(), "level": levels()[0] if levels() else ""}
    return sha256(canonical_json(factors | {k: str(v) for k, v in settings.key_factors().items()}))


def find(key: str) -> tuple[Path, str] | None:
    """(path, digest) of a whole bundle with this graph."""
    entry = Store().get(KIND, _identity(key))
    if not entry:
        return None
    record: Any = parse_json(entry.files["bundle.json"], "a stored graph")
    path = settings.cache_dir / "bundles" / record["folder"]
    try:
        bundle = open_bundle(path)
        bundle.verify()
    except (BundleError, StoreError):
        return None
    return (path, bundle.digest) if bundle.digest == record["digest"] else None


def build(key: str, write: Callable[[Any, Path], Any]) -> tuple[Path, str]:
    """Build for this CPU's own level with `write(target, folder)`, and remember.  Called on a miss only."""
    from flagtree.targets import find_target

    folder = f"{_identity(key)[:16]}/served"
    home = settings.cache_dir / "bundles" / folder
    home.parent.mkdir(parents=True, exist_ok=True)
    report = write(replace(find_target("cpu"), levels=levels()[:1]), home)
    Store().put(KIND, _identity(key), {"bundle.json": canonical_json({"folder": folder, "digest": report.digest})})
    return home, report.digest
