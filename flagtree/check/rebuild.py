"""Building again what a bundle holds that is derived from texts in it, and comparing every byte.

Each kernel's files and launch record come from `kernel.ir`, the libraries of a CPU bundle from those, launch lists and the kernels' texts
from the parts' programs.  What comes from the captured model itself is named, not compared.  Called by check/verify.py.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from flagtree.artifact.bundle import Bundle, program_file
from flagtree.artifact.files import canonical_json, parse_json
from flagtree.artifact.store import Store
from flagtree.assemble import libraries_of, versions
from flagtree.check.stored import FACTS, TEXT, read_description, read_kernel
from flagtree.codegen.launch import launch_list
from flagtree.errors import BundleError, FlagtreeError
from flagtree.ir.canonical import digest, isolate_all
from flagtree.ir.text import parse_program
from flagtree.ir.verify import verify
from flagtree.progress import SILENT, Progress
from flagtree.targets.base import Target
from flagtree.toolchain.build import build_kernels


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """`compared`: files, by kind.  `differs`: those whose bytes are others now.  `inputs`: files that are not derived from others of the
    bundle.  `changed`: name of a version to (in the bundle, here), which may explain a difference."""

    compared: dict[str, int]
    differs: tuple[str, ...]
    inputs: tuple[str, ...]
    changed: dict[str, tuple[str, str]]


def rebuild(bundle: Bundle, target: Target, jobs: int = 1, progress: Progress = SILENT) -> Rebuilt:
    """Build every kernel of the bundle anew, not from the store, and every launch list.  Raises what the toolchain raises; BundleError
    for a program that is none."""
    texts = [(key, read_description(bundle, key).isolated.program) for key in sorted(bundle.manifest.kernels)]
    with tempfile.TemporaryDirectory(prefix="flagtree-rebuild-") as folder:
        built = {b.digest: b for b in build_kernels(texts, target, jobs, progress, Store(Path(folder)))}
    compared, differs = {"kernels": 0, "libraries": 0, "launch lists": 0}, []
    for key, kernel in built.items():
        stored = read_kernel(bundle, key)
        for name in sorted(stored.files.keys() | kernel.files.keys()):
            compared["kernels"] += 1
            if stored.files.get(name) != kernel.files.get(name):
                differs.append(f"kernels/{key[:16]}/{name}")
        if canonical_json(dict(stored.launch)) != canonical_json(dict(kernel.launch)):
            differs.append(f"manifest.json, launch of kernel {key[:16]}")
    for level, data in libraries_of(target, built).items():
        compared["libraries"] += 1
        if level not in bundle.manifest.libraries or bundle.library(level) != data:
            differs.append(f"lib/{level}.so")
    inputs = {f"kernels/{key[:16]}/{name}" for key in built for name in (TEXT, FACTS)}
    for part in bundle.manifest.parts:
        if (name := program_file(part)) in bundle.manifest.files:
            inputs.add(name)
            compared["launch lists"] += 1
            differs += _launch_list(bundle, part, name)
        else:  # written by an older flagtree
            inputs.add(f"launch/{part}.json")
    derived = ("kernels/", "lib/", "launch/")
    inputs |= {name for name in bundle.manifest.files if not name.startswith(derived)}
    here, there = versions(target), bundle.manifest.versions
    changed = {name: (there.get(name, "none"), here.get(name, "none")) for name in sorted(here.keys() | there.keys())
               if here.get(name) != there.get(name)}  # fmt: skip
    return Rebuilt(compared, tuple(differs), tuple(sorted(inputs)), changed)


def _launch_list(bundle: Bundle, part: str, name: str) -> list[str]:
    """What differs when the launch list of a part and its kernels' texts are made again from its program."""
    try:
        listed = bundle.read(f"launch/{part}.json")
        # a program is called by its model, whose name need not be one of the IR's
        program = parse_program(bundle.read(name).decode()).with_(name=str(parse_json(listed, f"launch/{part}.json")["name"]))  # type: ignore[index]
        verify(program)
        alone = {kernel.name: (isolated, digest(isolated.program)) for kernel, isolated in isolate_all(program)}
        made = canonical_json(launch_list(program, alone))
    except (FlagtreeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BundleError("the program of a part is not valid", where=f"{bundle.path}/{name}", why=str(error)) from None
    differs = [f"kernels/{key[:16]}/{TEXT}" for _, key in alone.values() if key not in bundle.manifest.kernels]
    return differs + ([f"launch/{part}.json"] if made != listed else [])
