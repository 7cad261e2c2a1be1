"""The pages say what is so: commands that exist, links that lead somewhere, every target, command, topic and setting."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from flagtree.cli.app import app
from flagtree.settings import Settings
from flagtree.targets import all_targets

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[str]:
    """The README's shell blocks, each one line."""
    return [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_first_two_commands_are_the_whole_set_up() -> None:
    main_job, tests = commands()
    assert main_job.endswith("flagtree compile qwen3 --target metax")
    assert tests.endswith("python -m pytest -n auto --dist loadfile")
    for command in (main_job, tests):
        assert "\n" not in command
        assert command.startswith("python -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[")
        extras = re.search(r"'\.\[(.*)\]'", command)
        assert extras is not None
        assert set(extras[1].split(",")) <= pyproject()["project"]["optional-dependencies"].keys()


def test_ci_runs_the_readmes_own_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    taken = re.search(r"command=\$\((grep .*)\)", script)
    assert taken is not None
    found = subprocess.run(["bash", "-c", taken[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert found == commands()[1]
    assert "pip install" not in script
    assert not re.search(r"(bin/|-m )pytest", script.replace("'-m pytest'", "").replace("-- '-m pytest'", ""))
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)


def test_the_table_of_what_is_proved_has_every_target() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    for target in all_targets():
        assert sum(f"`{target.name}`" in row for row in rows) == 1, target.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link


def test_no_page_names_a_folder_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/(root|work|home/\w+)/", page.read_text(encoding="utf-8")), page


def test_the_command_line_page_has_every_command_and_setting() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert f"| `flagtree {command.name} " in text or f"| `flagtree {command.name}` " in text, command.name
    rows = [f"| `{s.variable}` | {s.help} | {'key ' if s.enters_key else ''}|" for s in Settings.table()]
    shown = [line for line in text.splitlines() if re.match(r"\| `[A-Z_0-9]+` ", line)]
    assert shown == rows, "docs/cli.md should say:\n" + "\n".join(rows)


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES[2:]:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or f"]({name})" in index, name


def test_the_wheel_brings_models_texts_and_entry_points() -> None:
    project = pyproject()
    assert project["project"]["name"] == "flagtree-toolkit"
    assert project["project"]["scripts"] == {"flagtree": "flagtree.cli.app:main"}
    assert project["project"]["entry-points"]["torch_dynamo_backends"] == {"flagtree": "flagtree.serve.bundles:flagtree"}
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"models": "flagtree/_models", "docs/explain": "flagtree/_explain"}
    for source in included:
        assert any((ROOT / source).iterdir())


def test_core_dependencies_stay_few() -> None:
    """The extras hold what only some uses need; nothing of a vendor or of a model library is in the core."""
    names = {re.split(r"[<>=~\[ ]", line)[0] for line in pyproject()["project"]["dependencies"]}
    assert names == {"torch", "sympy", "networkx", "jinja2", "typer", "rich", "pydantic", "filelock", "safetensors", "pyyaml", "numpy"}
