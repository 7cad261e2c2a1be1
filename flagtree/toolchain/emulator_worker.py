"""The emulator's process: compiles host LLVM IR through libtriton's own LLVM, loads it, runs it.  Run as a script by `emulator`.

Imports nothing of ours, so that it starts fast and a crash takes nothing with it.  Requests and answers are lines of JSON on
standard input and output; every request gets one answer, and a failure is the answer {"error": text}.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

TRIPLE = "x86_64-unknown-linux-gnu"
ENTRY = "ft_entry"
X86_PARTS = ("TargetInfo", "Target", "TargetMC", "AsmPrinter", "AsmParser")


class Report(ctypes.Structure):
    """`struct report` of emulator_runtime.c."""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("code", "x", "y", "z", "thread", "state", "site", "other_thread", "other_state", "other_site")),
        ("signal", ctypes.c_int32), ("wrote", ctypes.c_int32), ("address", ctypes.c_uint64),
        *((n, ctypes.c_int64) for n in ("blocks", "barriers", "exchanges", "switches")),
    ]  # fmt: skip


def processor() -> str:
    """The x86-64 level to generate for: v3 where this machine has it (the bits of the results do not depend on it)."""
    words = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
    return "x86-64-v3" if {"avx2", "fma", "f16c", "bmi2"} <= set(words) else "x86-64-v2"


class Worker:
    def __init__(self, runtime: str, compiler: list[str], folder: str, seconds: float) -> None:
        from triton._C import libtriton

        self.folder, self.compiler, self.seconds, self.llvm = Path(folder), compiler, seconds, libtriton.llvm
        self.llvm.init_targets()
        library = ctypes.CDLL(libtriton.__file__)
        if hasattr(library, "LLVMInitializeX86Target"):  # 3.9 leaves the host's back end out of init_targets
            for part in X86_PARTS:
                getattr(library, f"LLVMInitializeX86{part}")()
        self.processor = processor()
        shared = str(self.folder / "runtime.so")
        self.call([*compiler, "-x", "c", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-o", shared, runtime, "-lm"])
        self.runtime = ctypes.CDLL(shared, mode=ctypes.RTLD_GLOBAL)
        self.runtime.ft_map.restype = ctypes.c_void_p
        self.runtime.ft_map.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
        self.runtime.ft_unmap.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self.kernels: dict[str, ctypes.CDLL] = {}

    def call(self, command: list[str]) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=self.seconds, errors="replace")
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} did not finish within {self.seconds:g} s") from None
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")

    def host_object(self, text: str) -> bytes:
        """x86-64 object code; no fused multiply-add that the text does not ask for."""
        arguments: tuple[object, ...] = (text, TRIPLE, self.processor, "", [], False, True)
        try:
            return bytes(self.llvm.translate_to_asm(*arguments, False))  # 3.8 and 3.9: canonicalize_gep
        except TypeError:
            return bytes(self.llvm.translate_to_asm(*arguments))

    def load(self, request: dict) -> dict:
        key = request["key"]
        if key not in self.kernels:
            stem = self.folder / key
            stem.with_suffix(".o").write_bytes(self.host_object(Path(request["path"]).read_text()))
            self.call([*self.compiler, "-shared", "-o", str(stem.with_suffix(".so")), str(stem.with_suffix(".o")), "-lm"])
            self.kernels[key] = ctypes.CDLL(str(stem.with_suffix(".so")))
        return {}

    def run(self, request: dict) -> dict:
        """Maps the file's regions between guards and runs; the answer has the report and the regions' addresses."""
        guard, regions = request["guard"], request["regions"]
        file = os.open(request["memory"], os.O_RDWR)
        mapped: list[tuple[int, int]] = []
        try:
            for offset, size in regions:
                start = self.runtime.ft_map(file, offset, size, guard)
                if not start:
                    raise RuntimeError("no address space for a tensor")
                mapped.append((start, size))
            slots = (ctypes.c_uint64 * len(request["slots"]))()
            for i, slot in enumerate(request["slots"]):
                slots[i] = slot if isinstance(slot, int) else mapped[slot[0]][0] + slot[1]
            blocks = (ctypes.c_int32 * len(request["blocks"]))(*request["blocks"])
            report = Report()
            self.runtime.ft_run(
                getattr(self.kernels[request["key"]], ENTRY), slots, blocks, ctypes.c_int64(len(blocks) // 3), request["threads"],
                request["shared"], request["order"], ctypes.c_uint64(request["seed"]), ctypes.byref(report),
            )  # fmt: skip
            answer = {field[0]: getattr(report, field[0]) for field in Report._fields_}
            return {**answer, "starts": [start for start, _ in mapped]}
        finally:
            for start, size in mapped:
                self.runtime.ft_unmap(start, size, guard)
            os.close(file)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what LLVM prints must not mix with the answers
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker, answer = Worker(*(request[name] for name in ("runtime", "compiler", "folder", "seconds"))), {}
            else:
                answer = worker.load(request) if request["do"] == "load" else worker.run(request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
