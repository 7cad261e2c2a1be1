"""MetaX's own compiler, `mxcc`, on the MACA LLVM IR of a bundle.

No real SDK has run these commands; docs/finalize.md says where each word of them comes from.
One of the last steps that `finishers.py` finds, where MACA_PATH names MetaX's SDK.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flagtree.errors import ToolchainError
from flagtree.targets import metax
from flagtree.targets.base import Target
from flagtree.toolchain.last_step import Finished, Work, desk, finished, hash_of, result_of, run


@dataclass(frozen=True)
class Mxcc:
    """MetaX's compiler on the bundle's MACA LLVM IR; `sdk` is what MACA_PATH names.  Use `describe` to make one."""

    sdk: Path
    target: Target
    seconds: float
    version: str
    fingerprint: str
    route: str = "mxcc"
    made_from: str = "llir"

    @classmethod
    def describe(cls, sdk: Path, target: Target, seconds: float) -> Mxcc:
        compiler = sdk / metax.SDK_COMPILER
        with tempfile.TemporaryDirectory(prefix="flagtree-finalize-") as name:
            said = run([str(compiler), "--version"], Path(name), seconds, str(compiler)).strip()
        if not said:
            raise ToolchainError("mxcc does not tell its version", where=str(compiler), why="--version prints nothing")
        return cls(sdk, target, seconds, said.splitlines()[0][:200], hash_of(compiler))

    def finish(self, work: Work) -> Finished:
        files = {}
        names = [f"{variant}.llir" for variant in work.launch["variants"]]
        with desk(work, *names) as folder:
            for variant in work.launch["variants"]:
                source = folder / f"{variant}.ll"
                source.write_bytes(work.files[f"{variant}.llir"])
                for command in self.commands(source, work.files[f"{variant}.llir"].decode("utf-8", "replace")):
                    run(command, folder, self.seconds, f"{work.function}, variant {variant}")
                files[f"{variant}.devbin"] = result_of(folder / f"{variant}.devbin", work.function)
        return finished(work, files, "devbin", {variant: {} for variant in work.launch["variants"]}, self.target)

    def commands(self, source: Path, text: str) -> list[list[str]]:
        """What is run on one file of LLVM IR, in order; docs/finalize.md says where each word comes from."""
        mxcc, linker = str(self.sdk / metax.SDK_COMPILER), str(self.sdk / metax.SDK_COMPILER.with_name("llvm-link"))
        steps, at = [], source
        if re.search(r"^declare [^@\n]*@mc_math_func_", text, re.MULTILINE):  # of MetaX's device library
            linked = source.with_suffix(".linked.ll")
            libraries = [str(self.sdk / "lib" / f"maca_{name}.bc") for name in ("kernellib", "mathlib")]
            steps.append([linker, str(at), *libraries, "--only-needed", "-S", "-o", str(linked)])
            at = linked
        better = source.with_suffix(".opt.ll")
        triple = "--target=mxc-metax-macahca"
        steps.append([mxcc, "-x", "ir", "-O3", "-S", "-emit-llvm", "-forward-unknown-to-compiler", triple, str(at), "-o", str(better)])
        processor = f"-offload-arch={self.target.options['processor']}"
        steps.append([mxcc, "-x", "ir", "-input-is-device", processor, "-device-bin", "-fmad=false", f"--maca-path={self.sdk}", str(better),
                      "-o", str(source.with_suffix(".devbin"))])  # fmt: skip
        return steps
