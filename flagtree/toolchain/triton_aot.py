"""Stock Triton ahead of time: generated sources to PTX and cubin, or AMDGCN and hsaco, with no device and no driver.

Invariant: bytes depend on kernel, target and the releases of Triton and ptxas alone; a compiler that dies or hangs is an error of
its kernel.  Place in the flow: after codegen.triton; gives BuiltKernel to the bundle.  toolchain.maca uses `Workers` too.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagtree.codegen.triton import TritonSource, generate
from flagtree.errors import ToolchainError
from flagtree.ir.program import Program
from flagtree.progress import SILENT, Progress
from flagtree.targets import stock_triton
from flagtree.targets.base import Target
from flagtree.toolchain.base import BuiltKernel

SECONDS = 300.0  # a kernel of ours takes about one; a compiler that needs this long hangs
STAGES = {"cuda": ("ttir", "ptx", "cubin"), "hip": ("ttir", "amdgcn", "hsaco")}
BINARY = {"cuda": "cubin", "hip": "hsaco"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One source through Triton: `files` by name (`aligned.ptx`, …), `variants` the compiler's facts by variant."""

    files: Mapping[str, bytes]
    variants: Mapping[str, Mapping[str, Any]]


def check_triton() -> str:
    """The release in use; ToolchainError when Triton is missing or untested."""
    why = stock_triton.problem()
    if why:
        raise ToolchainError("GPU kernels need Triton to compile", why=why, hint=stock_triton.INSTALL)
    return stock_triton.installed() or ""


class Workers:
    """Worker processes, started when first needed, one request at a time each; a dead or hanging one is replaced.

    `gpu`: backend, architecture and warp size of Triton's GPUTarget; `prepare`: "module:function" that a worker calls first.
    Use `workers()`, which also removes the folder.
    """

    def __init__(self, folder: Path, jobs: int, seconds: float = SECONDS, python: str = sys.executable) -> None:
        self.folder, self.seconds, self.python = folder, seconds, python
        self.threads = ThreadPoolExecutor(max(1, jobs), thread_name_prefix="triton")
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self.started: list[_Worker] = []
        self.lock, self.closed = threading.Lock(), False

    def submit(self, source: TritonSource, gpu: tuple[str, object, int], options: Mapping[str, object], stages: Sequence[str],
               prepare: str | None = None) -> Future[Compiled]:  # fmt: skip
        """Compile one source; the future raises ToolchainError with the compiler's own message."""
        request: dict[str, object] = {
            "function": source.function, "signature": source.signature, "constexprs": source.constexprs, "aligned": source.aligned,
            "gpu": gpu, "stages": list(stages), "prepare": prepare,
            "options": {"num_warps": source.warps, "num_stages": source.stages, "enable_fp_fusion": source.fp_contract, **options},
        }  # fmt: skip
        return self.threads.submit(self._run, source, request)

    def _run(self, source: TritonSource, request: dict[str, object]) -> Compiled:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="kernel-") as name:
            folder = Path(name)
            path = folder / f"{source.function}.py"
            path.write_text(source.text, encoding="utf-8")
            worker = self._take()
            answer = worker.ask({**request, "folder": str(folder), "source": str(path)}, self.seconds)
            if worker.process.poll() is None and "died" not in answer:
                self.idle.put(worker)
            why = answer.get("died") or answer.get("error")
            if why:
                raise ToolchainError("Triton does not compile this kernel", where=f"{source.function} for {request['gpu']}", why=str(why))
            files = {f"{v}.{s}": (folder / f"{v}.{s}").read_bytes() for v, facts in answer["variants"].items() for s in facts["stages"]}
            return Compiled(files, answer["variants"])

    def _take(self) -> _Worker:
        with contextlib.suppress(queue.Empty):
            return self.idle.get_nowait()
        with self.lock:
            if self.closed:
                raise ToolchainError("the build was stopped")
            worker = _Worker(self.python, self.folder, len(self.started))
            self.started.append(worker)
        return worker

    def close(self) -> None:
        """End every process, whatever it is doing, and start no other."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.closed = True
            for worker in self.started:
                worker.end()
        self.threads.shutdown(wait=True)


class _Worker:
    """One process of triton_worker.py, its log in a file."""

    def __init__(self, python: str, folder: Path, number: int) -> None:
        self.log = folder / f"worker-{number}.log"
        home = folder / f"worker-{number}"
        home.mkdir()
        script = Path(__file__).with_name("triton_worker.py")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8"
            )
        root = Path(__file__).resolve().parents[2]
        self._send({"folder": str(home), "cache": str(home / "cache"), "root": str(root)})

    def _send(self, message: Mapping[str, object]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def ask(self, request: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """The answer, or {"died": why} when the process ends or says nothing in time."""
        assert self.process.stdout is not None
        hanging = threading.Event()

        def stop() -> None:
            hanging.set()
            self.end()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            self._send(request)
            line = self.process.stdout.readline()
        except (BrokenPipeError, OSError, ValueError):
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return dict(json.loads(line))
        self.end()
        if hanging.is_set():
            return {"died": f"the compiler did not finish in {seconds:g} s"}
        return {"died": f"the compiler ended with status {self.process.returncode}: {self._last_words()}"}

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = [line for line in lines if "ERROR" in line.upper() or "assert" in line.lower()]
        return " / ".join((told or lines)[-3:])[-1000:] or "no message"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def workers(jobs: int, seconds: float = SECONDS) -> Iterator[Workers]:
    """Workers in a temporary folder of their own, gone afterwards.  ToolchainError without a usable Triton."""
    check_triton()
    with tempfile.TemporaryDirectory(prefix="flagtree-triton-") as name:
        pool = Workers(Path(name), jobs, seconds)
        try:
            yield pool
        finally:
            pool.close()


def build(kernels: Sequence[tuple[str, Program]], target: Target, jobs: int, progress: Progress = SILENT) -> list[BuiltKernel]:
    """Every (digest, isolated program) as binaries for `target`, in order; `progress` advances by one a kernel.

    Raises CodegenError for a kernel without a source, ToolchainError for one that does not compile or exceeds the target.
    """
    if target.triton is None or target.triton[0] not in STAGES:
        raise ToolchainError(f"stock Triton has no code generator for {target.name}")
    backend = target.triton[0]
    sources = [(digest, generate(program, digest, target)) for digest, program in kernels]
    options = {k: v for k, v in target.options.items() if k in ("ptx_version",)}
    if not sources:
        return []
    out: list[BuiltKernel] = []
    with workers(min(jobs, len(sources))) as pool:
        futures = [pool.submit(source, target.triton, options, STAGES[backend]) for _, source in sources]
        for (digest, source), future in zip(sources, futures, strict=True):
            out.append(_built(digest, source, future.result(), target))
            progress.advance()
    return out


def launch_record(source: TritonSource, compiled: Compiled, binary: str) -> dict[str, object]:
    """What the runtime needs to launch: see docs/architecture.md, "GPU kernels: ABI".  `requires` names the arguments that must be
    divisible by 16 for a variant; `null_pointers` trail the arguments; `shared` is dynamic bytes."""
    variants = {}
    for name, facts in sorted(compiled.variants.items()):
        variants[name] = {
            "file": f"{name}.{binary}", "requires": list(source.aligned) if name == "aligned" else [], "shared": facts["shared"],
            "null_pointers": facts["arguments"] - len(source.signature) if "arguments" in facts else 2,
        }  # fmt: skip
    first = next(iter(compiled.variants.values()))
    return {
        "function": source.function, "grid": list(source.grid), "signature": [list(s) for s in source.signature],
        "threads": first["threads"], "warps": source.warps, "stages": source.stages, "fp_fusion": source.fp_contract, "variants": variants,
        "shared": max(f["shared"] for f in compiled.variants.values()),
    }  # fmt: skip


def check_limits(source: TritonSource, compiled: Compiled, target: Target) -> None:
    """ToolchainError when a variant needs scratch memory from the launcher, or more shared memory or threads than the target has."""
    for name, facts in compiled.variants.items():
        check_variant(facts, len(source.signature), target, f"{source.function}, variant {name}, for {target.name}")


def check_variant(facts: Mapping[str, Any], arguments: int, target: Target, where: str) -> None:
    """`check_limits` of one variant's facts; `arguments` are those of the kernel's signature."""
    if facts["scratch"]:
        raise ToolchainError("the kernel needs scratch memory at launch", where=where, why=f"{facts['scratch']} bytes an instance")
    if facts["shared"] > target.shared_bytes:
        why = f"{facts['shared']} of {target.shared_bytes} bytes"
        raise ToolchainError("the kernel needs too much shared memory", where=where, why=why, hint="a smaller tile")
    if facts["threads"] > target.max_threads:
        raise ToolchainError("the kernel needs too many threads", where=where, why=f"{facts['threads']} of {target.max_threads}")
    if "arguments" in facts and not 0 <= facts["arguments"] - arguments <= 4:
        raise ToolchainError("the kernel's arguments cannot be counted", where=where, why=f"{facts['arguments']} for {arguments} of ours")


def _built(digest: str, source: TritonSource, compiled: Compiled, target: Target) -> BuiltKernel:
    check_limits(source, compiled, target)
    assert target.triton is not None
    files = {"kernel.py": source.text.encode(), **compiled.files}
    numbers = ("registers", "scalar_registers", "spills", "shared", "threads")
    facts = {name: {k: v[k] for k in numbers if k in v} for name, v in sorted(compiled.variants.items())}
    return BuiltKernel(digest, "binary", "", files, launch_record(source, compiled, BINARY[target.triton[0]]), facts)


def versions(target: Target) -> dict[str, str]:
    """Every tool whose change changes bytes, as key factors.  ToolchainError when Triton is missing or too old or too new."""
    return {"triton": check_triton()}
