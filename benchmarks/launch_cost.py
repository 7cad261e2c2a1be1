"""What a launch costs the host before the driver: the launcher over a driver that returns at once, in CPU time of one thread.

    python benchmarks/launch_cost.py

Needs no GPU: a shared library with CUDA's names stands in for the driver, so what is left is Python, ctypes and launcher.c.  The driver's
own time, and the device's, are in benchmarks/gpu.py.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

POINTERS, SYMBOLS, RUN = 4, 3, 10
SILENT = """
#include <stdint.h>
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream,
                   void **arguments, void **extra) { return 0; }
"""


def record() -> Any:
    """A launch record as toolchains write it: four pointers, three symbols, a grid of one division, two variants."""
    from flagtree.runtime.launcher import read_record

    signature = [[f"b{i}", "*bf16"] for i in range(POINTERS)] + [[f"n{i}", "i32"] for i in range(SYMBOLS)]
    variants = {
        name: {"file": name, "requires": [n for n, _ in signature[:POINTERS]] if name == "aligned" else [], "shared": 0, "null_pointers": 2}
        for name in ("aligned", "generic")
    }
    grid = [["//", ["+", "n0", 3], 4], 1, 1]
    launch = {"function": "ft_0", "signature": signature, "grid": grid, "threads": 128, "variants": variants}
    return read_record(launch, lambda *_: 1)


def measured(folder: Path) -> dict[str, measure.Timing]:
    from flagtree.runtime import launcher, launcher_build

    source, library = folder / "silent.c", folder / "silent.so"
    source.write_text(SILENT, encoding="utf-8")
    compiler = next(path for path in map(shutil.which, launcher_build.COMPILERS) if path)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    launch = ctypes.CDLL(str(library)).cuLaunchKernel
    launch.argtypes = (ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
    problem = launcher_build.build(folder / "launcher.so")
    assert not problem, problem
    kernel, words, numbers = record(), array("Q", [0x1000] * POINTERS), array("q", [64] * SYMBOLS)
    call = (kernel, words.buffer_info()[0], numbers.buffer_info()[0])
    routes: dict[str, Any] = {
        "C": launcher.Compiled(folder / "launcher.so", ctypes.cast(launch, ctypes.c_void_p).value or 0),
        "ctypes": launcher.Interpreted(launch),
    }

    def refuse(found: Any, code: int) -> Exception:
        return AssertionError(code)

    contenders: dict[str, Callable[[], object]] = {}
    for name, route in routes.items():
        contenders[f"{name}, alone"] = route.run([call], 0, refuse)
        contenders[f"{name}, in a run of {RUN}"] = route.run([call] * RUN, 0, refuse)
    return measure.rotated(contenders, repeats=9)


if __name__ == "__main__":
    sys.path.insert(0, str(measure.ROOT))
    with tempfile.TemporaryDirectory() as name:
        timings = measured(Path(name))
    each = {name: t.median / (RUN if "run" in name else 1) for name, t in timings.items()}
    print(measure.conditions())
    print(measure.rows(("route", "us a launch"), ((name, f"{1e6 * seconds:.2f}") for name, seconds in each.items())))
