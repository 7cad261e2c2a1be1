"""The checks of a pass file themselves: each kind of wrong file, wrong pass and missing expectation is caught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flagtree.errors import IRError
from flagtree.ir.program import Compute, Kernel, Program
from tests.passes.pass_file import check, read

PROGRAM = """program p
  symbol n in 1..64 from dim x 0
  symbol k in 0..3 from scalar start
  symbol m in 8..64 multiple 8 from argument
  buffer start: i64[] scalar
  buffer x: f32[n, 4] input strides(1, n)
  buffer t: i64[n] input
  buffer s: f32[n] state
  buffer y: f32[n] temp
  kernel k0 {i < n} numerics(eager, contract=off, acc=f32)
    r: i64 = load t[i]
    v: f32 = load x[r, k]
    w: f32 = add v, 1.0
    store y[i] = w
    store.add s[i] = w
  outputs y
"""


@dataclass(frozen=True)
class Swap:
    """A pass that turns the op `add` into another: right only when it is `add` again."""

    to: str

    def run(self, program: Program, target: object) -> tuple[Program, SimpleNamespace]:
        kernel = program.steps[0]
        assert isinstance(kernel, Kernel)
        body = tuple(replace(op, op=self.to) if isinstance(op, Compute) else op for op in kernel.body)
        report = SimpleNamespace(refusals=["k0: too good to change"])
        return program.with_(steps=(replace(kernel, name="swapped", body=body),)), report


def parse(spec: str) -> Sequence[Swap]:
    return [Swap(spec)]


def written(path: Path, text: str) -> Path:
    file = path / "case.ir"
    file.write_text(text, "utf-8")
    return file


HEAD = "// run: add\n// integers t: 0..n - 1\n" + PROGRAM
EXPECTED = PROGRAM.replace("k0 {", "swapped {")


def test_a_right_pass_with_its_expectation(tmp_path: Path) -> None:
    check(read(written(tmp_path, f"{HEAD}// expect\n{EXPECTED}")), parse, None, False)


def test_a_missing_or_wrong_expectation_fails_and_accept_writes_it(tmp_path: Path) -> None:
    file = written(tmp_path, HEAD)
    with pytest.raises(AssertionError, match="no expectation"):
        check(read(file), parse, None, False)
    check(read(file), parse, None, True)
    assert file.read_text("utf-8") == f"{HEAD}// expect\n{EXPECTED}"
    check(read(file), parse, None, False)
    file.write_text(f"{HEAD}// expect\n{PROGRAM}", "utf-8")
    with pytest.raises(AssertionError, match="if the new output is right"):
        check(read(file), parse, None, False)
    check(read(file), parse, None, True)
    assert file.read_text("utf-8") == f"{HEAD}// expect\n{EXPECTED}"


@pytest.mark.parametrize("accept", [False, True])
def test_a_pass_that_changes_the_numbers_fails_and_is_never_accepted(tmp_path: Path, accept: bool) -> None:
    file = written(tmp_path, HEAD.replace("run: add", "run: mul"))
    with pytest.raises(AssertionError, match="error"):
        check(read(file), parse, None, accept)
    assert "expect" not in file.read_text("utf-8")


def test_a_pass_that_breaks_a_rule_fails(tmp_path: Path) -> None:
    with pytest.raises(IRError, match="dtype-closed"):
        check(read(written(tmp_path, HEAD.replace("run: add", "run: lt"))), parse, None, False)


def test_refusals_are_searched(tmp_path: Path) -> None:
    check(read(written(tmp_path, HEAD + "// refused: too good\n")), parse, None, False)
    with pytest.raises(AssertionError, match="too bad"):
        check(read(written(tmp_path, HEAD + "// refused: too bad\n")), parse, None, False)


def test_errors_name_the_rule(tmp_path: Path) -> None:
    broken = HEAD.replace("store y[i]", "store y[i + 1]")
    check(read(written(tmp_path, broken + "// error: index-in-range\n")), parse, None, False)
    with pytest.raises(AssertionError, match="index-in-range"):
        check(read(written(tmp_path, broken + "// error: dtype-closed\n")), parse, None, False)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(read(written(tmp_path, HEAD + "// error: dtype-closed\n")), parse, None, False)


@pytest.mark.parametrize("head", ["", "// run: add\n// run: add\n", "// run: add\n// expects\n"])
def test_a_malformed_file_fails(tmp_path: Path, head: str) -> None:
    with pytest.raises(AssertionError):
        read(written(tmp_path, head + PROGRAM))
