"""The build hook of the wheel: launcher.c is compiled where a C compiler is at hand, and left out where none is.

Without it launches go through ctypes (flagtree/runtime/launcher.py).  An editable install has the library beside its source.
"""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = "flagtree/runtime"


class LauncherHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library and put it into the wheel, which is then for this platform and for every Python."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        editable = version == "editable"
        self.folder = tempfile.TemporaryDirectory()
        builder = _builder(root)
        library = (root / PLACE if editable else Path(self.folder.name)) / builder.LIBRARY
        problem = builder.build(library)
        if problem:
            self.app.display_warning(f"flagtree: the GPU launcher was not built, launches go through ctypes: {problem}")
            return
        if not editable:
            build_data["force_include"][str(library)] = f"{PLACE}/{builder.LIBRARY}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.target_name == "wheel":
            self.folder.cleanup()


def _builder(root: Path) -> ModuleType:
    """launcher_build.py by its path: the package's dependencies are not there yet."""
    spec = importlib.util.spec_from_file_location("launcher_build", root / "flagtree" / "runtime" / "launcher_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
