"""Canonical JSON, hostile names, hostile files, atomic writes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagtree.artifact import files
from flagtree.errors import BundleError, StoreError

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_canonical_json_reads_back_and_is_one_text_a_value(value: object) -> None:
    data = files.canonical_json(value)
    assert data.endswith(b"\n")
    assert files.parse_json(data, "x") == value
    assert files.canonical_json(json.loads(data)) == data


def test_canonical_json_ignores_order_and_refuses_nan() -> None:
    assert files.canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}\n'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        files.canonical_json([float("nan")])


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b'{"a":1,"a":2}', b"[NaN]", b"[1e", b"[" * 100_000, b"[" * 70 + b"]" * 70, b"1" * 6000],
    ids=["empty", "open", "not utf-8", "twice", "nan", "cut", "bomb", "deep", "huge number"],
)
def test_hostile_json_is_one_error(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        files.parse_json(data, "manifest.json")


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "a/../b", "a//b", "./a", "a/", "-x", "a b", "a\0b", "é", "a" * 300, "a/" * 9 + "a", ".x"]
)
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(BundleError, match="name is not allowed"):
        files.check_relative(name)


def test_plain_names_pass() -> None:
    for name in ("manifest.json", "kernels/0123abcd/x86-64-v3.o", "lib/x86-64-v4.so"):
        assert files.check_relative(name) == name


def test_reading_follows_no_link_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "plain").write_text("p")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    assert files.read_inside(root, "sub/plain") == b"p"
    for name in ("link", "folder/secret"):
        with pytest.raises(BundleError):
            files.read_inside(root, name)
    with pytest.raises(BundleError, match="not a regular file"):
        files.read_inside(root, "pipe")
    with pytest.raises(BundleError, match="not a regular file"):
        files.read_inside(root, "sub")
    with pytest.raises(BundleError, match="missing"):
        files.read_inside(root, "sub/absent")
    with pytest.raises(BundleError, match="larger"):
        files.read_inside(root, "sub/plain", 0)


def test_a_failed_write_leaves_the_old_bytes_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "größe mit blank"
    files.atomic_write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(StoreError, match="free some space") as caught:
                files.atomic_write(path, b"new")
        assert caught.value.exit_code == 2
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == [path.name]
    files.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_in_place_of_a_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="stands where a folder should"):
        files.atomic_write(tmp_path / "file" / "name", b"x")
