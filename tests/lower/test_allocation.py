"""Calls that only allocate go where what follows writes first, and stay where it reads."""

from __future__ import annotations

import pytest

from flagtree.ir.parse import parse_program
from flagtree.ir.verify import verify
from flagtree.lower.allocation import without_allocations

HEAD = """
program p
  buffer x: f32[4] input
  buffer y: f32[4] temp
  buffer v: f32[2] temp alias y + 2
  buffer z: f32[4] temp
  extern e0: (y) = aten.empty.memory_format([4])
"""
STORE = """  kernel k0 {i0 < 4} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0]
    store y[i0] = v0
"""
ADD = STORE.replace("store y", "store.add y")
READ = """  kernel k0 {i0 < 4} numerics(eager, contract=off, acc=f32)
    v0: f32 = load y[i0]
    store z[i0] = v0
"""
CALL = '  extern e1: () = server.attend.default(x, y) mutates(y) effect "state:server"\n'
VIEW = '  extern e1: () = server.attend.default(x, v) mutates(v) effect "state:server"\n'
READING_CALL = "  extern e1: (z) = aten.relu.default(y)\n"


@pytest.mark.parametrize(
    ("steps", "dropped"),
    [(STORE, True), (CALL, True), (VIEW, True), (ADD, False), (READ, False), (READING_CALL, False), ("", False), (CALL + READ, True)],
)
def test_only_what_is_written_first_loses_its_call(steps: str, dropped: bool) -> None:
    program = parse_program(HEAD + steps + "  outputs y\n")
    kept = without_allocations(program.steps, program.root)
    assert ("e0" not in [s.name for s in kept]) is dropped
    assert [s.name for s in kept if s.name != "e0"] == [s.name for s in program.steps[1:]]
    verify(program.with_(steps=tuple(kept)))
