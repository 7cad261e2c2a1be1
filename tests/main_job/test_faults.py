"""Nothing is lost: interruption, a kill at any moment, a store that cannot be written, damaged and foreign bundles, odd paths."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import flagtree
from flagtree.compile import compile_model
from flagtree.errors import FlagtreeError
from flagtree.settings import settings
from tests.main_job.conftest import Place, content

CPU_JOB = ("--target", "cpu", "--part", "decode", "-j", "2", "--out", "out")
BOTH_JOB = ("--target", "cuda:sm90", *CPU_JOB)


def session(leader: int) -> list[int]:
    """Processes that still run in the session of `leader`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def all_end(leader: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while (left := session(leader)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


def wait_for(place: Place, text: str, running: subprocess.Popen[bytes]) -> None:
    """Until the command has said `text` on stderr, or has ended."""
    deadline = time.monotonic() + 120
    while text not in (place.folder / "stderr").read_text(errors="replace") and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(new_place: Callable[[str], Place], small_config: str) -> Place:
    """A place where the small model was compiled in peace."""
    place = new_place("whole")
    place.compile(small_config, *BOTH_JOB)
    return place


def bundles(place: Place) -> dict[str, dict[str, bytes]]:
    return {path.name: content(path) for path in sorted((place.work / "out").iterdir())}


# -- stopped in the middle -----------------------------------------------------------------------------------------------
# a line on stderr ends a phase, so each moment lies in the phase after the one that is named; "" is the start
@pytest.mark.parametrize(("target", "after", "seconds"), [
    ("cpu", "capture decode", 0.1), ("cuda:sm90", "passes", 0.5),
    *(pytest.param(target, after, seconds, marks=pytest.mark.full)
      for target in ("cpu", "cuda:sm90", "metax") for after, seconds in (("", 1.0), ("passes", 0.1), ("kernels", 0.0))),
])  # fmt: skip
def test_control_c_ends_with_one_line_and_no_children(place: Place, small_config: str, target: str, after: str, seconds: float) -> None:
    command = ("compile", small_config, "--target", target, "--part", "decode", "-j", "2")
    running = place.start(*command)
    wait_for(place, after, running)
    time.sleep(seconds)
    os.kill(running.pid, signal.SIGINT)
    code = running.wait(timeout=30)
    errors = (place.folder / "stderr").read_text()
    assert code == 130, errors
    assert errors.splitlines()[-1] == "interrupted: what was finished is kept, run the same command to go on"
    assert errors.count("interrupted") == 1
    assert "Traceback" not in errors
    assert all_end(running.pid, 5)


def kill(place: Place, moments: tuple[tuple[str, float], ...], *command: str) -> None:
    """Start the command again and again, and kill it at each moment; no worker outlives it for long.  What one leaves the next goes on
    from; after one that ended before its moment the store is emptied, since nothing would be left to interrupt."""
    killed = 0
    for text, seconds in moments:
        shutil.rmtree(place.work / "out", ignore_errors=True)
        running = place.start("compile", *command)
        wait_for(place, text, running)
        time.sleep(seconds)
        running.kill()
        if running.wait(timeout=30) == -signal.SIGKILL:
            killed += 1
        else:
            shutil.rmtree(place.store)
        assert all_end(running.pid, 20), "workers outlive the command"
    assert killed >= len(moments) // 2


def test_after_a_kill_at_any_moment_the_next_run_gives_the_same_bundle(place: Place, whole: Place, small_config: str) -> None:
    kill(place, (("capture decode", 0.1), ("passes", 0.1), ("kernels", 0.02)), small_config, *CPU_JOB)
    place.compile(small_config, *CPU_JOB)
    assert bundles(place) == {"qwen3-32x4-cpu": bundles(whole)["qwen3-32x4-cpu"]}
    assert not list((place.store / "v1" / "tmp").iterdir())


@pytest.mark.full
def test_after_many_kills_the_next_run_gives_the_same_bundles(place: Place, whole: Place, small_config: str) -> None:
    moments = [(text, k / 20) for text in ("capture decode", "passes", "kernels", "bundle") for k in range(6)]
    kill(place, (("", 0.5), *moments), small_config, *BOTH_JOB)
    place.compile(small_config, *BOTH_JOB)
    assert bundles(place) == bundles(whole)


# -- a store that cannot be used -----------------------------------------------------------------------------------------
def test_a_file_in_place_of_the_store(place: Place, small_config: str) -> None:
    place.store.write_text("mine")
    error = place.run("compile", small_config, "--target", "cpu").error()
    assert str(place.store) in error
    assert "FLAGTREE_CACHE_DIR" in error
    assert place.store.read_text() == "mine"


def mounted(options: str, at: Path) -> bool:
    at.mkdir(parents=True, exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], capture_output=True).returncode == 0


@pytest.mark.parametrize("options", ["size=64k", pytest.param("size=300k", marks=pytest.mark.full)])
def test_a_full_store(place: Place, small_config: str, options: str) -> None:
    if shutil.which("mount") is None or not mounted(options, place.store):
        pytest.skip("this user may not mount a small file system")
    try:
        error = place.run("compile", small_config, "--target", "cpu", "--part", "decode").error()
        assert "No space left" in error
        assert "free some space" in error
    finally:
        subprocess.run(["umount", str(place.store)], check=True)


def test_a_read_only_store_serves_what_it_has_and_refuses_the_rest(place: Place, small_config: str) -> None:
    (built,) = place.compile(small_config, "--target", "cpu", "--part", "decode")
    if subprocess.run(["mount", "--bind", "-o", "ro", str(place.store), str(place.store)], capture_output=True).returncode:
        pytest.skip("this user may not mount a folder read-only")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place.store)], check=True)
        (again,) = place.compile(small_config, "--target", "cpu", "--part", "decode", "--out", "out")
        assert again["cached"] is True
        started = time.monotonic()
        error = place.run("compile", small_config, "--target", "cpu", "--part", "prefill").error()
        assert time.monotonic() - started < 20, "it must be said before the work is done"
        assert "FLAGTREE_CACHE_DIR" in error
    finally:
        subprocess.run(["umount", str(place.store)], check=True)
    assert content(Path(built["path"])) == content(Path(again["path"]) if Path(again["path"]).is_absolute() else place.work / again["path"])


def test_what_stands_in_the_way_of_out_is_kept(place: Place, small_config: str) -> None:
    (built,) = place.compile(small_config, "--target", "cpu", "--part", "decode")
    theirs = place.work / "out" / Path(built["path"]).name / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    error = place.run("compile", small_config, "--target", "cpu", "--part", "decode", "--out", "out").error()
    assert "no bundle" in error
    assert theirs.read_text() == "years of work"


@pytest.mark.parametrize("harm", ["cut", "edited", "manifest gone", "a file", "report cut"])
def test_a_damaged_store_builds_again(whole: Place, tmp_path: Path, small_config: str, harm: str) -> None:
    shutil.copytree(whole.store, tmp_path / "store")
    (home,) = (tmp_path / "store").glob("bundles/*/qwen3-32x4-cpu")
    launch = home / "launch" / "decode.json"
    match harm:
        case "cut":
            launch.write_bytes(launch.read_bytes()[:-10])
        case "edited":
            launch.write_bytes(launch.read_bytes().replace(b"decode", b"encode"))
        case "manifest gone":
            (home / "manifest.json").unlink()
        case "a file":
            shutil.rmtree(home)
            home.write_text("no folder")
        case "report cut":
            for entry in (tmp_path / "store").glob("v1/bundle/*/*/report.json"):
                entry.write_bytes(b"{")
    with settings.override(cache_dir=tmp_path / "store", on_error="extern"):  # as the command that built it
        cached = [compile_model(small_config, ["cpu"], parts=["decode"]).bundles[0].cached for _ in range(2)]
    assert cached == [False, True]
    assert content(home) == bundles(whole)["qwen3-32x4-cpu"]


# -- wrong names and foreign bundles -------------------------------------------------------------------------------------
def test_wrong_names_list_the_closest(place: Place) -> None:
    assert "qwen3" in place.run("compile", "qwen33", "--target", "cpu").error()
    assert "metax" in place.run("compile", "qwen3", "--target", "metaxx").error()
    assert "cuda:sm90" in place.run("compile", "qwen3", "--target", "cuda:sm99").error()
    assert not list(place.store.glob("*"))


def test_without_a_compiler_the_error_says_what_was_looked_for(place: Place, small_config: str) -> None:
    error = place.run("compile", small_config, "--target", "cpu", "--part", "decode", FLAGTREE_CXX="/nonexistent/c++").error()
    assert "/nonexistent/c++" in error
    assert "try: " in error


def load(place: Place, bundle: Path, *, store: Path | None = None, trust: str | None = None) -> str:
    """`flagtree.load` as a user of that place: "" when it works, else what its error says."""
    with settings.override(cache_dir=store or place.store):
        try:
            loaded = flagtree.load(bundle, trust=trust)
        except FlagtreeError as error:
            return error.render()
    assert loaded.parts
    return ""


@pytest.fixture
def copy(whole: Place, tmp_path: Path) -> Path:
    """A copy of the cpu bundle to do harm to."""
    return Path(shutil.copytree(whole.work / "out" / "qwen3-32x4-cpu", tmp_path / "kopie ä"))


def test_a_good_bundle_loads(whole: Place, copy: Path) -> None:
    assert load(whole, copy) == ""


def damage(bundle: Path, harm: str) -> None:
    (library, *_) = sorted((bundle / "lib").iterdir())
    manifest = json.loads((bundle / "manifest.json").read_text())
    match harm:
        case "a file cut":
            library.write_bytes(library.read_bytes()[:1000])
        case "a file edited":
            data = bytearray(library.read_bytes())
            data[len(data) // 2] ^= 1
            for path in (bundle / "lib").iterdir():  # each level, so that the one that this CPU takes is among them
                path.write_bytes(bytes(data) if path == library else path.read_bytes()[:-1] + b"\1")
        case "a file gone":
            library.unlink()
        case "a file added":
            (bundle / "lib" / "more.so").write_bytes(b"code")
        case "a launch list edited":
            path = bundle / "launch" / "decode.json"
            path.write_bytes(path.read_bytes().replace(b"aten.linear", b"aten.lineal"))
        case "the manifest cut":
            (bundle / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes()[:-40])
        case "the manifest empty":
            (bundle / "manifest.json").write_bytes(b"")
        case "another version":
            (bundle / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
        case "no bundle":
            shutil.rmtree(bundle)


HARMS = ("a file cut", "a file edited", "a file gone", "a file added", "a launch list edited", "the manifest cut", "the manifest empty",
         "another version", "no bundle")  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_bundle_is_refused(whole: Place, copy: Path, harm: str) -> None:
    """By `inspect`, and by `load` even when its digest is named."""
    digest = whole.run("inspect", str(copy), "--json").out
    damage(copy, harm)
    error = whole.run("inspect", str(copy)).error()
    assert str(copy) in error
    assert load(whole, copy, trust=json.loads(digest)["digest"])


def test_a_bundle_for_another_target_is_refused(whole: Place) -> None:
    error = load(whole, whole.work / "out" / "qwen3-32x4-cuda-sm90")
    assert "cuda:sm90" in error
    assert "flagtree targets" in error


def test_an_untrusted_bundle_is_shown_but_not_run(whole: Place, copy: Path, place: Place) -> None:
    digest = json.loads(whole.run("inspect", str(copy), "--json").out)["digest"]
    shown = place.run("inspect", str(copy))
    assert shown.code == 0
    assert "running it needs its digest named" in shown.out.replace("\n", " ")
    assert f"trust='{digest}'" in load(place, copy)
    assert load(place, copy, trust=digest) == ""
    assert "not the one that you trust" in load(place, copy, trust="0" * 64)


def test_inspect_maps_none_of_the_bundles_code(whole: Place, copy: Path) -> None:
    """Under an audit hook that ends the process at the first library that is opened from the bundle, or by any new process."""
    program = (
        "import sys, os\n"
        "def watch(event, arguments):\n"
        "    if event in ('subprocess.Popen', 'os.exec', 'os.fork', 'os.posix_spawn', 'exec.bundle') or (\n"
        "            event == 'ctypes.dlopen' and arguments[0] and ('.so' in str(arguments[0]) and sys.argv[2] in str(arguments[0])\n"
        "            or 'memfd' in str(arguments[0]) or '/proc/' in str(arguments[0]))):\n"
        "        sys.stderr.write(f'{event} {arguments}'); sys.stderr.flush(); os._exit(9)\n"
        "sys.addaudithook(watch)\n"
        "sys.argv[0] = 'flagtree'\n"
        "from flagtree.cli.app import main\nmain()\n"
    )
    run = subprocess.run([sys.executable, "-c", program, "inspect", str(copy)], env=whole.environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "399" not in run.stdout
    assert "47 by name" in run.stdout


# -- odd paths -----------------------------------------------------------------------------------------------------------
def test_blanks_and_other_alphabets_in_every_path(new_place: Callable[[str], Place], whole: Place, small_config: str) -> None:
    plain = new_place("odd")
    place = Place(plain.folder / "größe 1 – 模型 'q' $HOME", plain.repository)
    place.folder.mkdir()
    job = (small_config, "--target", "cpu", "--part", "decode", "--out", "aus gang/日本")
    (built,) = place.compile(*job, FLAGTREE_CACHE_DIR=str(place.folder / "кэш 2"))
    path = place.work / built["path"]
    assert content(path) == bundles(whole)["qwen3-32x4-cpu"]
    assert place.run("inspect", str(path)).code == 0
    assert load(place, path, store=place.folder / "кэш 2") == ""
