"""An import hook: what of our compiler is imported, and which library that serving needs not one of our modules asks for.

`install()` before anything of flagtree is imported; `found()` tells, `check()` raises.  Every `import` statement is seen, also of what
is there already, and every module that is newly found, whichever function asks.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

COMPILER = ("capture", "ir", "lower", "passes", "codegen", "toolchain")
LIBRARIES = ("sympy", "networkx", "jinja2", "triton")
_asked: set[str] = set()


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in LIBRARIES:
            callers = [f for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename]
            file = callers[-1].filename if callers else ""
            if "/flagtree/" in file and "/site-packages/" not in file.split("/flagtree/")[-1]:
                _asked.add(f"{file} asks for {name}")


def install() -> None:
    """Watch from now on."""
    plain = builtins.__import__

    def watched(
        name: str, globals: Mapping[str, Any] | None = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
    ) -> ModuleType:
        importer = str((globals or {}).get("__name__", ""))
        if level == 0 and name.split(".")[0] in LIBRARIES and importer.split(".")[0] == "flagtree":
            _asked.add(f"{importer} asks for {name}")
        return plain(name, globals, locals, fromlist or (), level)

    builtins.__import__ = watched
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]


def found() -> list[str]:
    """Modules of our compiler that are imported, and what was asked for."""
    ours = [m for m in sys.modules if m.startswith("flagtree.") and m.split(".")[1] in COMPILER]
    return sorted(ours) + sorted(_asked)


def check() -> None:
    assert found() == [], found()
