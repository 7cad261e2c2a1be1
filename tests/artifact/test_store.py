"""The store under faults: damage is a miss with a reason, a kill leaves nothing half, writers do not disturb each other."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagtree.artifact.store import Entry, Miss, Store
from flagtree.errors import StoreError

KEY = "ab" * 32
OTHER = "cd" * 32
FILES = {"a.json": b"{}\n", "deep/b.bin": bytes(range(256))}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "größe mit blank", ())


def test_what_is_put_is_got(store: Store) -> None:
    missing = store.get("kernel", KEY)
    assert isinstance(missing, Miss)
    assert not missing
    assert missing.reason == "not stored"
    put = store.put("kernel", KEY, FILES, {"factors": {"target": "cpu"}})
    got = store.get("kernel", KEY)
    assert isinstance(got, Entry)
    assert got == put
    assert dict(got.files) == FILES
    assert got.meta == {"factors": {"target": "cpu"}}
    assert not store.get("launch", KEY)


def test_the_store_moves_with_its_folder(store: Store, tmp_path: Path) -> None:
    store.put("kernel", KEY, FILES)
    shutil.move(tmp_path / "größe mit blank", tmp_path / "elsewhere")
    assert Store(tmp_path / "elsewhere", ()).get("kernel", KEY)


def _damage(path: Path, how: str) -> None:
    file = path / "deep" / "b.bin"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "bit flipped":
        data = bytearray(file.read_bytes())
        data[7] ^= 1
        file.write_bytes(bytes(data))
    elif how == "missing":
        file.unlink()
    elif how == "linked":
        file.unlink()
        file.symlink_to("/etc/hostname")
    elif how == "no manifest":
        (path / "entry.json").unlink()
    elif how == "empty manifest":
        (path / "entry.json").write_bytes(b"")
    elif how == "huge size":
        text = (path / "entry.json").read_text()
        (path / "entry.json").write_text(text.replace('"size":256', '"size":99999999999999'))
    elif how == "name outside":
        text = (path / "entry.json").read_text()
        (path / "entry.json").write_text(text.replace("deep/b.bin", "../../../b"))
    elif how == "other format":
        text = (path / "entry.json").read_text()
        (path / "entry.json").write_text(text.replace('"format":1', '"format":2'))
    elif how == "a file":
        shutil.rmtree(path)
        path.write_text("x")


DAMAGE = [
    "truncated",
    "bit flipped",
    "missing",
    "linked",
    "no manifest",
    "empty manifest",
    "huge size",
    "name outside",
    "other format",
    "a file",
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_a_reasoned_miss_and_is_replaced(store: Store, how: str) -> None:
    _damage(store.put("kernel", KEY, FILES).path, how)
    missing = store.get("kernel", KEY)
    assert isinstance(missing, Miss)
    assert missing.reason.startswith("damaged entry")
    store.put("kernel", KEY, FILES)
    assert store.get("kernel", KEY)
    assert not any((store.root / "tmp").iterdir())


def test_an_entry_copied_under_another_key_is_a_miss(store: Store) -> None:
    path = store.put("kernel", KEY, FILES).path
    other = store.root / "kernel" / OTHER[:2] / OTHER
    other.parent.mkdir()
    shutil.copytree(path, other)
    assert "another entry" in str(store.get("kernel", OTHER))


def test_layers_are_read_after_the_writable_store_and_never_written(tmp_path: Path) -> None:
    below = Store(tmp_path / "shared", ())
    below.put("kernel", KEY, FILES, {"from": "shared"})
    before = sorted(p for p in (tmp_path / "shared").rglob("*"))
    store = Store(tmp_path / "own", (tmp_path / "absent", tmp_path / "shared"))
    got = store.get("kernel", KEY)
    assert got
    assert got.meta == {"from": "shared"}
    store.put("kernel", KEY, FILES, {"from": "own"})
    got = store.get("kernel", KEY)
    assert got
    assert got.meta == {"from": "own"}
    _damage(got.path, "bit flipped")
    got = store.get("kernel", KEY)
    assert got
    assert got.meta == {"from": "shared"}
    assert sorted(p for p in (tmp_path / "shared").rglob("*")) == before


@pytest.mark.parametrize(("kind", "key"), [("../x", KEY), ("kernel", "../" + KEY), ("kernel", KEY[:-1]), ("tmp", KEY), ("Kernel", KEY)])
def test_only_kinds_and_keys_are_paths(store: Store, kind: str, key: str) -> None:
    with pytest.raises(StoreError, match="not a kind and key"):
        store.put(kind, key, FILES)
    with pytest.raises(StoreError, match="not a kind and key"):
        store.get(kind, key)


# -- a folder that cannot be written ---------------------------------------------------------------------------------
def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    store = Store(tmp_path / "cache", ())
    assert not store.writable()
    assert store.get("kernel", KEY) == Miss("not stored")
    with pytest.raises(StoreError, match="FLAGTREE_CACHE_DIR") as caught:
        store.put("kernel", KEY, FILES)
    assert caught.value.exit_code == 2
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_read_only_disk_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store.put("kernel", OTHER, FILES)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(StoreError) as caught:
            store.put("kernel", KEY, FILES)
    assert caught.value.hint
    assert store.get("kernel", OTHER)
    assert store.get("kernel", KEY) == Miss("not stored")
    assert not any((store.root / "tmp").iterdir())
    assert store.writable()


def test_a_full_disk_in_the_middle_of_a_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from flagtree.artifact import files

    write = files.write_new

    def full(path: Path, data: bytes, *, durable: bool) -> None:
        if path.name == "entry.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data, durable=durable)

    monkeypatch.setattr(files, "write_new", full)
    assert not store.writable()
    with pytest.raises(StoreError, match="free some space"):
        store.put("kernel", KEY, FILES)
    assert not any((store.root / "tmp").iterdir())


# -- several processes -----------------------------------------------------------------------------------------------
WRITER = """
import os, sys, time
from pathlib import Path
from flagtree.artifact import files
from flagtree.artifact.store import Store
root, mode = Path(sys.argv[1]), sys.argv[2]
store = Store(root, ())
if mode == "hang":
    write = files.write_new
    def slow(path, data, *, durable):
        write(path, data, durable=durable)
        print("writing", flush=True)
        time.sleep(60)
    files.write_new = slow
for i in range(20 if mode == "many" else 1):
    store.put("kernel", f"{i:064x}", {"a": bytes([i]) * 1000, "b": b"b"}, {"i": i})
print("done", flush=True)
"""


def _start(repository: Path, root: Path, mode: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(root), mode], env=env, stdout=subprocess.PIPE, text=True)


def test_two_writers_of_the_same_entries(repository: Path, tmp_path: Path) -> None:
    writers = [_start(repository, tmp_path, "many") for _ in range(2)]
    assert [w.wait(60) for w in writers] == [0, 0]
    store = Store(tmp_path, ())
    for i in range(20):
        entry = store.get("kernel", f"{i:064x}")
        assert entry
        assert entry.files["a"] == bytes([i]) * 1000
    assert store.usage()["kernel"].entries == 20
    assert not any((store.root / "tmp").iterdir())


def test_a_killed_writer_leaves_nothing_half_and_the_next_cleans_up(repository: Path, tmp_path: Path) -> None:
    writer = _start(repository, tmp_path, "hang")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    store = Store(tmp_path, ())
    assert list((store.root / "tmp").iterdir())
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    assert store.get("kernel", f"{0:064x}") == Miss("not stored")
    assert store.usage() == {}
    store.put("kernel", KEY, FILES)
    assert store.get("kernel", KEY)
    assert not any((store.root / "tmp").iterdir())


def test_a_killed_writer_at_any_moment(repository: Path, tmp_path: Path) -> None:
    for k in range(4):
        writer = _start(repository, tmp_path, "many")
        time.sleep(0.15 + 0.03 * k)
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
        store = Store(tmp_path, ())
        for i in range(20):
            found = store.get("kernel", f"{i:064x}")
            assert found or found == Miss("not stored")
    assert _start(repository, tmp_path, "many").wait(60) == 0
    assert Store(tmp_path, ()).usage()["kernel"].entries == 20


# -- housekeeping ----------------------------------------------------------------------------------------------------
def test_prune_deletes_what_was_used_longest_ago(store: Store) -> None:
    keys = [f"{i:064x}" for i in range(6)]
    for i, key in enumerate(keys):
        entry = store.put("kernel", key, {"a": bytes(1000)})
        os.utime(entry.path, (1000 + i, 1000 + i))
    store.put("built", KEY, {})
    assert store.get("kernel", keys[0])  # used just now
    usage = store.usage()
    assert usage["kernel"].entries == 6
    deleted = store.prune(usage["kernel"].bytes // 2)
    assert deleted.entries == 3
    assert [bool(store.get("kernel", k)) for k in keys] == [True, False, False, False, True, True]
    assert store.get("built", KEY)
    assert store.prune(0).entries == 3
    assert store.get("built", KEY)
    assert not any((store.root / "tmp").iterdir())


def test_stored_gives_the_factors_newest_first_and_skips_damage(store: Store) -> None:
    for i in range(3):
        entry = store.put("capture", f"{i:064x}", {"a": b"x"}, {"i": i})
        os.utime(entry.path, (1000 + i, 1000 + i))
    _damage(store.root / "capture" / "00" / f"{1:064x}", "empty manifest")
    assert [m["i"] for m in store.stored("capture")] == [2, 0]
    assert list(store.stored("kernel")) == []
