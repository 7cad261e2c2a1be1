"""The C++ compiler: finding it, one object file a kernel and level, shared objects of many kernels.

Bytes out depend on source, level, flags and compiler version only: the compiler runs in a folder of its own on relative names.
`build` is what `flagtree compile` calls for a CPU target; the runtime never imports this module on a hit.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from flagtree.codegen.cpp import generate, symbol_name
from flagtree.errors import ToolchainError
from flagtree.ir.program import Program
from flagtree.progress import SILENT, Progress
from flagtree.settings import settings
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel

NATIVE_NAMES = ("c++", "g++", "clang++")
CROSS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}  # Debian's and Ubuntu's names
CALL = Path(__file__).with_name("call.cpp")  # a whole call of a launch list, in every library
TIMEOUT = 120.0  # seconds for one compiler call; a kernel takes well under one
BASE_LEVEL = {"x86_64": "x86-64-v2"}  # of libraries for no level
ARCH_FLAGS = {"aarch64": "-march=armv8-a"}
# the compiler fuses no multiply and add and relaxes no arithmetic, so that every level gives the same bits; integers wrap as the IR's do
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fvisibility=hidden",
    "-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables", "-fno-ident", "-g0", "-w", "-fdiagnostics-color=never",
)  # fmt: skip
GCC_FLAGS = ("-frandom-seed=flagtree", "-fno-stack-protector")
LINK_FLAGS = ("-shared", "-Wl,--as-needed", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,--strip-all", "-l:libgomp.so.1", "-lm")


@dataclass(frozen=True, slots=True)
class Compiler:
    """`path`: the executable.  `version`: its first line of --version, a key factor.  `machine`: what it compiles for."""

    path: str
    version: str
    machine: str

    @property
    def is_gcc(self) -> bool:
        return "clang" not in self.version.lower()


def machine_of(level: str) -> str:
    """The architecture that executes a level ("x86-64-v3" -> "x86_64")."""
    return "x86_64" if level.startswith("x86-64") else level


def find_compiler(machine: str | None = None) -> Compiler:
    """The C++ compiler for this machine's architecture, or a cross compiler for `machine`.

    The setting `cxx` (FLAGTREE_CXX) wins where it compiles for `machine`.  Raises ToolchainError that names all it looked for.
    """
    return _find(machine or platform.machine(), settings.cxx)


@functools.lru_cache(maxsize=16)
def _find(machine: str, chosen: str | None) -> Compiler:
    native = machine == platform.machine()
    if chosen is not None:
        path = shutil.which(chosen)
        if path is None:
            raise ToolchainError("the C++ compiler named by FLAGTREE_CXX is not there", where=chosen,
                                 why="it is no executable file and not in PATH",
                                 hint="name a compiler that exists, or unset FLAGTREE_CXX")  # fmt: skip
        compiler = _describe(path)
        if compiler.machine == machine:
            return compiler
        if native:
            raise ToolchainError("the C++ compiler named by FLAGTREE_CXX compiles for another machine", where=chosen,
                                 why=f"it makes code for {compiler.machine}, this machine is {machine}",
                                 hint="unset FLAGTREE_CXX")  # fmt: skip
    names = (*NATIVE_NAMES, CROSS.get(machine, "")) if native else (CROSS.get(machine, ""),)
    looked = [n for n in names if n]
    for name in looked:
        path = shutil.which(name)
        if path is not None and (compiler := _describe(path)).machine == machine:
            return compiler
    raise ToolchainError(
        f"there is no C++ compiler for {machine}",
        why=f"looked in PATH for {', '.join(looked) or 'nothing: the architecture is unknown'}; FLAGTREE_CXX is {chosen or 'not set'}",
        hint=f"apt-get install {package(machine)}, or set FLAGTREE_CXX to a compiler",
    )


def package(machine: str) -> str:
    """Debian's package with a compiler for `machine`."""
    return "g++" if machine == platform.machine() else f"g++-{machine.replace('_', '-')}-linux-gnu"


def _describe(path: str) -> Compiler:
    version = _call([path, "--version"], None).split("\n")[0].strip()
    machine = _call([path, "-dumpmachine"], None).strip().split("-")[0]
    # the first word is the name it was called by, which says nothing
    return Compiler(path, re.sub(r"^\S*(c\+\+|g\+\+)\S*\s*", "g++ " if "clang" not in version else "clang ", version), machine)


def _call(command: Sequence[str], folder: str | None) -> str:
    """Run a compiler; its standard output.  ToolchainError with the first error line when it fails, hangs or cannot start."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired as error:
        hint = "set FLAGTREE_CXX to another compiler"
        raise ToolchainError(f"the C++ compiler {name} did not finish", why=f"it ran for {TIMEOUT:.0f} s", hint=hint) from error
    except OSError as error:
        why, hint = error.strerror or str(error), "set FLAGTREE_CXX to another compiler"
        raise ToolchainError(f"the C++ compiler {name} cannot be started", where=command[0], why=why, hint=hint) from error
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().split("\n")
        first = next((x for x in lines if "error" in x.lower()), lines[0])
        raise ToolchainError(f"the C++ compiler {name} failed", why=first or f"exit status {done.returncode}",
                             hint="FLAGTREE_DEBUG=4 keeps the source as debug/failed/kernel.cpp in the cache folder")  # fmt: skip
    return done.stdout.decode("utf-8", "replace")


# -- one kernel ------------------------------------------------------------------------------------------------------
def compile_object(source: str, level: str, compiler: Compiler | None = None) -> bytes:
    """The object file of one source at one level ("x86-64-v2" … or "aarch64").  Raises ToolchainError."""
    compiler = compiler or find_compiler(machine_of(level))
    with tempfile.TemporaryDirectory(prefix="flagtree-") as folder:
        (Path(folder) / "kernel.cpp").write_text(source, encoding="utf-8")
        try:
            _call([compiler.path, *flags(level, compiler), "-c", "kernel.cpp", "-o", "kernel.o"], folder)
        except ToolchainError:
            if settings.debug >= 4:
                kept = settings.cache_dir / "debug" / "failed" / "kernel.cpp"
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(source, encoding="utf-8")
            raise
        return _output(Path(folder) / "kernel.o", compiler)


def flags(level: str, compiler: Compiler) -> tuple[str, ...]:
    """The compiler's flags for a level: a key factor."""
    return (*FLAGS, *(GCC_FLAGS if compiler.is_gcc else ()), ARCH_FLAGS.get(level, f"-march={level}"))


def _output(path: Path, compiler: Compiler) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ToolchainError(f"the C++ compiler {Path(compiler.path).name} wrote nothing", why=f"no {path.name}") from error


def link(objects: Iterable[tuple[str, bytes]], level: str | None = None, compiler: Compiler | None = None) -> bytes:
    """A shared object of many kernels' objects, (digest, bytes) each; equal bytes whatever their order.

    It needs libgomp.so.1 (in a process with torch, the one that torch brought) and the C library, nothing of C++.
    """
    machine = machine_of(level) if level is not None else platform.machine()
    compiler = compiler or find_compiler(machine)
    call = _call_object(compiler, level or BASE_LEVEL.get(machine, machine))
    with tempfile.TemporaryDirectory(prefix="flagtree-") as folder:
        files = {"call.o": call, **{f"{digest[:16]}.o": data for digest, data in sorted(dict(objects).items())}}
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        # names in a file: a graph may have more kernels than a command line has room
        (Path(folder) / "objects").write_text("\n".join(files), encoding="ascii")
        _call([compiler.path, "@objects", "-o", "kernels.so", *LINK_FLAGS], folder)
        return _output(Path(folder) / "kernels.so", compiler)


@functools.lru_cache(maxsize=16)
def _call_object(compiler: Compiler, level: str) -> bytes:
    return compile_object(CALL.read_text(encoding="utf-8"), level, compiler)


# -- many kernels ----------------------------------------------------------------------------------------------------
def build(kernels: Sequence[tuple[str, Program]], target: Target, jobs: int = 1, progress: Progress = SILENT) -> list[BuiltKernel]:
    """Source and one object a level for each (digest, isolated program), in order, `jobs` compilers at a time.

    A level whose compiler is not here is listed in `missing`.  Raises CodegenError or ToolchainError for the first kernel
    that cannot be built, ToolchainError when no level can.
    """
    compilers, missing = _compilers(target.levels)
    sources = [generate(program, digest) for digest, program in kernels]
    objects: dict[tuple[int, str], bytes] = {}
    left = dict.fromkeys(range(len(kernels)), len(compilers))
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        running: dict[Future[bytes], tuple[int, str]] = {
            pool.submit(compile_object, source, level, compiler): (k, level)
            for k, source in enumerate(sources) for level, compiler in compilers.items()
        }  # fmt: skip
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    k, level = running.pop(future)
                    objects[k, level] = future.result()
                    left[k] -= 1
                    progress.advance(not left[k])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [_built(digest, sources[k], {v: objects[k, v] for v in compilers}, missing) for k, (digest, _) in enumerate(kernels)]


def _compilers(levels: Sequence[str]) -> tuple[dict[str, Compiler], str]:
    found: dict[str, Compiler] = {}
    missing: list[str] = []
    error: ToolchainError | None = None
    for level in levels:
        try:
            found[level] = find_compiler(machine_of(level))
        except ToolchainError as e:
            error = e if error is None or machine_of(level) == platform.machine() else error
            missing.append(f"{level}: no compiler for {machine_of(level)} (apt-get install {package(machine_of(level))})")
    if not found and error is not None:
        raise error
    return found, "; ".join(missing)


def _built(digest: str, source: str, objects: dict[str, bytes], missing: str) -> BuiltKernel:
    files = {"kernel.cpp": source.encode(), **{f"{level}.o": data for level, data in objects.items()}}
    sizes = {level: len(data) for level, data in objects.items()}
    return BuiltKernel(digest, "binary", missing, files, {"symbol": symbol_name(digest)}, {"object_bytes": sizes})


def versions(target: Target) -> dict[str, str]:
    """Every tool whose change changes bytes, as key factors: the compiler of each machine that is here."""
    compilers, _ = _compilers(target.levels)
    return {machine_of(level): compiler.version for level, compiler in compilers.items()} | {"flags": " ".join(LINK_FLAGS)}
