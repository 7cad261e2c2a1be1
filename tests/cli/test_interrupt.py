"""Ctrl-C and termination: one line, the right code, and no child left, whatever the command was waiting for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagtree.cli.interrupt import descendants

PROGRAM = """
import subprocess, sys, time
from concurrent.futures import {pool}
from flagtree.cli import interrupt

def work(seconds):
    subprocess.run(["sleep", str(seconds)])

def main():
    interrupt.install()
    try:
        with {pool}(2) as pool:
            done = [pool.submit(work, 60) for _ in range(6)]
            time.sleep(0.5)
            print("ready", flush=True)
            [d.result() for d in done]
    except interrupt.Interrupted as stop:
        interrupt.leave(stop.code)

if __name__ == "__main__":
    main()
"""


def gone(pids: list[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"  # a zombie waits only to be counted by its parent

    return not any(map(alive, pids))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("pool", ["ProcessPoolExecutor", "ThreadPoolExecutor"])
def test_a_signal_ends_pool_and_children(number: signal.Signals, code: int, pool: str, tmp_path: Path, repository: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(PROGRAM.replace("{pool}", pool))
    running = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(repository)}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    children = descendants(running.pid)
    assert len(children) >= 2
    started = time.monotonic()
    running.send_signal(number)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == code, errors
    assert time.monotonic() - started < 10
    assert errors.splitlines() == ["interrupted: what was finished is kept, run the same command to go on"]
    deadline = time.monotonic() + 5
    while not gone(children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(children)


SWALLOWED = """
import os, signal, sys
from flagtree.cli import app, interrupt

class Swallows:  # an import that takes the signal for a missing module and fails later
    def __call__(self):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            pass
        {then}

app.app = Swallows()
app.main()
"""


@pytest.mark.parametrize("then", ["raise ImportError('cannot load module more than once per process')", "sys.exit(0)",
                                  "from flagtree.errors import ToolchainError; raise ToolchainError('the worker is gone')"])
def test_a_signal_that_a_library_swallows_still_ends_as_one(then: str, repository: Path) -> None:
    run = subprocess.run([sys.executable, "-c", SWALLOWED.replace("{then}", then)], env={**os.environ, "PYTHONPATH": str(repository)},
                         capture_output=True, text=True, timeout=60)
    assert run.returncode == 130, run.stderr
    assert run.stderr == "interrupted: what was finished is kept, run the same command to go on\n"
