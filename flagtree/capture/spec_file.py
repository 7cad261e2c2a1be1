"""Model descriptions as files: YAML and JSON in, plain data and the line of every field out.

Invariant: a file is hostile until read: size and depth are bounded, anchors, tags and duplicate fields are refused, nothing is executed.
First step of `capture/model_spec.py`; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flagtree.errors import CaptureError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 20_000  # scalars and collections of one file; what ships has a few hundred

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class SpecFile:
    """`data` as read; `lines` maps the path of each field to its line, counted from 1 (empty for JSON); `base`: the file under it."""

    path: Path
    data: dict[str, Any]
    lines: dict[FieldPath, int]
    base: SpecFile | None = None

    def where(self, field: FieldPath = ()) -> str:
        """`file:line` of a field, or of the nearest field around it; of the file that states it where one extends another."""
        for end in range(len(field), 0, -1):
            file: SpecFile | None = self
            while file is not None:
                if field[:end] in file.lines:
                    return f"{file.path}:{file.lines[field[:end]]}"
                file = file.base
        return str(self.path)

    def over(self, base: SpecFile, drop: tuple[str, ...]) -> SpecFile:
        """This file's fields over those of `base` less `drop`; mappings are merged field by field, anything else is replaced."""
        under = {name: value for name, value in base.data.items() if name not in drop}
        own = {name: value for name, value in self.data.items() if name != "extends"}
        return SpecFile(self.path, _merged(under, own), self.lines, base)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(under)
    for name, value in over.items():
        known = out.get(name)
        out[name] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return out


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
        data = json.loads(text, object_pairs_hook=lambda pairs: _object(path, pairs))
    except json.JSONDecodeError as error:
        raise CaptureError("the model description is not JSON", where=f"{path}:{error.lineno}", why=error.msg) from error
    except RecursionError as error:
        raise CaptureError("the model description is nested too deeply", where=str(path)) from error
    except ValueError as error:  # a number of thousands of digits
        raise CaptureError("the model description is not JSON", where=str(path), why=str(error)) from error
    return _checked(SpecFile(path, data, {}))


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise CaptureError(f"the field '{name}' is given twice", where=str(path))
        found[name] = value
    return found


def _read_yaml(path: Path, text: str) -> SpecFile:
    try:
        _check_events(path, text)
        root = yaml.compose(text, Loader=_Loader)
        lines: dict[FieldPath, int] = {}
        if root is not None:
            _collect_lines(path, root, (), lines)
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CaptureError("the model description is not YAML", where=f"{path}{line}", why=error.problem or str(error)) from error
    except (yaml.YAMLError, ValueError) as error:  # the latter for a number of thousands of digits
        raise CaptureError("the model description is not YAML", where=str(path), why=str(error)) from error
    return _checked(SpecFile(path, data, lines))


def _checked(file: SpecFile) -> SpecFile:
    """Only what JSON can say: a key of the store is made of it."""
    if not isinstance(file.data, dict):
        raise CaptureError("the model description is not a mapping of fields", where=str(file.path))
    stack: list[tuple[FieldPath, Any]] = [((), file.data)]
    while stack:
        at, value = stack.pop()
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise CaptureError(f"a field's name is no text: {name!r}", where=file.where((*at, str(name))))
            stack += [((*at, name), item) for name, item in value.items()]
        elif isinstance(value, list):
            stack += [((*at, i), item) for i, item in enumerate(value)]
        elif not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
            name = ".".join(map(str, at))
            raise CaptureError(f"'{name}' is neither text, number, truth value nor null", where=file.where(at), why=f"it is {value!r}")
    return file


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2's numbers: `1e-06`, which YAML 1.1 takes for text.  libyaml's parser where PyYAML has it: ten times as fast."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789"))


def _check_events(path: Path, text: str) -> None:
    """Refuse what could blow up later or mean something else than it says: anchors, tags, deep nesting, a flood of fields."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if getattr(event, "anchor", None) is not None:
            raise CaptureError("anchors are not allowed in a model description", where=f"{path}:{_line(event)}")
        if (tag := getattr(event, "tag", None)) is not None:
            raise CaptureError("tags are not allowed in a model description", where=f"{path}:{_line(event)}", why=f"it is {tag}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise CaptureError("the model description is nested too deeply", where=f"{path}:{_line(event)}")
        if count > MAX_NODES:
            raise CaptureError("the model description has too many fields", where=f"{path}:{_line(event)}", why=f"more than {MAX_NODES}")


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
