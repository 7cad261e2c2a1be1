"""Building kernels through the store: what was built before, for the same target by the same tools, is read back.

Equal digests are built once; the toolchain that the target names does the rest.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

from flagtree.artifact.code import code_digest
from flagtree.artifact.key import KeyFactors
from flagtree.artifact.store import Store
from flagtree.errors import StoreError
from flagtree.ir.program import Program
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel


class Toolchain(Protocol):
    """A module of this package: `build` makes kernels, `versions` names every tool whose change changes bytes."""

    def build(self, kernels: Sequence[tuple[str, Program]], target: Target, jobs: int, progress: Progress) -> list[BuiltKernel]: ...

    def versions(self, target: Target) -> dict[str, str]: ...


def toolchain_of(target: Target) -> Toolchain:
    """The module that the target names: one of this package, or by its whole name one of the package that brings the target."""
    return importlib.import_module(target.toolchain if "." in target.toolchain else f"flagtree.toolchain.{target.toolchain}")


def key_factors(digest: str, target: Target, versions: dict[str, str]) -> KeyFactors:
    """What decides the bytes of one built kernel."""
    return KeyFactors(
        {"kernel": digest, "target": target.name, "levels": list(target.levels), "tools": versions, "flagtree": code_digest()}
    )


def build_kernels(
    kernels: Sequence[tuple[str, Program]],
    target: Target,
    jobs: int,
    progress: Progress = SILENT,
    store: Store | None = None,
    on_stored: Callable[[int], None] = lambda count: None,
) -> list[BuiltKernel]:
    """One BuiltKernel a distinct digest, in order of first appearance; `on_stored` hears how many the store had.

    ToolchainError or CodegenError for the first that fails.
    """
    distinct = dict(kernels)
    toolchain, store = toolchain_of(target), store or Store()
    versions = toolchain.versions(target)
    keys = {digest: key_factors(digest, target, versions) for digest in distinct}
    found = {digest: built for digest, key in keys.items() if (built := _stored(store, digest, key)) is not None}
    progress.advance(len(found))
    on_stored(len(found))
    missing = [(digest, program) for digest, program in distinct.items() if digest not in found]
    if missing:
        for built in toolchain.build(missing, target, jobs, progress):
            found[built.digest] = built
            _keep(store, built, keys[built.digest])
    return [found[digest] for digest in distinct]


def _stored(store: Store, digest: str, key: KeyFactors) -> BuiltKernel | None:
    entry = store.get("kernel", key.digest())
    if not entry:
        return None
    meta = entry.meta
    return BuiltKernel(digest, str(meta["tier"]), str(meta["missing"]), dict(entry.files), dict(meta["launch"]), dict(meta["facts"]))  # type: ignore[call-overload]


def _keep(store: Store, built: BuiltKernel, key: KeyFactors) -> None:
    meta = {"tier": built.tier, "missing": built.missing, "launch": dict(built.launch), "facts": dict(built.facts)}
    # a store that cannot be written makes the next build slow, not this one wrong; the caller reports it once
    with contextlib.suppress(StoreError):
        store.put("kernel", key.digest(), dict(built.files), {**meta, "factors": dict(key.factors)})
