"""Lines of IR text: tokens with positions, nesting by indentation, and the error that says what was expected.

Text never goes through eval or sympy: this tokenizer and `parse_index` are all that reads it.
`ir/parse.py` turns the lines into a Program.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from flagtree.errors import IRError
from flagtree.ir.index import Index, parse_index

# words that stand for a literal or an absent output, so nothing may be named like them
RESERVED = frozenset(("true", "false", "none", "inf", "nan", "_"))
NAME = re.compile(r"[A-Za-z_][\w.]*")
T = TypeVar("T")
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>\d+(?:\.(?!\.)\d*)?(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_][\w.]*)'
    r"|(?P<mark>\.\.|//|[-+*%()\[\]{}<=,:])|(?P<comment>#.*)|(?P<end>$))"
)


@dataclass(slots=True)
class Line:
    """One statement: its tokens with a cursor, and the statements indented below it."""

    number: int
    text: str
    tokens: list[tuple[str, str, int]] = field(default_factory=list)  # kind, text, column
    children: list[Line] = field(default_factory=list)
    cursor: int = 0

    def fail(self, expected: str) -> NoReturn:
        _, found, column = self.tokens[self.cursor]
        raise IRError(
            f"cannot read the program: expected {expected}, found '{found or 'end of line'}'",
            where=f"line {self.number}, column {column + 1}: {self.text.strip()}",
        )

    def peek(self, *texts: str) -> bool:
        kind, text, _ = self.tokens[self.cursor]
        return kind != "string" and text in texts

    def accept(self, text: str) -> bool:
        found = self.peek(text)
        self.cursor += found
        return found

    def need(self, text: str) -> None:
        if not self.accept(text):
            self.fail(f"'{text}'")

    def take(self, kind: str, expected: str) -> str:
        if self.tokens[self.cursor][0] != kind:
            self.fail(expected)
        self.cursor += 1
        return self.tokens[self.cursor - 1][1]

    def name(self, expected: str) -> str:
        if self.peek(*RESERVED):
            self.fail(expected)
        return self.take("name", expected)

    def string(self) -> str:
        return json.loads(self.take("string", "a quoted string"))

    def integer(self, expected: str = "an integer") -> int:
        sign = -1 if self.accept("-") else 1
        digits = self.take("number", expected)
        if not digits.isdigit():
            self.cursor -= 1
            self.fail(expected)
        return sign * int(digits)

    def many(self, read: Callable[[], T], close: str = "") -> tuple[T, ...]:
        """Items between commas up to `close` (consumed), or to the end of the line."""
        out: list[T] = []
        while not (self.accept(close) if close else self.tokens[self.cursor][0] == "end"):
            if out:
                self.need(",")
            out.append(read())
        return tuple(out)

    def index(self) -> Index:
        """An index expression up to the delimiter that ends it."""
        start, depth = self.cursor, 0
        while not (self.tokens[self.cursor][0] in ("end", "string") or (depth == 0 and self.peek(",", ")", "]", "}"))):
            depth += self.peek("(") - self.peek(")")
            if self.tokens[self.cursor][0] == "mark" and not self.peek(*"+-*%()", "//"):
                break
            self.cursor += 1
        if start == self.cursor:
            self.fail("an index expression")
        return _cached_index(self.text[self.tokens[start][2] : self.tokens[self.cursor][2]].strip())

    def nested(self) -> list[Line]:
        """The statements indented below this one, handed out once: `done` refuses what nobody took."""
        lines, self.children = self.children, []
        return lines

    def done(self) -> None:
        if self.tokens[self.cursor][0] != "end":
            self.fail("end of line")
        if self.children:
            self.children[0].fail("nothing nested here")


_cached_index = functools.lru_cache(maxsize=65536)(parse_index)


def _tokenize(number: int, text: str) -> Line:
    line = Line(number, text)
    position = 0
    while True:
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            column = position + len(text[position:]) - len(text[position:].lstrip())
            where = f"line {number}, column {column + 1}: {text.strip()}"
            raise IRError(f"cannot read the program: unexpected '{text[column]}'", where=where)
        kind = match.lastgroup
        if kind in ("comment", "end"):
            line.tokens.append(("end", "", match.start(kind)))
            return line
        line.tokens.append((kind, match.group(kind), match.start(kind)))
        position = match.end()


def read_lines(text: str) -> Line:
    """The one top statement, the others nested by indentation."""
    root = Line(0, "", [("end", "", 0)])
    open_lines: list[tuple[int, Line]] = [(-1, root)]
    for number, raw in enumerate(text.split("\n"), 1):
        line = _tokenize(number, raw.rstrip("\r"))
        if len(line.tokens) == 1:
            continue
        indent = line.tokens[0][2]
        while open_lines[-1][0] >= indent:
            open_lines.pop()
        siblings = open_lines[-1][1].children
        if siblings and siblings[0].tokens[0][2] != indent:
            line.fail(f"an indentation of {siblings[0].tokens[0][2]} blanks")
        siblings.append(line)
        open_lines.append((indent, line))
    if not root.children:
        raise IRError("cannot read the program: the text is empty", where="line 1", why="expected 'program NAME'")
    if len(root.children) > 1:
        root.children[1].fail("one program, everything else indented below it")
    return root.children[0]
