"""Cut a body that walks an axis in a loop into phases: what is computed once, then a loop that ends in reductions or stores.

Invariant: a value that varies along a looped axis is recomputed in every phase that needs it; a store into a buffer that is
also read happens in the last phase that reads it.  Place in the flow: between tiling and the writing of text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flagtree.codegen.triton_tile import Tile
from flagtree.errors import CodegenError
from flagtree.ir.flat import operands
from flagtree.ir.program import BodyOp, Load, Reduce, Scan, Store, defined


@dataclass(frozen=True, slots=True)
class Phase:
    """`before`: ops computed once.  `loops`: axes of the loop nest, outermost first (none: no loop).  `inside`: its ops in order.
    `reduces`: those of `inside` that accumulate over the loop and end after it."""

    before: tuple[BodyOp, ...]
    loops: tuple[str, ...] = ()
    inside: tuple[BodyOp, ...] = ()
    reduces: tuple[Reduce, ...] = ()


def phases(tile: Tile) -> tuple[Phase, ...]:
    """The phases in order.  CodegenError for a reduction nested inside another loop, or a running scan inside a nest."""
    if not tile.loops:
        return (Phase(tile.body),)
    return _Cut(tile).result()


class _Cut:
    def __init__(self, tile: Tile) -> None:
        self.tile, self.looped = tile, frozenset(tile.loops)
        self.level: dict[str, int] = {}
        self.maker: dict[str, BodyOp] = {}
        self.at: dict[BodyOp, int] = {}
        for op in tile.body:
            level = max((self.level.get(n, 0) for n in operands(op)), default=0)
            self.at[op] = level
            for name in defined(op):
                self.maker[name] = op
                self.level[name] = level + self._ends_loop(op)
        self._delay_stores()

    def _over(self, op: BodyOp) -> frozenset[str]:
        return self.tile.op_deps(op) & self.looped

    def _ends_loop(self, op: BodyOp) -> bool:
        """Whether a Reduce takes looped axes away; it must take all that its operand has."""
        if isinstance(op, Scan) and op.axis in self.looped and self._over(op) != {op.axis}:
            raise CodegenError(f"the scan {op.name} runs inside another loop", why="its running value would have to start again")
        if not isinstance(op, Reduce) or self.looped.isdisjoint(op.axes):
            return False
        if not self._over(op) <= set(op.axes):
            left = ", ".join(sorted(self._over(op) - set(op.axes)))
            raise CodegenError(
                f"the reduction {', '.join(op.names)} is nested in the loop over {left}", hint="keep one of the axes in a tile"
            )
        return True

    def _sinks(self, level: int) -> list[BodyOp]:
        return [
            op for op, at in self.at.items()
            if at == level and ((isinstance(op, Reduce) and self._ends_loop(op)) or (isinstance(op, Store) and self._over(op)))
        ]  # fmt: skip

    def _closure(self, sinks: Iterable[BodyOp]) -> set[BodyOp]:
        """The ops that a loop must compute: back from its sinks to values that do not vary along a looped axis."""
        found: set[BodyOp] = set()
        todo = list(sinks)
        while todo:
            op = todo.pop()
            if op in found:
                continue
            found.add(op)
            makers = (self.maker[n] for n in operands(op) if n in self.maker)
            todo += [m for m in makers if self._over(m) and not self._ends_loop(m)]
        return found

    def _delay_stores(self) -> None:
        """Move each store to the last level that still reads its buffer, until nothing moves."""
        moved = True
        while moved:
            moved = False
            last = max(self.at.values())
            reads = [{o.access.buffer for o in self._closure(self._sinks(k)) if isinstance(o, Load)} for k in range(last + 1)]
            for op, at in self.at.items():
                if not isinstance(op, Store) or not self._over(op):
                    continue
                target = max((k for k in range(last + 1) if op.access.buffer in reads[k]), default=at)
                if target > at:
                    self.at[op], moved = target, True

    def result(self) -> tuple[Phase, ...]:
        out: list[Phase] = []
        for level in range(max(self.at.values()) + 1):
            before = tuple(op for op in self.tile.body if self.at[op] == level and not self._over(op) and not self._ends_loop(op))
            nests: dict[frozenset[str], list[BodyOp]] = {}
            for op in self._sinks(level):
                nests.setdefault(self._over(op), []).append(op)
            if not nests:
                out.append(Phase(before))
            for axes, sinks in nests.items():
                needed = self._closure(sinks)
                inside = tuple(op for op in self.tile.body if op in needed)
                ends = tuple(op for op in sinks if isinstance(op, Reduce))
                out.append(Phase(before, tuple(a for a in self.tile.loops if a in axes), inside, ends))
                before = ()
        return tuple(out)
