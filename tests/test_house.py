"""The rules of the house, read off the source: sizes, import arrows, one reader of the environment, no pickle, no target names.

A rule that a file breaks names the file and the line.  The exceptions that exist are written here, each with its reason.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flagtree"
MODULE_LINES, FUNCTION_LINES = 400, 60

# Which parts a part may import, besides itself, errors, settings and progress.  A part that is not listed may import all.
ARROWS = {
    "ir": set(),
    "targets": set(),
    "lower": {"ir"},
    "passes": {"ir", "targets"},
    "codegen": {"ir", "targets"},
    "toolchain": {"codegen", "ir", "targets", "artifact"},
    "artifact": set(),
    "runtime": {"artifact"},
    "serve": {"artifact", "runtime"},
}
FREE = {"errors", "settings", "progress", "reproducer"}
# Imports that stand inside a function, and so happen only when it is called: a target's probe asks the toolchain, and on a miss
# torch.compile's entry point and a lenient server import the compiler.
WHEN_CALLED = {
    "targets/cpu.py": {"toolchain"},
    "runtime/compile.py": {"compile", "capture"},
    "runtime/gpu.py": {"targets"},
    "serve/server.py": {"capture", "graphs"},
    "serve/stored.py": {"targets"},
}
NO_COMPILER = {"artifact", "runtime", "serve"}
COMPILER_LIBRARIES = {"sympy", "networkx", "jinja2", "triton"}
UNSAFE_IMPORTS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"}
FILE_NAMES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py", "manager.py"}
# "cpu" and "cuda" are also torch's device types, so those two are looked for only in comparisons with a target's name.
CHIP_NAMES = {"metax", "maca", "c500", "c550", "rocm", "nvidia", "amd", "hip", "ascend"}
CHIP_PATTERN = re.compile(r"(cuda:)?sm_?\d+|(rocm:)?gfx\d+\w*|xcore\d+")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """`flagtree/ir/text.py` is in part `ir`, `flagtree/errors.py` is part `errors`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Each import statement with its dotted module, wherever it stands, those for type checkers left out."""
    unchecked = {id(inner) for node in ast.walk(tree(path)) if isinstance(node, ast.If) and _is_type_checking(node.test)
                 for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree(path)):
        if id(node) in unchecked:
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            module = node.module or ""
            yield node, module
            yield from ((node, f"{module}.{alias.name}") for alias in node.names if module == "flagtree")


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def report(broken: list[str]) -> None:
    assert not broken, "\n" + "\n".join(broken)


def test_modules_and_functions_are_short() -> None:
    broken = []
    for path in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MODULE_LINES:
            broken.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {MODULE_LINES}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    broken.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}")
    report(broken)


def test_every_module_says_what_it_owns() -> None:
    empty = [p for p in sources() if not ast.get_docstring(tree(p)) and p.read_text(encoding="utf-8").strip()]
    report([f"{path.relative_to(ROOT)}: no module docstring" for path in empty])


def test_imports_run_one_way() -> None:
    broken = []
    for path in sources():
        part = part_of(path)
        if part not in ARROWS:
            continue
        when_called = WHEN_CALLED.get(path.relative_to(PACKAGE).as_posix(), set())
        inside = {id(node) for f in ast.walk(tree(path)) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
        for node, module in imports(path):
            line = node.lineno
            allowed = ARROWS[part] | FREE | {part} | (when_called if id(node) in inside else set())
            if module.startswith("flagtree.") and module.split(".")[1] not in allowed | {"__version__"}:
                broken.append(f"{path.relative_to(ROOT)}:{line}: {part} may not import {module}")
            if part in NO_COMPILER and module.split(".")[0] in COMPILER_LIBRARIES:
                broken.append(f"{path.relative_to(ROOT)}:{line}: {part} may not import {module}")
    report(broken)


def test_one_place_reads_the_environment() -> None:
    broken = []
    for path in sources():
        if path == PACKAGE / "settings.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv", "environb"):
                broken.append(f"{path.relative_to(ROOT)}:{node.lineno}: only settings.py reads the environment")
    report(broken)


def test_nothing_unpickles_or_evaluates_text() -> None:
    broken = []
    for path in sources():
        for statement, module in imports(path):
            if module.split(".")[0] in UNSAFE_IMPORTS:
                broken.append(f"{path.relative_to(ROOT)}:{statement.lineno}: imports {module}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                broken.append(f"{path.relative_to(ROOT)}:{node.lineno}: calls {node.func.id}")
    report(broken)


def test_target_names_stay_in_targets_and_toolchain() -> None:
    broken = []
    for path in sources():
        if part_of(path) in ("targets", "toolchain"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.lower()
                if text in CHIP_NAMES or CHIP_PATTERN.fullmatch(text):
                    broken.append(f"{path.relative_to(ROOT)}:{node.lineno}: names the chip '{node.value}'")
            if isinstance(node, ast.Compare) and any(_is_target_name(side) for side in (node.left, *node.comparators)):
                broken.append(f"{path.relative_to(ROOT)}:{node.lineno}: compares a target's name; ask for a fact of the target instead")
    for path in sorted(PACKAGE.rglob("*.j2")):
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if set(re.findall(r"[a-z0-9]+", text.lower())) & CHIP_NAMES:
                broken.append(f"{path.relative_to(ROOT)}:{line}: names a chip")
    report(broken)


def _is_target_name(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr in ("name", "family") and isinstance(node.value, ast.Name)
            and node.value.id == "target")


def test_files_are_named_for_what_they_hold() -> None:
    report([str(path.relative_to(ROOT)) for path in sources() if path.name in FILE_NAMES])


def test_words_of_the_glossary() -> None:
    broken = []
    for path in sources():
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"fall[ -]?back", text, re.IGNORECASE):
                broken.append(f"{path.relative_to(ROOT)}:{line}: say extern, or what it is, not '{text.strip()}'")
    report(broken)


def test_sympy_simplify_is_banned() -> None:
    """It costs 40 ms a call; bounded rewriting in ir/index.py is what we use."""
    broken = [f"{path.relative_to(ROOT)}:{node.lineno}" for path in sources() for node in ast.walk(tree(path))
              if isinstance(node, ast.Attribute) and ast.unparse(node) == "sympy.simplify"]
    report(broken)


@pytest.mark.parametrize("module", ["flagtree", "flagtree.cli.app", "flagtree.settings", "flagtree.targets", "flagtree.capture.model_spec"])
def test_light_modules_import_neither_torch_nor_the_compiler(module: str) -> None:
    heavy = ("torch", "sympy", "networkx", "jinja2", "triton", "transformers", "numpy")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_takes_less_than_a_second_of_cpu() -> None:
    code = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "flagtree", "--help"], check=True, capture_output=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


@pytest.mark.parametrize("module", ["flagtree.runtime.load", "flagtree.artifact.bundle", "flagtree.runtime.compile", "flagtree.serve"])
def test_what_serves_imports_no_part_of_the_compiler(module: str) -> None:
    parts = ("capture", "ir", "lower", "passes", "codegen", "toolchain", "targets")
    code = f"""
import sys, {module}
print([m for m in sys.modules if m.startswith("flagtree.") and m.split(".")[1] in {parts!r}],
      [m for m in ("jinja2", "triton", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
