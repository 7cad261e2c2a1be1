"""The emulator's process: started at first use, kept for all kernels, replaced after it died.

The invariant: one request, one answer; a process that does not answer in time, or whose answer nobody waited for, is ended.
`emulator` asks `current()` for it; emulator_worker.py is what runs in it.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import json
import os
import platform
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flagtree.errors import KernelFault, ToolchainError

WAIT = 20  # times a run's CPU seconds, after which it is over whoever else had the processor
COMPILE = 60.0  # seconds for one call of the C compiler, which makes the runtime and links kernels
_HINT = "it needs a C compiler that works: set FLAGTREE_CXX to one"


class Session:
    """The emulator's process; one serves all kernels of this process.  Start-up costs about half a CPU second."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="flagtree-emulator-")
        self.folder = Path(self._folder.name)
        self.owner = os.getpid()
        self.loaded: set[str] = set()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._errors = (self.folder / "stderr").open("w+b")
        here = Path(__file__)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(here.with_name("emulator_worker.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        runtime = str(here.with_name("emulator_runtime.c"))
        try:
            self.request({"runtime": runtime, "compiler": _compiler(), "folder": str(self.folder), "seconds": COMPILE}, 30 + COMPILE)
        except ToolchainError:
            self.close()
            raise

    def new_file(self) -> Path:
        """A path that no other run of this session uses."""
        return self.folder / f"memory-{next(self._numbers)}"

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def request(self, message: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """One request, one answer.  Raises KernelFault when a kernel ends the process or does not end in time, ToolchainError when the
        process fails, dies or does not answer.  `seconds` are a run's own CPU seconds: a busy machine makes no kernel wrong."""
        running = message.get("do") == "run"
        with self._lock:
            try:
                line = self._exchange(json.dumps(message).encode() + b"\n", seconds, WAIT if running else 1)
            except BaseException:  # an interrupt leaves an answer behind, which the next request must not read
                self.close()
                raise
        if line is None:
            self.close()
            if running:
                hint = "run fewer blocks or smaller shapes"
                raise KernelFault("an emulated kernel does not end", why=f"no answer within {seconds:g} CPU s", hint=hint)
            raise ToolchainError("the emulator does not get ready", why=f"no answer within {seconds:g} s", hint=_HINT)
        if not line:
            code = self._process.wait()
            kind = KernelFault if running else ToolchainError
            raise kind("the emulator's process died", why=f"exit status {code}: {self._stderr()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ToolchainError("the emulator failed", why=answer["error"], hint=_HINT)
        return answer

    def _exchange(self, line: bytes, seconds: float, wait: int) -> bytes | None:
        """The answer's line; empty when the process ended, None when it says nothing in `seconds` of its own, or `wait` times as long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        used, end = self._seconds() + seconds, time.monotonic() + seconds * wait
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            with selectors.DefaultSelector() as answer:  # `select` itself refuses descriptors above 1023
                answer.register(self._process.stdout, selectors.EVENT_READ)
                while (left := min(used - self._seconds(), end - time.monotonic())) > 0:
                    if answer.select(max(left, 0.05)):
                        return self._process.stdout.readline()
                return None
        except BrokenPipeError:
            return b""

    def _seconds(self) -> float:
        """CPU seconds that the process has taken; 0 after it died."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace").strip()[-1000:]

    def close(self) -> None:
        """End the process and remove its files."""
        if self.owner != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream:
                stream.close()
        self._folder.cleanup()


_session: Session | None = None


def current() -> Session:
    """The session of this process, started at first use and again after it died."""
    global _session
    if _session is None or not _session.alive:
        if _session is not None:
            _session.close()
        _session = Session()
        atexit.register(_session.close)
    return _session


def _compiler() -> list[str]:
    from flagtree.toolchain.cxx import find_compiler

    return [find_compiler().path]


def missing() -> str:
    """Why the emulator cannot run here; empty when it can (x86-64 Linux, Triton, a C compiler)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the emulator runs on x86-64 Linux, not on {sys.platform} {platform.machine()}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        _compiler()
    except ToolchainError as error:
        return error.what
    return ""
