"""Rows that index tensors name, added up: embeddings of words, positions and segments read by the kernel that adds them.

Eager checks each index.  So does this: a kernel a lookup says whether one lies outside of its table, and one call for all of them raises
what eager raises; the rows are read under the same test, so nothing outside is touched.  A single lookup stays a call: a check costs what
it costs.  Runs before fusion, which takes the lookups into their readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import Index
from flagtree.ir.program import (
    Access,
    Axis,
    BodyOp,
    Buffer,
    Compute,
    Extern,
    IndexValue,
    Kernel,
    Load,
    Numerics,
    Program,
    Reduce,
    Ref,
    Scan,
    Step,
    Store,
)
from flagtree.passes.base import Fuel, Refused, Report
from flagtree.targets.base import Target

LOOKUP, REFUSE = "aten.embedding.default", "flagtree.refuse_outside.default"
_ALONE = "a single lookup: checking its index costs what reading its row in place gains"
_REASON = "an index outside of its table is an error, and only a call can raise one"


@dataclass(frozen=True)
class Lookups:
    """No options."""

    name: ClassVar[str] = "lookups"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report, fuel = Report(self.name), fuel or Fuel()
        ours: dict[str, list[str]] = {}  # name of the last lookup of a family -> all of them
        for family in _families(program) if target.lookups else ():
            if len(family) < 2:
                report.refused.append(Refused((family[0],), _ALONE))
            elif fuel.take():
                ours[family[-1]] = family
                report.rewrites += 1
                report.matched += family
        taken = {name for family in ours.values() for name in family}
        buffers, steps = list(program.buffers), list[Step]()
        for step in program.steps:
            if step.name not in taken:
                steps.append(step)
                continue
            assert isinstance(step, Extern)
            buffers.append(Buffer(_flag(step.name), "b1", (), "temp"))
            steps += [_check(program, step), _rows(program, step)]
            if step.name in ours:
                flags = tuple(Ref(_flag(name)) for name in ours[step.name])
                effect = "state:refusals"  # what nobody reads is kept for its effect
                steps.append(Extern(f"{step.name}.refuse", REFUSE, (flags,), (), reason=_REASON, effect=effect, origins=step.origins))
        return (program.with_(buffers=tuple(buffers), steps=tuple(steps)) if report.rewrites else program), report


def _families(program: Program) -> Iterator[list[str]]:
    """Names of the lookups whose rows meet in pointwise kernels, in order."""
    parent: dict[str, str] = {}

    def find(root: str) -> str:
        while (above := parent.setdefault(root, root)) != root:
            root = above
        return root

    made: dict[str, str] = {}  # lookup -> root of its rows
    for step in program.steps:
        if isinstance(step, Extern) and step.callee == LOOKUP and _fits(program, step):
            made[step.name] = program.root(step.outputs[0] or "")
        elif isinstance(step, Kernel) and not any(isinstance(op, Reduce | Scan) for op in step.body):
            roots = {program.root(n) for n in (*step.reads, *step.writes)}
            roots = {n for n in roots if program.buffer(n).role == "temp" and DTYPES[program.buffer(n).dtype].is_float}
            for root in roots:
                parent[find(root)] = find(min(roots))
    families: dict[str, list[str]] = {}
    for name, root in made.items():
        families.setdefault(find(root), []).append(name)
    yield from families.values()


def _fits(program: Program, step: Extern) -> bool:
    """A table of rows that lie side by side, numbers that name rows, and nothing but the rows as a result."""
    table, indices = (program.buffer(a.buffer) if isinstance(a, Ref) else None for a in step.args[:2])
    if table is None or indices is None or step.mutates or step.outputs[0] is None:
        return False
    out = program.buffer(step.outputs[0])
    shapes = len(table.shape) == 2 and out.shape == (*indices.shape, table.shape[1])
    return shapes and table.dtype == out.dtype and DTYPES[table.dtype].is_float and indices.dtype in ("i32", "i64")


def _flag(name: str) -> str:
    """The buffer that says whether an index of a lookup lies outside of its table."""
    return f"{name}.outside"


def _index(program: Program, step: Extern, at: tuple[Index, ...]) -> tuple[list[BodyOp], str]:
    """Ops that read the index at a point and name it `row`, and the value that tells whether the table has such a row."""
    table, indices = (program.buffer(a.buffer) for a in step.args[:2] if isinstance(a, Ref))
    ops: list[BodyOp] = [Load("given" if indices.dtype != "i64" else "row", indices.dtype, Access(indices.name, at))]
    ops += [Compute("row", "i64", "cast", ("given",))] if indices.dtype != "i64" else []
    ops += [
        IndexValue("rows", "i64", table.shape[0]), Compute("low", "b1", "ge", ("row", 0)), Compute("high", "b1", "lt", ("row", "rows")),
        Compute("inside", "b1", "and", ("low", "high")),
    ]  # fmt: skip
    return ops, "inside"


def _check(program: Program, step: Extern) -> Kernel:
    """Is an index outside of the table?"""
    shape = program.buffer(step.args[1].buffer).shape  # type: ignore[union-attr]
    axes = tuple(Axis(f"r{d}", extent, "reduce") for d, extent in enumerate(shape))
    body, inside = _index(program, step, tuple(Index.of(a.name) for a in axes))
    body.append(Compute("outside", "b1", "not", (inside,)))
    body += [Reduce(("any",), ("b1",), "any", ("outside",), tuple(a.name for a in axes))] if axes else []
    body.append(Store(Access(_flag(step.name), ()), "any" if axes else "outside"))
    return Kernel(f"{step.name}.check", axes, tuple(body), Numerics(), None, step.origins, ())


def _rows(program: Program, step: Extern) -> Kernel:
    """The rows, where the table has them."""
    table, out = program.buffer(step.args[0].buffer), program.buffer(step.outputs[0] or "")  # type: ignore[union-attr]
    axes = tuple(Axis(f"i{d}", extent) for d, extent in enumerate(out.shape))
    point = tuple(Index.of(a.name) for a in axes)
    body, inside = _index(program, step, point[:-1])
    body.append(Load("value", table.dtype, Access(table.name, (Index.of("row"), point[-1]), inside), float("nan")))
    body.append(Store(Access(out.name, point), "value"))
    return Kernel(step.name, axes, tuple(body), Numerics(), None, step.origins, (step.callee,))
