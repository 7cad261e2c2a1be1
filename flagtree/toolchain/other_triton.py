"""The Triton of another Python builds a bundle's own `kernel.py`: a vendor's fork, or another release of stock Triton.

Invariant: that Python runs `vendor_worker.py` and needs nothing of ours; the protocol is JSON in files of a temporary folder.
One of the last steps that `finishers.py` finds; docs/finalize.md tells what is asked of it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagtree.errors import ToolchainError
from flagtree.settings import settings
from flagtree.targets.base import Target
from flagtree.toolchain.last_step import KEPT_WORDS, Finished, Work, desk, find_program, finished, result_of, run
from flagtree.toolchain.triton_worker import amdgcn_facts

# What another Triton hands over for each code generator: text that belongs to the binary, then the binary.
STAGES = {"cuda": ("ptx", "cubin"), "hip": ("amdgcn", "hsaco"), "maca": ("mcfatbin",)}


@dataclass(frozen=True)
class TritonTool:
    """The Triton of another Python builds the bundle's own `kernel.py`.  Use `describe` to make one."""

    python: str
    target: Target
    seconds: float
    version: str
    fingerprint: str
    route: str = "triton"
    made_from: str = "kernel.py"

    @classmethod
    def describe(cls, python: str, target: Target, seconds: float) -> TritonTool:
        """ToolchainError when that Python has no Triton, or one without a code generator for the target."""
        program = str(find_program(python))
        assert target.triton is not None
        with tempfile.TemporaryDirectory(prefix="flagtree-finalize-") as name:
            told = _ask(program, {"do": "describe", "gpu": target.triton}, Path(name), seconds, where=program)
        try:
            version = f"triton {told['triton']} (Python {told['python']})"
            known, able, fingerprint = [str(b) for b in told["backends"]], bool(told["able"]), str(told["fingerprint"])
        except (KeyError, TypeError) as error:
            raise _nonsense(program, repr(error)) from error
        if not able:
            raise ToolchainError(
                f"the Triton of this Python has no code generator for {target.name}", where=f"{program}, {version}",
                why=f"it has backends for {', '.join(known) or 'nothing'}", hint="name the Python of the vendor's Triton with --python",
            )  # fmt: skip
        return cls(program, target, seconds, version, fingerprint)

    def finish(self, work: Work) -> Finished:
        backend, arch, warp = self.target.triton  # type: ignore[misc]
        stages = STAGES[backend]
        promised = work.launch["variants"].get("aligned", {}).get("requires", [])
        options = {"num_warps": work.launch["warps"], "num_stages": work.launch["stages"], "enable_fp_fusion": work.launch["fp_fusion"]}
        options |= {k: v for k, v in self.target.options.items() if k == "ptx_version"}
        with desk(work, "kernel.py") as folder:
            request = {"do": "build", "folder": str(folder), "source": str(folder / "kernel.py"), "function": work.function,
                       "signature": work.launch["signature"], "aligned": promised, "gpu": [backend, arch, warp], "stages": stages,
                       "options": options}  # fmt: skip
            answer = _ask(self.python, request, folder, self.seconds, work.function)
            files = {f"{v}.{s}": result_of(folder / f"{v}.{s}", work.function) for v in work.launch["variants"] for s in stages}
        return finished(work, files, stages[-1], _told(work, answer, files, stages), self.target)


def _ask(python: str, request: Mapping[str, object], folder: Path, seconds: float, where: str) -> dict[str, Any]:
    """The answer of vendor_worker.py.  ToolchainError for the compiler's own error, and for anything that is no answer."""
    answer = folder / "answer.json"
    (folder / "request.json").write_text(json.dumps({**request, "answer": str(answer)}), encoding="utf-8")
    script = str(Path(__file__).with_name("vendor_worker.py"))
    environment = settings.child_environment(
        TRITON_CACHE_DIR=str(folder / "cache"), TRITON_DISABLE_LINE_INFO="1", TRITON_INTERPRET="0", PYTHONDONTWRITEBYTECODE="1"
    )
    said = run([python, script, str(folder / "request.json")], folder, seconds, where, environment)
    try:
        found = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _nonsense(where, said.strip()[-KEPT_WORDS:] or repr(error)) from error
    if not isinstance(found, dict):
        raise _nonsense(where, f"its answer is a {type(found).__name__}")
    if "error" in found:
        what = "that Triton does not compile this kernel" if request["do"] == "build" else "the Triton of that Python cannot be used"
        raise ToolchainError(what, where=where, why=str(found["error"])[-KEPT_WORDS:], hint=_HINT)
    return found


_HINT = "`PYTHON -c 'import triton'` shows whether it is there; another may be named with --python"


def _nonsense(where: str, why: str) -> ToolchainError:
    return ToolchainError("the other Python gave no usable answer", where=where, why=why, hint=_HINT)


def _told(work: Work, answer: Mapping[str, Any], files: Mapping[str, bytes], stages: Sequence[str]) -> dict[str, dict[str, int]]:
    """The numbers that the other Triton tells of each variant, or what AMD's assembly says of them."""
    out: dict[str, dict[str, int]] = {}
    for name in work.launch["variants"]:
        try:
            facts = answer["variants"][name]
            if facts["function"] != work.function:
                raise _nonsense(work.function, f"it built {facts['function']}")
            out[name] = {k: int(facts[k]) for k in ("shared", "warps", "scratch", "arguments")}
        except (KeyError, TypeError, ValueError) as error:
            raise _nonsense(work.function, repr(error)) from error
        if "amdgcn" in stages:
            out[name] |= amdgcn_facts(files[f"{name}.amdgcn"].decode("utf-8", "replace"))  # type: ignore[arg-type]
        if "cubin" in stages:
            del out[name]["arguments"]  # the cubin itself tells
    return out
