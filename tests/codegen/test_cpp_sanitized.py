"""Generated C++ under AddressSanitizer: the tests of kernels that keep rows, walk pieces and end in part of a vector, run again.

The compiler that they find in PATH instruments what it compiles; the sanitizer's library is loaded before Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

AGAIN = (
    ("tests/runtime/test_torch_compile_models.py", "joined and (24 or 33)"),
    ("tests/codegen/test_cpp_reduce.py", "softmax"),
    ("tests/codegen/test_cpp_groups.py", "3-47 or dear_before"),
)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python whose C++ compiler and address space are instrumented."""
    compiler = shutil.which("g++")
    libraries = [
        subprocess.run([compiler or "false", f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second: its exceptions pass through the first
    ]
    if not all(Path(found).is_absolute() for found in libraries):
        pytest.skip("no g++ with AddressSanitizer")
    folder = tmp_path_factory.mktemp("programs")
    for name in ("c++", "g++"):
        (folder / name).write_text(f'#!/bin/sh\nexec {compiler} "$@" -fsanitize=address\n')
        (folder / name).chmod(0o755)
    options = "detect_leaks=0:verify_asan_link_order=0"
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": options}


@pytest.mark.parametrize(("file", "chosen"), AGAIN, ids=[Path(file).stem for file, _ in AGAIN])
def test_nothing_outside_of_its_memory_is_touched(sanitized: dict[str, str], repository: Path, file: str, chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not full", file, "-k", chosen]
    done = subprocess.run(command, cwd=repository, env=sanitized, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


def test_the_sanitizer_sees_what_a_kernel_does(sanitized: dict[str, str], tmp_path: Path) -> None:
    """One element too many ends the process: the runs above could have failed."""
    source, library = tmp_path / "over.cpp", tmp_path / "over.so"
    source.write_text('extern "C" int over(volatile int n) { volatile int row[8] = {}; row[n] = 1; return row[0]; }')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], env=sanitized, check=True)
    call = f"import ctypes; ctypes.CDLL({str(library)!r}).over(9)"
    done = subprocess.run([sys.executable, "-c", call], env=sanitized, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "AddressSanitizer: stack-buffer-overflow" in done.stderr
