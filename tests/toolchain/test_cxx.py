"""The C++ toolchain: finding a compiler, equal bytes, one OpenMP runtime, clear errors."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagtree.errors import ToolchainError
from flagtree.ir.canonical import digest
from flagtree.ir.program import Program
from flagtree.ir.text import parse_program
from flagtree.settings import settings
from flagtree.targets.cpu import TARGETS, probe
from flagtree.toolchain import cxx

CPU = TARGETS[0]


def kernel(factor: float, name: str = "f32") -> tuple[str, Program]:
    program = parse_program(f"""program isolated
  symbol n0 in 0..1000000 from argument
  buffer b0: {name}[n0] input
  buffer b1: {name}[n0] temp
  kernel kernel {{i0 < n0}} numerics(eager, contract=off, acc=f32)
    v0: {name} = load b0[i0]
    v1: {name} = mul v0, {factor}
    store b1[i0] = v1
  outputs b1
""")
    return digest(program), program


def needed(shared: bytes, tmp_path: Path) -> list[str]:
    (tmp_path / "k.so").write_bytes(shared)
    text = subprocess.run(["readelf", "-d", str(tmp_path / "k.so")], capture_output=True, text=True, check=True).stdout
    return [line.split("[")[1].rstrip("]") for line in text.split("\n") if "NEEDED" in line]


class Counted:
    def __init__(self) -> None:
        self.count = 0

    def phase(self, name: str, total: int | None = None) -> None:
        raise AssertionError("a toolchain does not start phases")

    def advance(self, count: int = 1) -> None:
        self.count += count


def test_build_gives_every_level_in_order_whatever_the_jobs() -> None:
    kernels = [kernel(f) for f in (2.0, 3.0, 4.0)]
    progress = Counted()
    one, three = cxx.build(kernels, CPU, 1, progress), cxx.build(kernels, CPU, 3)
    assert [b.digest for b in one] == [d for d, _ in kernels]
    assert one == three
    assert progress.count == 3
    for b in one:
        assert b.tier == "binary"
        assert {"kernel.cpp", "x86-64-v2.o", "x86-64-v3.o", "x86-64-v4.o"} <= set(b.files) or "aarch64.o" in b.files
        assert b.launch == {"symbol": f"ft_{b.digest[:16]}"}
        for level in CPU.levels:
            assert f"{level}.o" in b.files or level in b.missing


def test_a_level_without_a_compiler_is_missing_with_the_package_to_install() -> None:
    if "aarch64.o" in cxx.build([kernel(2.0)], CPU)[0].files:
        pytest.skip("this machine has a compiler for every level")
    assert cxx.build([kernel(2.0)], CPU)[0].missing == "aarch64: no compiler for aarch64 (apt-get install g++-aarch64-linux-gnu)"
    reach = probe()
    assert (reach.tier, reach.executes) == ("binary", "native")
    assert "g++-aarch64-linux-gnu" in reach.how


def test_bytes_do_not_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    built = cxx.build([kernel(2.0)], CPU)[0]
    odd = tmp_path / "with blank and ünïcode"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    again = cxx.build([kernel(2.0)], CPU)[0]
    assert built == again
    level = next(n[:-2] for n in built.files if n.endswith(".o"))
    objects = [(d, b.files[f"{level}.o"]) for (d, _), b in ((k, cxx.build([k], CPU)[0]) for k in (kernel(5.0), kernel(6.0)))]
    assert cxx.link(objects, level) == cxx.link(objects[::-1], level)
    assert str(tmp_path).encode() not in cxx.link(objects, level)
    assert not list(odd.iterdir())  # nothing left behind


def test_the_library_needs_only_libgomp_and_the_c_library(tmp_path: Path) -> None:
    key, program = kernel(2.0)
    built = cxx.build([(key, program)], CPU)[0]
    level = next(n[:-2] for n in built.files if n.endswith(".o"))
    names = needed(cxx.link([(key, built.files[f"{level}.o"])], level), tmp_path)
    assert "libgomp.so.1" in names
    assert set(names) <= {"libgomp.so.1", "libc.so.6", "libm.so.6"}


ONE_RUNTIME = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
x = torch.ones(1000000); y = torch.zeros(1000000)
torch.set_num_threads(2)
library[sys.argv[2]]((ctypes.c_void_p * 2)(x.data_ptr(), y.data_ptr()), (ctypes.c_int64 * 1)(1000000))
assert bool((y == 2).all())
maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
print(len(maps), *maps)
"""


def test_one_openmp_runtime_in_the_process(tmp_path: Path) -> None:
    key, program = kernel(2.0)
    built = cxx.build([(key, program)], CPU)[0]
    from flagtree.runtime.cpu import levels

    path = tmp_path / "k.so"
    path.write_bytes(cxx.link([(key, built.files[f"{levels()[0]}.o"])], levels()[0]))
    done = subprocess.run([sys.executable, "-c", ONE_RUNTIME, str(path), f"ft_{key[:16]}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 "), done.stdout
    assert "torch" in done.stdout


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_no_compiler_names_what_was_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cxx._find.cache_clear()
    monkeypatch.delenv("FLAGTREE_CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError) as caught:
        cxx.build([kernel(2.0)], CPU)
    cxx._find.cache_clear()
    for word in ("c++", "g++", "clang++", "FLAGTREE_CXX", "apt-get install g++"):
        assert word in str(caught.value)


def test_a_chosen_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGTREE_CXX", "/nowhere/g++ of ours")
    with pytest.raises(ToolchainError, match="/nowhere/g\\+\\+ of ours"):
        cxx.find_compiler()


def test_a_compiler_that_fails_shows_its_first_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = cxx.find_compiler()
    with pytest.raises(ToolchainError, match=r"kernel.cpp:1:\d+: error"):
        cxx.compile_object("this is no C++;", "x86-64-v2" if real.machine == "x86_64" else "aarch64", real)
    answers = f'--version) echo "g++ 99";; -dumpmachine) echo {real.machine}-linux-gnu;; *) exit 0;;'
    broken = script(tmp_path / "broken c++", f'case "$1" in {answers} esac\n')
    monkeypatch.setenv("FLAGTREE_CXX", broken)
    assert settings.cxx == broken
    with pytest.raises(ToolchainError, match="wrote nothing"):
        cxx.build([kernel(2.0)], CPU)


def test_a_compiler_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hangs = script(tmp_path / "hangs", "exec sleep 30\n")
    monkeypatch.setenv("FLAGTREE_CXX", hangs)
    monkeypatch.setattr(cxx, "TIMEOUT", 0.3)
    start = time.monotonic()
    with pytest.raises(ToolchainError, match="did not finish"):
        cxx.find_compiler()
    assert time.monotonic() - start < 10


def test_cpu_seconds_for_fifteen_kernels() -> None:
    before = os.times()
    cxx.build([kernel(float(f)) for f in range(2, 17)], CPU, 2)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 20


def test_the_source_of_a_failed_compile_is_kept_when_asked(tmp_path: Path) -> None:
    with settings.override(debug=4, cache_dir=tmp_path), pytest.raises(ToolchainError, match="debug/failed/kernel.cpp"):
        cxx.compile_object("this is no C++", "x86-64-v3")
    assert (tmp_path / "debug" / "failed" / "kernel.cpp").read_text() == "this is no C++"
