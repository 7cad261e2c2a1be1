"""Building a bundle's kernels again from their stored text, and comparing every byte.

What is compared: each kernel's files, what a launch needs of it, and the libraries of a CPU bundle.  Launch lists come from the captured
model, which is not here.  Called by check/verify.py.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from flagtree.artifact.bundle import Bundle
from flagtree.artifact.files import canonical_json
from flagtree.artifact.store import Store
from flagtree.assemble import libraries_of, versions
from flagtree.check.stored import read_description, read_kernel
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Target
from flagtree.toolchain.build import build_kernels


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """`compared`: files.  `differs`: those whose bytes are others now.  `changed`: name of a version to (in the bundle, here), which may
    explain it."""

    compared: int
    differs: tuple[str, ...]
    changed: dict[str, tuple[str, str]]


def rebuild(bundle: Bundle, target: Target, jobs: int = 1, progress: Progress = SILENT) -> Rebuilt:
    """Build every kernel of the bundle anew, not from the store.  Raises what the toolchain raises."""
    texts = [(key, read_description(bundle, key).isolated.program) for key in sorted(bundle.manifest.kernels)]
    with tempfile.TemporaryDirectory(prefix="flagtree-rebuild-") as folder:
        built = {b.digest: b for b in build_kernels(texts, target, jobs, progress, Store(Path(folder)))}
    compared, differs = 0, []
    for key, kernel in built.items():
        stored = read_kernel(bundle, key)
        for name in sorted(stored.files.keys() | kernel.files.keys()):
            compared += 1
            if stored.files.get(name) != kernel.files.get(name):
                differs.append(f"kernels/{key[:16]}/{name}")
        if canonical_json(dict(stored.launch)) != canonical_json(dict(kernel.launch)):
            differs.append(f"manifest.json, launch of kernel {key[:16]}")
    for level, data in libraries_of(target, built).items():
        compared += 1
        if level not in bundle.manifest.libraries or bundle.library(level) != data:
            differs.append(f"lib/{level}.so")
    here, there = versions(target), bundle.manifest.versions
    changed = {name: (there.get(name, "none"), here.get(name, "none")) for name in sorted(here.keys() | there.keys())
               if here.get(name) != there.get(name)}  # fmt: skip
    return Rebuilt(compared, tuple(differs), changed)
