"""A bundle opened for serving: trusted, its kernels mapped, its graphs known by capture key, and what differs when one is missing.

Opened once a process and digest.  Everything that can be wrong with a bundle is said here, before weights are loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flagtree.artifact.bundle import Bundle, open_bundle
from flagtree.artifact.trust import check_trust
from flagtree.errors import BundleError
from flagtree.runtime.cpu import CpuLibrary
from flagtree.runtime.gpu import GpuLibrary
from flagtree.runtime.load import kernel_library

SHOWN = 3  # lines of a difference


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph of a bundle: its part's name, launch list and results."""

    part: str
    launch: Mapping[str, Any]
    results: list

    @property
    def arguments(self) -> list[str]:
        """What the graph takes, in order: the launch list declares a caller's buffers in the order of the arguments."""
        return [b["name"] for b in self.launch["buffers"] if b["alias"] is None and b["role"] not in ("temp", "formal")]


class OpenedBundle:
    """`graph(key)` answers from the bundle."""

    def __init__(self, path: Path, bundle: Bundle, library: CpuLibrary | GpuLibrary | None) -> None:
        self.path, self.bundle, self.library = path, bundle, library
        self.parts = {c["graph"]["key"]: part for part, c in bundle.manifest.coverage.items() if isinstance(c, dict) and "graph" in c}

    @property
    def digest(self) -> str:
        return self.bundle.digest

    @property
    def device(self) -> str:
        """The kind of torch's device that its kernels run on; "" when it has none."""
        return "" if self.library is None else self.library.tensors.type

    def graph(self, key: str) -> Graph | None:
        """The graph with this capture key."""
        part = self.parts.get(key)
        if part is None:
            return None
        told: Any = self.bundle.manifest.coverage[part]
        return Graph(part, self.bundle.part(part), told["graph"]["results"])

    def arguments(self, key: str) -> list[str]:
        """Names of what the graph with this key takes."""
        graph = self.graph(key)
        return [] if graph is None else graph.arguments

    def facts(self) -> list[Mapping[str, str]]:
        """What is known of the model and the server of each graph."""
        return [told["graph"]["facts"] | told["graph"]["versions"] for told in map(self._told, self.parts.values())]

    def _told(self, part: str) -> Any:
        return self.bundle.manifest.coverage[part]

    def difference(self, text: str) -> str:
        """The closest graph of the bundle and the first lines in which `text`, a graph's canonical text, differs from it."""
        if not self.parts:
            return "the bundle has no graph of a server; it was compiled from a model: flagtree compile --graphs FILE builds one that has"
        wanted = text.splitlines()
        best: tuple[float, str, list[str]] | None = None
        for part in self.parts.values():
            known = self.bundle.read(f"graphs/{part}.txt").decode().splitlines()
            score = _similarity(wanted, known)
            if best is None or score > best[0]:
                best = score, part, known
        assert best is not None
        return f"closest is {best[1]}, {best[0]:.0%} of its lines equal; {_first_differences(best[2], wanted)}"


def _similarity(a: list[str], b: list[str]) -> float:
    """Share of equal lines, order left aside: near linear, and graphs have thousands of lines."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False).quick_ratio()


def _first_differences(known: list[str], wanted: list[str]) -> str:
    found = []
    for number, (a, b) in enumerate(zip(known, wanted), 1):
        if a != b:
            found.append(f"line {number}: the bundle has {_shown(a)}, the server {_shown(b)}")
        if len(found) == SHOWN:
            break
    if not found:
        return f"one ends after {min(len(known), len(wanted))} lines, the other has {max(len(known), len(wanted))}"
    more = sum(a != b for a, b in zip(known, wanted)) - len(found) + abs(len(known) - len(wanted))
    return "; ".join(found) + (f"; and {more} more lines" if more else "")


def _shown(line: str) -> str:
    return line.replace("\x1f", " ")[:160]


_opened: dict[str, OpenedBundle] = {}


def open_for_serving(path: Path, digest: str | None) -> OpenedBundle:
    """The bundle at `path`, which has to be `digest` when one is named; else this machine's store must vouch for it.

    BundleError: no bundle, damaged, for another CPU, made with another release of torch, changed.  UntrustedBundle.  DeviceError: its
    device is not here.  On a GPU every binary is loaded, with its attributes, when a graph is bound: no later call loads anything.
    """
    bundle = open_bundle(path)
    check_trust(bundle.digest, digest, where=str(path))
    if bundle.digest in _opened:
        return _opened[bundle.digest]
    made_with = bundle.manifest.versions.get("torch", "")
    if _release(made_with) != _release(torch.__version__):
        raise BundleError(
            "the bundle was made with another release of torch",
            where=str(path),
            why=f"torch {made_with}, here is {torch.__version__}",
            hint="record and compile its graphs again with this release",
        )
    bundle.verify()
    library = kernel_library(bundle)[1] if bundle.manifest.kernels else None
    _opened[bundle.digest] = OpenedBundle(path, bundle, library)
    return _opened[bundle.digest]


def _release(version: str) -> tuple[str, ...]:
    """`2.13` of `2.13.0+cpu`: operators and their schemas belong to it."""
    return tuple(version.split("+")[0].split(".")[:2])
