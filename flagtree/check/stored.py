"""What a bundle holds of each kernel beside its code, so that it can be verified and built again where no model was captured.

`kernels/<16 hex>/kernel.ir` is the canonical text whose hash is the kernel's digest; `kernel.json` says what the kernel is called, where
it comes from, and what PyTorch computes for it.  Written by flagtree/assemble.py through check/evidence.py, read by `verify`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flagtree.artifact.bundle import Bundle
from flagtree.artifact.files import canonical_json, parse_json
from flagtree.check.certify import Subject
from flagtree.check.recipe import run_recipe
from flagtree.errors import BundleError, IRError
from flagtree.ir.canonical import Isolated, digest
from flagtree.ir.program import Kernel, Origin
from flagtree.ir.text import parse_program, print_program
from flagtree.ir.verify import verify
from flagtree.toolchain.base import BuiltKernel

FORMAT = 1
TEXT, FACTS = "kernel.ir", "kernel.json"


@dataclass(frozen=True, slots=True)
class Description:
    """One distinct kernel: as it stands in the program, alone, and what eager computes for it (None with the reason why not)."""

    kernel: Kernel
    isolated: Isolated
    eager: Mapping[str, Any] | None
    uncompared: str = ""


def kernel_files(described: Description) -> dict[str, bytes]:
    """The two files by name."""
    kernel, alone = described.kernel, described.isolated
    facts = {
        "format": FORMAT, "name": kernel.name, "ops": list(kernel.ops),
        "origins": [[o.node, o.module, o.source] for o in kernel.origins],
        "buffers": list(alone.buffers), "symbols": [str(s) for s in alone.symbols],
        "eager": None if described.eager is None else dict(described.eager), "uncompared": described.uncompared,
    }  # fmt: skip
    return {TEXT: print_program(alone.program).encode(), FACTS: canonical_json(facts)}


def subject_of(key: str, described: Description, built: BuiltKernel | None = None) -> Subject:
    """What the certificate examines."""
    eager = None if described.eager is None else partial(run_recipe, described.eager)
    return Subject(key, described.isolated, described.kernel, built, eager, uncompared=described.uncompared)


def stored_subjects(bundle: Bundle) -> list[Subject]:
    """Every kernel of a bundle with its code, in order of the digests.  BundleError for a bundle without these files, for a text that is
    no kernel, and for one that is not the kernel of its digest."""
    return [subject_of(key, read_description(bundle, key), read_kernel(bundle, key)) for key in sorted(bundle.manifest.kernels)]


def read_kernel(bundle: Bundle, key: str) -> BuiltKernel:
    """The kernel's code, as the toolchain returned it."""
    listed = bundle.manifest.kernels[key]
    files = {name: bundle.read(f"kernels/{key[:16]}/{name}") for name in listed.files if name not in (TEXT, FACTS)}
    return BuiltKernel(key, listed.tier, listed.missing, files, listed.launch, listed.facts)


def read_description(bundle: Bundle, key: str) -> Description:
    """The two files of a kernel, checked.  BundleError."""
    folder = f"kernels/{key[:16]}"
    if not {TEXT, FACTS} <= set(bundle.manifest.kernels[key].files):
        raise BundleError("the bundle does not hold the text of its kernels", where=f"{bundle.path}/{folder}",
                          why="it was built by an older flagtree", hint="build it again")  # fmt: skip
    try:
        program = parse_program(bundle.read(f"{folder}/{TEXT}").decode())
        verify(program)
    except (IRError, UnicodeDecodeError) as error:
        raise BundleError("the text of a kernel is not valid", where=f"{bundle.path}/{folder}/{TEXT}", why=str(error)) from None
    if digest(program) != key:
        raise BundleError("a kernel's text is not the kernel of its digest", where=f"{bundle.path}/{folder}/{TEXT}",
                          why=f"its digest is {digest(program)}", hint="build the bundle again")  # fmt: skip
    facts = parse_json(bundle.read(f"{folder}/{FACTS}"), f"{folder}/{FACTS}")
    try:
        return _description(program.steps[0], Isolated(program, tuple(facts["buffers"]), tuple(map(str, facts["symbols"]))), facts)  # type: ignore[index,arg-type]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BundleError("what is stored of a kernel is not valid", where=f"{bundle.path}/{folder}/{FACTS}", why=why) from None


def _description(kernel: Kernel, alone: Isolated, facts: Mapping[str, Any]) -> Description:
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']!r}, this flagtree reads {FORMAT}")
    if len(alone.program.steps) != 1 or not isinstance(kernel, Kernel):
        raise ValueError("the text is not that of one kernel")
    if len(alone.buffers) != len(alone.program.buffers) or len(alone.symbols) != len(alone.program.symbols):
        raise ValueError("it names other buffers or symbols than the text has")
    origins = tuple(Origin(node, module, source) for node, module, source in facts["origins"])
    named = replace(kernel, name=str(facts["name"]), ops=tuple(map(str, facts["ops"])), origins=origins)
    if facts["eager"] is not None and not isinstance(facts["eager"], dict):
        raise ValueError("its eager computation is none")
    return Description(named, alone, facts["eager"], str(facts["uncompared"]))
