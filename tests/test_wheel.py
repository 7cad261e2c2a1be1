"""The wheel, built and installed as a user does, outside of the checkout: nothing that a command needs stayed behind."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flagtree.capture.model_spec import list_specs
from flagtree.runtime.launcher_build import COMPILERS, LIBRARY

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout installed into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # hatchling comes from the index into an environment of the build's own, as for everyone who builds from source
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, cwd=folder)
    return folder / "site"


def _flagtree(site: Path, *arguments: str) -> str:
    """What the installed command prints, far from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([site / "bin" / "flagtree", *arguments], cwd=site.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_installed_package_that_runs(site: Path) -> None:
    code = "import flagtree; print(flagtree.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run([sys.executable, "-c", code], cwd=site.parent, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(site)


def test_models_are_found(site: Path) -> None:
    listed = json.loads(_flagtree(site, "models", "--json"))
    assert [row["name"] for row in listed] == [spec.name for spec in list_specs()]


def test_pages_of_explain_are_found(site: Path) -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "explain").glob("*.md")}
    assert {line.split()[0] for line in _flagtree(site, "explain").splitlines()} == pages.keys()
    assert _flagtree(site, "explain", "tiers") == pages["tiers"]


def test_every_file_of_the_package_is_in_it(site: Path) -> None:
    """Templates and the emulator's C source are data that only their users miss."""
    tracked = subprocess.run(["git", "ls-files", "flagtree", "models"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout: which files belong to the package is not known")
    wanted = {f"flagtree/_{line}" if line.startswith("models/") else line for line in tracked.stdout.splitlines()}
    assert len(wanted) > 100
    assert sorted(name for name in wanted if not (site / name).is_file()) == []


def test_the_launcher_is_built_where_a_compiler_is(site: Path) -> None:
    """The build of the wheel compiles launcher.c (hatch_build.py), and what is installed takes it."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C compiler: launches go through ctypes")
    code = "from flagtree.runtime import launcher as l; print(l.built(), l.BUILT); l.Compiled(l.BUILT, 0)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run([sys.executable, "-c", code], cwd=site.parent, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"True {site / 'flagtree' / 'runtime' / LIBRARY}"
    (tags,) = site.glob("*.dist-info/WHEEL")
    assert re.search(r"^Tag: py3-none-linux_\w+$", tags.read_text(encoding="utf-8"), re.MULTILINE)


def test_entry_points(site: Path) -> None:
    (record,) = site.glob("*.dist-info/entry_points.txt")
    found = configparser.ConfigParser()
    found.read(record)
    assert dict(found["console_scripts"]) == {"flagtree": "flagtree.cli.app:main"}
    assert dict(found["torch_dynamo_backends"]) == {"flagtree": "flagtree.serve.bundles:flagtree"}
    assert dict(found["vllm.general_plugins"]) == {"flagtree": "flagtree.serve.plugin:register"}
    assert dict(found["vllm_fl.plugin"]) == {"flagtree": "flagtree.serve.dispatcher:register"}
