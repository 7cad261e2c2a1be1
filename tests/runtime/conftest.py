"""Programs as IR text with kernels as C written by hand, compiled with the machine's C compiler: an executor's test bench."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from flagtree.codegen.launch import launch_list
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Kernel, Program, Repeat

PRELUDE = "#include <stdint.h>\n"


def kernels_of(program: Program) -> list[Kernel]:
    out, work = [], list(program.steps)
    while work:
        step = work.pop(0)
        if isinstance(step, Repeat):
            work[:0] = step.body
        elif isinstance(step, Kernel):
            out.append(step)
    return out


def compile_c(source: str, folder: Path) -> bytes:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "k.c").write_text(PRELUDE + source, encoding="utf-8")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-fopenmp", "-o", str(folder / "k.so"), str(folder / "k.c")], check=True)
    return (folder / "k.so").read_bytes()


Build = Callable[..., tuple[dict, bytes]]


@pytest.fixture
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """(text, bodies) -> (launch list, shared object).  `bodies`: kernel name to C over `void *const *b, const int64_t *n`."""

    def make(text: str, bodies: Mapping[str, str]) -> tuple[dict, bytes]:
        program = parse_program(re.sub(r"(kernel \w+ .*})$", r"\1 numerics(eager, contract=off, acc=f32)", text, flags=re.MULTILINE))
        calls = {}
        for kernel in kernels_of(program):
            isolated = isolate(program, kernel)
            calls[kernel.name] = (isolated, digest(isolated.program))
        source = {d: f"void ft_{d[:16]}(void *const *b, const int64_t *n) {{ {bodies[name]} }}" for name, (_, d) in calls.items()}
        return launch_list(program, calls), compile_c("\n".join(source.values()), tmp_path_factory.mktemp("c"))

    return make
