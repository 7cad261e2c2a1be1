"""Another release of NVIDIA's assembler on the PTX of a bundle.

Invariant: the options that decide numbers are those of the build (no fused multiply-add unless the kernel allows it).
One of the last steps that `finishers.py` finds, where the user names a `ptxas`.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flagtree.errors import BundleError, ToolchainError
from flagtree.targets.base import Target
from flagtree.toolchain.last_step import Finished, Work, desk, find_program, finished, hash_of, result_of, run


@dataclass(frozen=True)
class Ptxas:
    """NVIDIA's assembler on the bundle's PTX.  Use `describe` to make one."""

    program: Path
    target: Target
    seconds: float
    version: str
    fingerprint: str
    route: str = "ptxas"
    made_from: str = "ptx"

    @classmethod
    def describe(cls, name: str, target: Target, seconds: float) -> Ptxas:
        program = find_program(name)
        with tempfile.TemporaryDirectory(prefix="flagtree-finalize-") as folder:
            said = run([str(program), "--version"], Path(folder), seconds, str(program))
        release = re.search(r"release [\d.]+, V([\d.]+)", said)
        if release is None:
            why = said.strip()[-300:] or "--version prints nothing"
            raise ToolchainError("this is no ptxas", where=str(program), why=why, hint="--ptxas names NVIDIA's assembler")
        return cls(program, target, seconds, f"ptxas {release[1]}", hash_of(program))

    def finish(self, work: Work) -> Finished:
        files = {}
        with desk(work, *(f"{variant}.ptx" for variant in work.launch["variants"])) as folder:
            for variant in work.launch["variants"]:
                where = f"{work.function}, variant {variant}"
                architecture = re.search(r"^\.target (sm_\w+)", work.files[f"{variant}.ptx"].decode("utf-8", "replace"), re.MULTILINE)
                if architecture is None:
                    raise BundleError("a kernel's PTX names no architecture", where=where, hint="compile the model again")
                # Triton 3.9 asks for this register allocation around a bug of ptxas 13; 12.4 takes it too
                options = [*([] if work.launch["fp_fusion"] else ["--fmad=false"]), "--regAllocOptLevel=2", f"--gpu-name={architecture[1]}"]
                out = folder / f"{variant}.cubin"
                run([str(self.program), *options, str(folder / f"{variant}.ptx"), "-o", str(out)], folder, self.seconds, where)
                files[f"{variant}.cubin"] = result_of(out, where)
        return finished(work, files, "cubin", {variant: {} for variant in work.launch["variants"]}, self.target)
