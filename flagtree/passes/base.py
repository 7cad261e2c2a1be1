"""What a pass is: a frozen dataclass from Program to Program, pure, with a spec text that round-trips.

`fuse_pointwise{max_ops=64}` parses to the dataclass and prints back.  A pass returns the new program and a Report; what it
declined is data there, with the reason, never a print.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from flagtree.ir.program import Program
from flagtree.targets.base import Target


@dataclass(frozen=True, slots=True)
class Refused:
    """A rewrite that a pass declined: the steps it concerns and why."""

    steps: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{' + '.join(self.steps)}: {self.reason}"


@dataclass
class Report:
    """What one run of a pass did: number of rewrites, what was matched and what was refused."""

    name: str
    rewrites: int = 0
    matched: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def refusals(self) -> list[str]:
        return [str(r) for r in self.refused]


class Fuel:
    """A budget of rewrites shared by a pipeline; `bisect` searches it for the first wrong one."""

    def __init__(self, amount: int | None = None) -> None:
        self.left = amount

    def take(self) -> bool:
        """May one more rewrite happen?"""
        if self.left is None:
            return True
        if self.left <= 0:
            return False
        self.left -= 1
        return True


@runtime_checkable
class Pass(Protocol):
    """`version` enters the key of what a pipeline built."""

    name: ClassVar[str]
    version: ClassVar[int]

    def run(self, program: Program, target: Target, fuel: Fuel = ...) -> tuple[Program, Report]:
        """The rewritten program (the same object when nothing changed) and what happened."""
        ...


def spec(p: Pass) -> str:
    """Text of a pass with the options that differ from their defaults."""
    options = [
        f"{f.name}={getattr(p, f.name)}"
        for f in dataclasses.fields(p)  # type: ignore[arg-type]
        if getattr(p, f.name) != f.default
    ]
    return p.name + (f"{{{', '.join(options)}}}" if options else "")
