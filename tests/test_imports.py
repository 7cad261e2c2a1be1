"""What importing costs: `import flagtree` brings no torch, and the serving side brings no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = ("capture", "ir", "lower", "passes", "codegen", "toolchain")
LIBRARIES = ("sympy", "networkx", "jinja2", "triton")

# imports the modules named on the command line and prints what else of ours came, and which library a file of ours asked for
PROBE = """
import importlib, json, sys, traceback
asked = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        frames = [f for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename]
        if "flagtree" in frames[-1].filename.split("/site-packages/")[-1] and not name.startswith("flagtree"):
            asked.append(name.split(".")[0])
sys.meta_path.insert(0, Watch())
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps({"modules": sorted(sys.modules), "asked": asked}))
"""


def probe(repository: Path, *modules: str) -> dict[str, list[str]]:
    env = {**os.environ, "PYTHONPATH": str(repository)}
    run = subprocess.run([sys.executable, "-c", PROBE, *modules], env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_the_package_alone_is_light(repository: Path) -> None:
    loaded = probe(repository, "flagtree", "flagtree.errors", "flagtree.settings")["modules"]
    assert "torch" not in loaded
    assert [m for m in loaded if m.startswith("flagtree.")] == ["flagtree.errors", "flagtree.settings"]


def test_reading_a_bundle_needs_no_torch(repository: Path) -> None:
    loaded = probe(repository, "flagtree.artifact.bundle", "flagtree.artifact.store", "flagtree.artifact.trust")["modules"]
    assert "torch" not in loaded


@pytest.mark.parametrize("package", ["artifact", "runtime", "serve"])
def test_the_serving_side_imports_no_compiler(repository: Path, package: str) -> None:
    folder = repository / "flagtree" / package
    names = [f"flagtree.{package}.{p.stem}" for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    found = probe(repository, *names)
    ours = [m for m in found["modules"] if m.startswith("flagtree.")]
    assert [m for m in ours if m.split(".")[1] in COMPILER] == []
    assert [m for m in found["asked"] if m in LIBRARIES] == []


def test_the_package_says_what_it_has() -> None:
    import flagtree

    assert {"load", "__version__"} <= set(dir(flagtree))
    assert callable(flagtree.load)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = flagtree.lode
