"""How every command ends: exit codes, errors without a traceback, JSON alone on stdout, a folder for a bug of ours."""

import json
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from flagtree.errors import ToolchainError
from flagtree.progress import Progress
from tests.cli.conftest import Flagtree
from tests.cli.reports import report

COMMANDS = ("compile", "finalize", "inspect", "explain", "models", "targets", "opt", "cache", "serve")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(flagtree: Flagtree, command: str) -> None:
    ended = flagtree(command, "--help")
    assert ended.code == 0
    assert "Examples" in ended.out
    assert f"flagtree {command}" in ended.out


def test_help_lists_every_command_and_version_is_the_packages(flagtree: Flagtree) -> None:
    import flagtree as package

    ended = flagtree("--help")
    assert all(command in ended.out for command in COMMANDS)
    assert flagtree("--version").out == f"flagtree {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compile", "qwen4", "--target", "metax"), "unknown model 'qwen4'\n  why: closest: qwen3"),
        (("compile", "qwen3", "--target", "metaxx"), "unknown target 'metaxx'\n  why: closest: metax"),
        (("explain", "fusoin"), "unknown topic 'fusoin'\n  why: closest: fusion"),
        (("explain", "key", "nowhere"), "a bundle holds no evidence for 'key'"),
        (("opt", "no such file.ir"), "the program cannot be read\n  where: no such file.ir"),
        (("inspect", "kein Bündel"), "kein Bündel"),
    ],
)
def test_a_mistake_is_explained_and_ends_with_2(flagtree: Flagtree, arguments: Sequence[str], said: str) -> None:
    ended = flagtree(*arguments)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


WRONG_OPTIONS = (("compile",), ("compile", "qwen3"), ("nonsense",), ("models", "--nonsense"), ("cache", "prune", "--keep", "x"))


@pytest.mark.parametrize("arguments", WRONG_OPTIONS)
def test_a_wrong_option_ends_with_2(flagtree: Flagtree, arguments: Sequence[str]) -> None:
    ended = flagtree(*arguments)
    assert ended.code == 2
    assert ended.err
    assert ended.out == ""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Puts the report made by hand where the compiler's would be; the list tells what the command asked for."""
    calls: list[dict[str, object]] = []

    def compile_model(model: str, targets: Sequence[str], *, progress: Progress, **options: object) -> object:
        calls.append({"model": model, "targets": tuple(targets), **options})
        progress.phase("kernels", 3)
        progress.advance(3)
        return report()

    monkeypatch.setitem(sys.modules, "flagtree.compile", types.SimpleNamespace(compile_model=compile_model))
    return calls


def test_compile_hands_on_what_was_typed(flagtree: Flagtree, compiled: list[dict[str, object]]) -> None:
    ended = flagtree("compile", "qwen3", "-t", "maca", "-t", "metax", "--part", "decode", "--layers", "2", "--out", "größe 1", "-j", "3")
    assert ended.code == 0, ended.err
    assert compiled == [{"model": "qwen3", "targets": ("metax",), "parts": ["decode"], "layers": 2, "dtype": None, "ranks": 1,
                         "out": Path("größe 1"), "jobs": 3}]
    assert "add_rms_norm" in ended.out


def test_json_is_alone_on_stdout_and_progress_on_stderr(flagtree: Flagtree, compiled: list[dict[str, object]]) -> None:
    ended = flagtree("compile", "qwen3", "Qwen/Qwen3-8B", "-t", "metax", "--json")
    lines = ended.out.splitlines()
    assert [json.loads(line)["model"] for line in lines] == ["qwen3", "qwen3"]
    assert len(compiled) == 2
    assert "kernels 3/3" in ended.err


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def compile_model(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setitem(sys.modules, "flagtree.compile", types.SimpleNamespace(compile_model=compile_model))


def test_a_failing_toolchain_is_explained(flagtree: Flagtree, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ToolchainError("no C++ compiler", where="PATH", why="looked for g++", hint="install g++"))
    ended = flagtree("compile", "qwen3", "-t", "metax")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: no C++ compiler\n  where: PATH\n  why: looked for g++\n  try: install g++\n"


def test_a_bug_of_ours_leaves_a_folder_with_what_is_needed(flagtree: Flagtree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "mit Blank und ß"))
    error = ValueError("boom")
    error.reproducer = {"program.ir": "program x\n", "../escape.txt": "no"}  # type: ignore[attr-defined]
    fail_with(monkeypatch, error)
    ended = flagtree("compile", "qwen3", "-t", "metax")
    assert ended.code == 1
    assert ended.err.startswith("internal error: ValueError: boom\n")
    (folder,) = (tmp_path / "mit Blank und ß" / "bugs").iterdir()
    assert str(folder) in ended.err
    assert sorted(p.name for p in folder.iterdir()) == ["command.txt", "escape.txt", "program.ir", "traceback.txt", "versions.json"]
    assert (folder / "command.txt").read_text().startswith("flagtree compile qwen3 -t metax\n")
    assert "ValueError: boom" in (folder / "traceback.txt").read_text()
    assert json.loads((folder / "versions.json").read_text())["python"]


def test_a_bug_is_told_even_where_no_folder_can_be_written(flagtree: Flagtree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file" / "below"))
    fail_with(monkeypatch, ValueError("boom"))
    ended = flagtree("compile", "qwen3", "-t", "metax")
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert ended.err.endswith("internal error: ValueError: boom\n")


def test_models_lists_what_ships(flagtree: Flagtree) -> None:
    rows = json.loads(flagtree("models", "--json").out)
    assert "qwen3" in next(row for row in rows if row["name"] == "qwen3-8b")["aliases"]
    assert "40960" in flagtree("models").out
    assert next(row for row in rows if row["name"] == "minimax-m2")["quantisation"]["block"] == [128, 128]


def test_one_model_is_shown_with_its_sources(flagtree: Flagtree) -> None:
    shown = flagtree("models", "step3").out
    assert "3 of 48 x 5120" in shown
    assert "vLLM 0.32 models/step3_text.py" in shown
    assert shown.index("Inferred") < shown.index("vision_config.intermediate_size")
    assert flagtree("models", "step4").code == 2


@pytest.mark.parametrize("parts", ["vision", "prefill,vision", "decode,embedding"])
def test_a_part_that_the_model_lacks_is_refused_before_any_work(flagtree: Flagtree, parts: str) -> None:
    ended = flagtree("compile", "qwen3", "--target", "cpu", "--part", parts)
    assert ended.code == 2
    assert ended.err.count("error: unknown part") == 1


def test_targets_say_how_far_this_machine_gets(flagtree: Flagtree) -> None:
    ended = flagtree("targets", "--json")
    assert ended.code == 0, ended.err
    for row in json.loads(ended.out):
        assert row["reach"] in row["tiers"]
        assert row["missing"] or row["reach"] == row["tiers"][-1], row
        assert row["how"] or not row["missing"], row
    assert "metax" in flagtree("targets").out


def test_cache_shows_and_prunes(flagtree: Flagtree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flagtree.artifact.store import Store

    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path))
    assert "empty" in flagtree("cache").out
    Store().put("kernel", "a" * 64, {"kernel.cpp": b"x" * 5000})
    assert json.loads(flagtree("cache", "--json").out)["kinds"]["kernel"]["entries"] == 1
    assert flagtree("cache", "prune", "--keep", "1MB").out.splitlines()[1].startswith("deleted 0 entries")
    assert "deleted 1 entries" in flagtree("cache", "prune", "--keep", "0").out
    assert not Store().get("kernel", "a" * 64)


def test_a_reader_that_goes_away_is_no_error(repository: Path) -> None:
    command = f"'{sys.executable}' -u -m flagtree models | (read -r -n 1; sleep 0.1)"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
