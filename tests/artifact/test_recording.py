"""Recorded graphs as files: what is written comes back, and what is not ours is refused with the line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flagtree.artifact.files import sha256
from flagtree.artifact.recording import RecordedGraph, append_recorded, read_recorded
from flagtree.errors import BundleError, StoreError


def graph(text: str = "placeholder x\n") -> RecordedGraph:
    return RecordedGraph(
        key=sha256(text.encode()),
        text=text,
        program="program g\n  outputs\n",
        results=[("buffer", 0), ("index", ["*", 2, "s0"]), ("value", None), ("value", 1.5)],
        versions={"torch": "2.13.0"},
        facts={"model": "Decoder"},
    )


def test_what_is_written_comes_back_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "graphs.jsonl"
    for text in ("a\n", "b\n", "a\n"):
        append_recorded(path, graph(text))
    assert read_recorded(path) == [graph("a\n"), graph("b\n")]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format": 2}, "format"),
        ({"key": "0" * 64}, "edited"),
        ({"text": "other\n"}, "edited"),
        ({"weights": [1]}, "weights"),
        ({"results": [["code", "x"]]}, "results"),
        ({"program": 3}, "program"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(tmp_path: Path, change: dict, what: str) -> None:
    path = tmp_path / "graphs.jsonl"
    path.write_text(json.dumps(graph().model_dump(mode="json") | change) + "\n")
    with pytest.raises(BundleError, match=what) as raised:
        read_recorded(path)
    assert raised.value.where == f"{path}:1"


@pytest.mark.parametrize("text", ["", "{", "[1]\n", "\x80\x04\n"])
def test_a_file_that_is_no_recording(tmp_path: Path, text: str) -> None:
    path = tmp_path / "graphs.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(BundleError):
        read_recorded(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        append_recorded(tmp_path / "file" / "graphs.jsonl", graph())
