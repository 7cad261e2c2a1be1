"""Ctrl-C and termination: the children are stopped first, then the command ends with one line and 128 + the signal's number.

A worker pool waits for its workers when it is left, so they must be gone before the exception travels up; if something still
holds the process after a grace of seconds it is left at once.  Nothing is lost: the store publishes atomically.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

GRACE = 3.0  # seconds for pools and temporary folders to be cleaned up
_received: list[int] = []  # numbers of the signals that came


class Interrupted(BaseException):
    """Raised in the main thread by a signal; no `except Exception` takes it for a failure.  `code` is the exit code."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(signal.Signals(number).name)


def install() -> None:
    """Take over SIGINT and SIGTERM of this process.  Call from the main thread."""
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker, which inherited this handler
            os._exit(128 + number)
        for later in (signal.SIGINT, signal.SIGTERM):
            signal.signal(later, signal.SIG_IGN)
        _received.append(number)
        sys.addaudithook(_no_more_children)
        _send(signal.SIGTERM)
        watch = threading.Timer(GRACE, leave, (128 + number,))
        watch.daemon = True
        watch.start()
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


@contextmanager
def noticed() -> Iterator[None]:
    """Whatever error leaves the block after a signal becomes `Interrupted`: an import or a worker that was told to stop fails in its own
    way, and torch takes even our exception in `import numpy` for a numpy that is not there."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if _received:
            raise Interrupted(_received[0]) from error
        raise


def _no_more_children(event: str, args: tuple[object, ...]) -> None:
    # else the threads of a pool go on with the work that is queued, each with a new compiler
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        raise OSError("interrupted")


def leave(code: int) -> NoReturn:
    """Say one line and end the process with `code`, waiting for nobody."""
    _send(signal.SIGKILL)
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{show_cursor}interrupted: what was finished is kept, run the same command to go on\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def descendants(root: int) -> list[int]:
    """Process ids below `root`, children before their children.  Empty where the system has no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        children.setdefault(int(after_name[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _send(number: signal.Signals) -> None:
    for pid in descendants(os.getpid()):
        try:
            os.kill(pid, number)
        except OSError:  # ended meanwhile
            continue
