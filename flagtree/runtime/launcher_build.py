"""Builds launcher.c in place: run when the package is installed, and by hand with `python -m flagtree.runtime.launcher_build`.

Stands alone (no import of ours or of anything outside the standard library), since the build of the wheel runs it before its
dependencies are there.  Without a C compiler nothing is built, and launches go through ctypes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("launcher.c")
LIBRARY = "libflagtree_launcher.so"  # "launcher.so" would be imported instead of launcher.py
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-std=c99", "-shared", "-fPIC", "-Wall", "-Wextra")
SECONDS = 120


def build(target: Path) -> str:
    """Compile launcher.c to `target`.  "" when it is there afterwards, else why not."""
    if not sys.platform.startswith("linux") or sys.byteorder != "little":
        return f"the launcher is built on little-endian Linux, not on {sys.platform}"
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        return f"no C compiler: looked in PATH for {', '.join(COMPILERS)}"
    new = target.with_suffix(".new")
    try:
        command = [compiler, *FLAGS, "-o", str(new), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            return f"{compiler} failed: {done.stderr.strip()[:500]}"
        new.replace(target)  # a process that has the old one mapped keeps it
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler}: {error}"
    finally:
        new.unlink(missing_ok=True)
    return ""


if __name__ == "__main__":
    library = SOURCE.with_name(LIBRARY)
    problem = build(library)
    sys.stderr.write(f"the launcher was not built: {problem}\n" if problem else f"built {library}\n")
    raise SystemExit(2 if problem else 0)
