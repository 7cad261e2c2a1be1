"""Recorded graphs: what a server met and no bundle had, as text of ours, to be built on any machine.

A file holds one JSON object a line, a graph each: its canonical text, its program in the IR's text form, and what made it.  No
weights and no code; hostile until read here, and the program until `ir/parse.py` and `ir/verify.py` have passed it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flagtree.artifact.files import canonical_json, parse_json, read_file, sha256, writing
from flagtree.errors import BundleError

LEAST_PROMISE = 8192  # sizes that every recording covers: the widest step of usual servers
_Text = Annotated[str, Field(max_length=16 << 20)]
_Word = Annotated[str, Field(max_length=1000)]
_Result = tuple[Literal["buffer"], int] | tuple[Literal["index"], object] | tuple[Literal["value"], bool | int | float | str | None]


class RecordedGraph(BaseModel):
    """`key`: the capture key, the hash of `text`.  `program`: IR text, as lowered.  `results`: what the graph returns, in order:
    ("buffer", position among the program's outputs), ("index", expression) or ("value", a plain value).

    Where equal layers were taken out of the program, `layers` has the names of what each inner layer takes, in corresponding order, the
    first two of them still in the program, and `arguments` the names of everything that the graph takes, in order.

    `versions`: of what made the graph; `facts`: what is known of the model and the server (class, parallel degree, element type), for
    messages and checks; "predicted" among them where no server met the graph."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    key: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    text: _Text
    program: _Text
    results: list[_Result]
    layers: list[list[_Word]] = []
    arguments: list[_Word] = []
    versions: dict[_Word, _Word]
    facts: dict[_Word, _Word]

    @property
    def name(self) -> str:
        """What the part of a bundle is called."""
        return part_name(self.key)


def part_name(key: str) -> str:
    """The part of a bundle that holds the graph with this capture key."""
    return f"graph-{key[:16]}"


def append_recorded(path: Path, graph: RecordedGraph) -> None:
    """Add a graph to the file, which is made when it is not there.  Several processes may write at once.  StoreError."""
    line = canonical_json(graph.model_dump(mode="json"))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            view = memoryview(line)  # one write for all but huge graphs, so that lines of two processes do not mix
            while view:
                view = view[os.write(handle, view) :]
        finally:
            os.close(handle)


def read_recorded(path: Path) -> list[RecordedGraph]:
    """The graphs of a file, each key once, in order.  BundleError for a file that this flagtree did not write."""
    found: dict[str, RecordedGraph] = {}
    for number, line in enumerate(read_file(path).splitlines(), 1):
        where = f"{path}:{number}"
        record = parse_json(line, "a recorded graph", where)
        try:
            graph = RecordedGraph.model_validate(record)
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            what = ".".join(str(x) for x in first["loc"])
            raise BundleError("not a recorded graph", where=where, why=f"{what}: {first['msg']}", hint="record it again") from None
        if sha256(graph.text.encode()) != graph.key:
            raise BundleError("a recorded graph was edited", where=where, why="its text does not have its key", hint="record it again")
        found.setdefault(graph.key, graph)
    if not found:
        raise BundleError("no graph is recorded in the file", where=str(path))
    return list(found.values())
