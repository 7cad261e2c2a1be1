"""Model descriptions as files: YAML and JSON in, plain data and the line of every field out.

Invariant: a file is hostile until read: size and depth are bounded, anchors, tags and duplicate fields are refused, nothing is executed.
First step of `capture/model_spec.py`; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flagtree.errors import CaptureError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class SpecFile:
    """`data` as read; `lines` maps the path of each field to its line, counted from 1 (empty for JSON)."""

    path: Path
    data: dict[str, Any]
    lines: dict[FieldPath, int]

    def where(self, field: FieldPath = ()) -> str:
        """`file:line` of a field, or of the nearest field around it."""
        for end in range(len(field), 0, -1):
            if field[:end] in self.lines:
                return f"{self.path}:{self.lines[field[:end]]}"
        return str(self.path)


def read_spec_file(path: Path) -> SpecFile:
    """Read a `.json` file as JSON, anything else as YAML.  CaptureError when it cannot be read, is too large or is not a mapping."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CaptureError("the model description cannot be read", where=str(path), why=error.strerror or str(error)) from error
    if len(raw) > MAX_BYTES:
        raise CaptureError("the model description is too large", where=str(path), why=f"more than {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CaptureError("the model description is not UTF-8 text", where=str(path), why=str(error)) from error
    return _read_json(path, text) if path.suffix == ".json" else _read_yaml(path, text)


def _read_json(path: Path, text: str) -> SpecFile:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise CaptureError("the model description is not JSON", where=f"{path}:{error.lineno}", why=error.msg) from error
    except RecursionError as error:
        raise CaptureError("the model description is nested too deeply", where=str(path)) from error
    if not isinstance(data, dict):
        raise CaptureError("the model description is not a mapping of fields", where=str(path))
    return SpecFile(path, data, {})


def _read_yaml(path: Path, text: str) -> SpecFile:
    try:
        _check_events(path, text)
        root = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CaptureError("the model description is not YAML", where=f"{path}{line}", why=error.problem or str(error)) from error
    except yaml.YAMLError as error:
        raise CaptureError("the model description is not YAML", where=str(path), why=str(error)) from error
    if root is None or not isinstance(data, dict):
        raise CaptureError("the model description is not a mapping of fields", where=str(path))
    lines: dict[FieldPath, int] = {}
    _collect_lines(path, root, (), lines)
    return SpecFile(path, data, lines)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: `1e-06`, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789"))


def _check_events(path: Path, text: str) -> None:
    """Refuse what could blow up later: references to anchors (exponential expansion) and deep nesting (recursion)."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise CaptureError("anchors are not allowed in a model description", where=f"{path}:{_line(event)}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise CaptureError("the model description is nested too deeply", where=f"{path}:{_line(event)}")


def _line(event: yaml.Event) -> int:
    """1-based; the pure-Python and the C parser both set the mark, whatever the stubs say."""
    return event.start_mark.line + 1 if event.start_mark is not None else 0


def _collect_lines(path: Path, node: yaml.Node, at: FieldPath, lines: dict[FieldPath, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            field = (*at, str(key.value))
            line = key.start_mark.line + 1
            if field in lines:
                raise CaptureError(f"the field '{key.value}' is given twice", where=f"{path}:{line}", why=f"first in line {lines[field]}")
            lines[field] = line
            _collect_lines(path, value, field, lines)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            lines[(*at, position)] = value.start_mark.line + 1
            _collect_lines(path, value, (*at, position), lines)
