"""Bundles: equal bytes wherever they are built, every kind of damage refused with one error, nothing lost on a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flagtree.artifact import container
from flagtree.artifact.bundle import inspect, open_bundle, write_bundle, write_certificate
from flagtree.errors import BundleError, StoreError

Write = Callable[..., str]
FORMS = ["toy", "toy.ftb"]
DIGEST = "0123456789abcdef" * 4


def tree(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# -- what is written -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(write: Write, tmp_path: Path, form: str) -> None:
    import torch

    path = tmp_path / "größe mit blank" / form
    digest = write(path)
    bundle = open_bundle(path)
    bundle.verify()
    assert bundle.digest == digest
    assert bundle.library("x86-64-v3") == b"three"
    assert bundle.part("decode")["name"] == "decode"
    assert torch.equal(bundle.constants()["rope"], torch.arange(6.0).reshape(2, 3))
    assert bundle.constants()["b"].dtype is torch.bfloat16
    certificate = bundle.certificate()
    assert certificate is not None
    assert certificate.evidence["kernels"] == {DIGEST: {"error": 1e-7}}
    assert os.listdir(path.parent) == [form]
    with pytest.raises(BundleError, match="no part"):
        bundle.part("train")


def test_the_digest_is_the_hash_of_the_manifest_and_that_holds_every_other(write: Write, tmp_path: Path) -> None:
    digest = write(tmp_path / "toy")
    files = tree(tmp_path / "toy")
    assert hashlib.sha256(files["manifest.json"]).hexdigest() == digest
    manifest = json.loads(files["manifest.json"])
    del files["manifest.json"], files["certificate.json"]
    assert {n: f["sha256"] for n, f in manifest["files"].items()} == {n: hashlib.sha256(d).hexdigest() for n, d in files.items()}


@pytest.mark.parametrize("form", FORMS)
def test_equal_bytes_from_another_folder_home_and_time(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    one, other = tmp_path / "a" / form, tmp_path / "somewhere else" / form
    digest = write(one)
    monkeypatch.setenv("HOME", str(tmp_path / "other home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    umask = os.umask(0o077)
    try:
        assert write(other) == digest
    finally:
        os.umask(umask)
    assert tree(one) == tree(other)


def test_both_forms_have_one_digest(write: Write, tmp_path: Path) -> None:
    assert write(tmp_path / "toy") == write(tmp_path / "toy.ftb")
    with zipfile.ZipFile(tmp_path / "toy.ftb") as archive:
        assert {(i.date_time, i.create_system, i.external_attr) for i in archive.infolist()} == {((1980, 1, 1, 0, 0, 0), 3, 0o100644 << 16)}
    assert len({write(tmp_path / "x", libraries={"x86-64-v3": data}) for data in (b"1", b"2")}) == 2


def test_a_bundle_moves(write: Write, tmp_path: Path) -> None:
    digest = write(tmp_path / "toy")
    shutil.move(tmp_path / "toy", tmp_path / "neuer Ort")
    bundle = open_bundle(tmp_path / "neuer Ort")
    bundle.verify()
    assert bundle.digest == digest


def test_inspect_tells_everything_without_running_code(write: Write, tmp_path: Path) -> None:
    digest = write(tmp_path / "toy")
    facts = inspect(open_bundle(tmp_path / "toy"))
    assert (facts["digest"], facts["name"], facts["target"], facts["tiers"]) == (digest, "toy", "cpu", {"binary": 1})
    part = facts["parts"]["prefill"]
    assert part["launches"] == 1
    assert part["weights"] == 1
    assert part["externs"] == [{"callee": "aten.linear.default", "reason": "gemm", "count": 1}]
    assert facts["kernels"][DIGEST]["facts"] == {"bytes": 68}


# -- damage ----------------------------------------------------------------------------------------------------------
def edit(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change one file of either form without updating the manifest."""
    if path.is_dir():
        (path / name).write_bytes(change((path / name).read_bytes()))
        return
    with zipfile.ZipFile(path) as archive:
        content = {n: archive.read(n) for n in archive.namelist()}
    content[name] = change(content[name])
    path.write_bytes(container.archive_bytes(content))


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["cut", "flipped", "longer", "empty"])
@pytest.mark.parametrize(
    "name", ["lib/x86-64-v3.so", "kernels/0123456789abcdef/kernel.cpp", "launch/prefill.json", "constants.safetensors"]
)
def test_an_edited_file_is_refused(write: Write, tmp_path: Path, form: str, how: str, name: str) -> None:
    path = tmp_path / form
    write(path)
    edit(path, name, {"cut": lambda d: d[:-1], "flipped": flip, "longer": lambda d: d + b"x", "empty": lambda d: b""}[how])
    with pytest.raises(BundleError, match="damaged or was edited") as caught:
        open_bundle(path).verify()
    assert name in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 2


def manifest_edit(path: Path, change: Callable[[dict], object]) -> None:
    def apply(data: bytes) -> bytes:
        manifest = json.loads(data)
        change(manifest)
        return json.dumps(manifest).encode()

    edit(path, "manifest.json", apply)


BAD_MANIFESTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "newer": (lambda m: m.update(format=2), "newer flagtree"),
    "older": (lambda m: m.update(format=0), "older flagtree"),
    "format true": (lambda m: m.update(format=True), "not valid"),
    "no format": (lambda m: m.pop("format"), "not valid"),
    "unknown field": (lambda m: m.update(run="rm"), "not valid"),
    "a name outside": (lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "size": 1}}), "not allowed|not valid"),
    "an absolute name": (lambda m: m["files"].update({"/etc/passwd": {"sha256": "0" * 64, "size": 1}}), "not allowed|not valid"),
    "a huge size": (lambda m: m["files"]["lib/x86-64-v3.so"].update(size=1 << 60), "not valid"),
    "a negative size": (lambda m: m["files"]["lib/x86-64-v3.so"].update(size=-1), "not valid"),
    "a large size": (lambda m: m["files"]["lib/x86-64-v3.so"].update(size=1 << 31), "bytes instead of"),
    "a bad hash": (lambda m: m["files"]["lib/x86-64-v3.so"].update(sha256="XYZ"), "not valid"),
    "an unlisted part": (lambda m: m["parts"].append("train"), "does not list"),
    "a part outside": (lambda m: m["parts"].append("../../x"), "not valid"),
    "an unknown tier": (lambda m: m["kernels"][DIGEST].update(tier="gold"), "not valid"),
    "a missing file": (lambda m: m["files"].update({"lib/x86-64-v9.so": {"sha256": "0" * 64, "size": 1}}), "is missing"),
    "an unlisted file": (lambda m: (m["files"].pop("lib/x86-64-v3.so"), m["libraries"].remove("x86-64-v3")), "not in the manifest"),
    "itself listed": (lambda m: m["files"].update({"certificate.json": {"sha256": "0" * 64, "size": 1}}), "it lists"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_hostile_manifest_is_refused(write: Write, tmp_path: Path, form: str, case: str) -> None:
    change, message = BAD_MANIFESTS[case]
    path = tmp_path / form
    write(path)
    manifest_edit(path, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 200_000])
def test_a_manifest_that_is_no_object(write: Write, tmp_path: Path, data: bytes) -> None:
    write(tmp_path / "toy")
    edit(tmp_path / "toy", "manifest.json", lambda _: data)
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "toy")


def test_files_that_do_not_belong(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "toy"
    cases: dict[str, Callable[[], object]] = {
        "not in the manifest": lambda: (path / "lib" / "extra.so").write_bytes(b"x"),
        "link": lambda: ((path / "lib" / "x86-64-v2.so").unlink(), (path / "lib" / "x86-64-v2.so").symlink_to("/etc/passwd")),
        "link stands": lambda: (shutil.move(path / "lib", tmp_path / "lib"), (path / "lib").symlink_to(tmp_path / "lib")),
        "not allowed": lambda: (path / "a b").write_bytes(b"x"),
        "regular file": lambda: os.mkfifo(path / "pipe"),
        "no manifest": lambda: (path / "manifest.json").unlink(),
        "is missing": lambda: (path / "lib" / "x86-64-v3.so").unlink(),
    }
    for message, spoil in cases.items():
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(tmp_path / "lib", ignore_errors=True)
        write(path)
        spoil()
        with pytest.raises(BundleError, match=message):
            open_bundle(path)


def test_hostile_archives(write: Write, tmp_path: Path) -> None:
    good = tmp_path / "good.ftb"
    write(good)
    bad = tmp_path / "bad.ftb"
    data = good.read_bytes()
    for broken in (b"", data[:100], data[:-30], data[50:], b"PK" + bytes(200)):
        bad.write_bytes(broken)
        with pytest.raises(BundleError):
            open_bundle(bad).verify()
    for kind in ("compressed", "outside", "twice"):
        with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED) as archive:
            archive.writestr("../x" if kind == "outside" else "manifest.json", b"{}" * 999)
            if kind == "twice":
                with pytest.warns(UserWarning, match="Duplicate"):
                    archive.writestr("manifest.json", b"{}")
        with pytest.raises(BundleError, match=r"plain bytes|not allowed|stands twice"):
            open_bundle(bad)


@pytest.mark.parametrize("seed", range(60))
def test_no_single_flipped_bit_of_the_file_form_goes_unnoticed(write: Write, tmp_path: Path, seed: int) -> None:
    import random

    path = tmp_path / "toy.ftb"
    digest = write(path)
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(data))
    data[place] ^= 1 << (seed % 8)
    path.write_bytes(bytes(data))
    try:
        bundle = open_bundle(path)
        bundle.verify()
    except BundleError:
        return
    assert bundle.digest == digest  # only a byte that the zip format itself ignores, such as a time, may differ


def test_no_bundle_at_all(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path / "absent.ftb", tmp_path, Path("/dev/null")):
        with pytest.raises(BundleError):
            open_bundle(path)


# -- the certificate -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_a_certificate_may_be_missing_or_written_anew_but_not_edited(write: Write, tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    digest = write(path, certificate=None)
    assert open_bundle(path).certificate() is None
    write_certificate(path, {"checked": "twice"})
    bundle = open_bundle(path)
    certificate = bundle.certificate()
    assert certificate is not None
    assert certificate.evidence == {"checked": "twice"}
    assert bundle.digest == digest
    edit(path, "certificate.json", lambda d: d.replace(b"twice", b"thrice"))
    with pytest.raises(BundleError, match="certificate was edited"):
        open_bundle(path).verify()
    write_certificate(path, {"checked": "again"})
    open_bundle(path).verify()


def test_a_certificate_of_another_bundle_is_refused(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two", name="two")
    shutil.copy(tmp_path / "one" / "certificate.json", tmp_path / "two" / "certificate.json")
    with pytest.raises(BundleError, match="another bundle"):
        open_bundle(tmp_path / "two").certificate()


def test_building_again_without_evidence_keeps_the_certificate(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "toy")
    write(tmp_path / "toy", certificate=None)
    assert open_bundle(tmp_path / "toy").certificate() is not None


# -- replacing, killing, full disks ----------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_is_replaced_and_anything_else_is_not(write: Write, tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    one, two = write(path), write(path, name="two")
    assert one != two
    assert open_bundle(path).digest == two
    assert os.listdir(tmp_path) == [form]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if form == "toy":
        path.mkdir()
        assert write(path) == one  # an empty folder is a good place
        shutil.rmtree(path)
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    else:
        path.write_text("mine")
    before = tree(path)
    with pytest.raises(BundleError, match="no bundle stands"):
        write(path)
    assert tree(path) == before


@pytest.mark.parametrize(("form", "call"), [("toy", "fsync"), ("toy", "rename"), ("toy.ftb", "fsync"), ("toy.ftb", "replace")])
def test_a_full_disk_keeps_the_old_bundle(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, call: str) -> None:
    path = tmp_path / form
    digest = write(path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if call == "rename":
        monkeypatch.setattr(container, "exchange", full)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreError, match="free some space"):
        write(path, name="two")
    monkeypatch.undo()
    bundle = open_bundle(path)
    bundle.verify()
    assert bundle.digest == digest
    assert os.listdir(tmp_path) == [form]


def test_a_file_in_place_of_the_parent_folder(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match="stands where a folder should") as caught:
        write(tmp_path / "out" / "toy")
    assert "--out" in caught.value.hint


def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    container.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").is_file()
    assert (tmp_path / "b" / "a").is_file()
    with pytest.raises(OSError, match="No such file"):
        container.exchange(tmp_path / "a", tmp_path / "absent")


WRITER = """
import sys, time
from pathlib import Path
from typing import Any
from flagtree.artifact import files
from flagtree.artifact.bundle import write_bundle
path, stop = Path(sys.argv[1]), sys.argv[2]
write, count = files.write_new, 0
def slow(path, data, *, durable):
    global count
    count += 1
    if str(count) == stop:
        print("writing", flush=True)
        time.sleep(60)
    write(path, data, durable=durable)
files.write_new = slow
write_bundle(path, name="two", target="cpu", parts={}, kernels=[], libraries={f"l{i}": bytes(10000) for i in range(8)})
print("done", flush=True)
"""


def start(repository: Path, path: Path, stop: int) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(stop)], env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_writer_keeps_the_old_bundle_and_the_next_cleans_up(write: Write, repository: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    digest = write(path)
    writer = start(repository, path, 5 if form == "toy" else 1)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    assert len(os.listdir(tmp_path)) == 2
    assert write(path, libraries={}) != digest  # the living writer's folder is left alone
    assert len(os.listdir(tmp_path)) == 2
    write(path)
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    bundle = open_bundle(path)
    bundle.verify()
    assert bundle.digest == digest
    write(path, name="three")
    assert os.listdir(tmp_path) == [form]


def test_two_writers_of_one_path(repository: Path, tmp_path: Path) -> None:
    writers = [start(repository, tmp_path / "toy", 0) for _ in range(2)]
    assert [w.wait(60) for w in writers] == [0, 0]
    open_bundle(tmp_path / "toy").verify()
    assert os.listdir(tmp_path) == ["toy"]


@pytest.mark.parametrize("when", ["before it is open", "before it is locked"])
def test_a_swept_folder_is_made_again(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Between mkdir and lock nothing tells another writer that ours is alive."""
    opened, swept = os.open, []

    def opening(path: Any, *args: Any, **options: Any) -> int:
        first = str(path).endswith(".building") and not swept
        if first and when == "before it is open":
            swept.append(os.rmdir(path))
        handle = opened(path, *args, **options)
        if first and when == "before it is locked":
            swept.append(os.rmdir(path))
        return handle

    monkeypatch.setattr(os, "open", opening)
    write(tmp_path / "toy")
    assert swept
    open_bundle(tmp_path / "toy").verify()
    assert os.listdir(tmp_path) == ["toy"]


def test_what_open_would_refuse_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not allowed"):
        write_bundle(tmp_path / "toy", name="toy", target="cpu", parts={"../x": {}}, kernels=[])
    with pytest.raises(BundleError, match="not valid"):
        write_bundle(tmp_path / "toy", name="toy", target="a target", parts={}, kernels=[])
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize(
    "launch", [{"steps": [{}]}, {"steps": 7}, {"steps": [], "buffers": [{}]}, {"steps": [{"repeat": "x", "steps": [1]}]}]
)
def test_inspecting_a_launch_list_that_is_none(write: Write, tmp_path: Path, launch: dict) -> None:
    write(tmp_path / "toy", parts={"prefill": launch})
    with pytest.raises(BundleError, match="launch list is not valid"):
        inspect(open_bundle(tmp_path / "toy"))
