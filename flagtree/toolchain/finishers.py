"""Which tool takes the last step of a target's kernels on this machine: the one that the user names, else the vendor's that is found.

A tool is described before any work: a wrong path, a Python without Triton, a Triton without the code generator is one error.
`flagtree/finalize.py` asks; the steps themselves stand in other_triton.py, mxcc.py and ptxas.py.
"""

from __future__ import annotations

import sys

from flagtree.errors import ToolchainError
from flagtree.settings import settings
from flagtree.targets import metax
from flagtree.targets.base import Target
from flagtree.toolchain.last_step import SECONDS, Tool
from flagtree.toolchain.mxcc import Mxcc
from flagtree.toolchain.other_triton import STAGES, TritonTool
from flagtree.toolchain.ptxas import Ptxas


def find_tool(target: Target, python: str | None, ptxas: str | None, seconds: float = SECONDS) -> Tool:
    """The tool that the user names, else MetaX's Triton in this Python or `mxcc` below MACA_PATH.  ToolchainError when there is none."""
    generator = target.triton[0] if target.triton else ""
    if generator not in STAGES:
        raise ToolchainError(f"there is no last step for {target.name}", why="its kernels are built whole by `flagtree compile`")
    if python and ptxas:
        raise ToolchainError("two tools are named", why="--python and --ptxas", hint="name one")
    if ptxas:
        if generator != "cuda":
            raise ToolchainError(f"ptxas makes no code for {target.name}", hint="it is for the cuda targets; others take --python")
        return Ptxas.describe(ptxas, target, seconds)
    if python:
        return TritonTool.describe(python, target, seconds)
    if generator != "maca":
        also = ", or --ptxas PATH" if generator == "cuda" else ""
        raise ToolchainError("no tool is named", hint=f"--python PATH of a Python with another Triton{also}")
    try:
        return TritonTool.describe(sys.executable, target, seconds)
    except ToolchainError as error:
        why = error.why
    if metax.sdk_compiler() is None or settings.maca_path is None:
        raise ToolchainError("no toolchain of MetaX is here", why=f"Triton of this Python: {why}; mxcc: {metax.sdk_state()}",
                             hint="set MACA_PATH to MetaX's SDK, or name the Python of MetaX's Triton with --python")  # fmt: skip
    return Mxcc.describe(settings.maca_path, target, seconds)
