"""`flagtree opt`: passes over a text file, what each did as comments, and output that is input again."""

from pathlib import Path

import pytest

from flagtree.ir.text import parse_program
from tests.cli.conftest import Flagtree

PROGRAM = """\
program two
  symbol s0 in 1..64 from dim x 0
  buffer x: bf16[s0, 128] input
  buffer t: bf16[s0, 128] temp
  buffer y: bf16[s0, 128] temp
  kernel k0 {i0 < s0, i1 < 128} numerics(eager, contract=off, acc=f32)
    v0: bf16 = load x[i0, i1]
    v1: f32 = cast v0
    v2: f32 = mul v1, v1
    v3: bf16 = cast v2
    store t[i0, i1] = v3
  kernel k1 {i0 < s0, i1 < 128} numerics(eager, contract=off, acc=f32)
    v0: bf16 = load t[i0, i1]
    v1: f32 = cast v0
    v2: f32 = add v1, 1.0
    v3: bf16 = cast v2
    store y[i0, i1] = v3
  outputs y
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "zwei Kerne.ir"
    path.write_text(PROGRAM, encoding="utf-8")
    return str(path)


def test_no_pass_prints_the_program_back(flagtree: Flagtree, file: str) -> None:
    ended = flagtree("opt", file, "-p", "")
    assert (ended.code, ended.out, ended.err) == (0, PROGRAM, "")


def test_a_pass_fuses_and_the_output_is_input_again(flagtree: Flagtree, file: str, tmp_path: Path) -> None:
    ended = flagtree("opt", file, "-p", "canonicalize, fuse_pointwise")
    assert ended.code == 0, ended.err
    assert len(parse_program(ended.out).steps) == 1
    again = tmp_path / "again.ir"
    again.write_text(ended.out)
    assert flagtree("opt", str(again), "-p", "canonicalize, fuse_pointwise").out == ended.out


def test_the_whole_pipeline_is_the_default(flagtree: Flagtree, file: str) -> None:
    ended = flagtree("opt", file, "--target", "metax")
    assert ended.code == 0, ended.err
    assert len(parse_program(ended.out).steps) == 1


def test_every_step_and_its_time_are_shown(flagtree: Flagtree, file: str) -> None:
    ended = flagtree("opt", file, "-p", "canonicalize,fuse_pointwise", "--print-after-all", "--time")
    heads = [line for line in ended.out.splitlines() if line.startswith("# after")]
    assert heads == ["# after canonicalize: 0 rewrites", "# after fuse_pointwise: 1 rewrites"]
    assert [line.split()[-1] for line in ended.err.splitlines()] == ["canonicalize", "fuse_pointwise"]


def test_fuel_stops_the_rewrites(flagtree: Flagtree, file: str) -> None:
    assert len(parse_program(flagtree("opt", file, "-p", "fuse_pointwise", "--fuel", "0").out).steps) == 2
    assert len(parse_program(flagtree("opt", file, "-p", "fuse_pointwise", "--fuel", "1").out).steps) == 1


@pytest.mark.parametrize(
    ("text", "passes", "said"),
    [
        (PROGRAM, "fuse_pointwize", "unknown pass 'fuse_pointwize'\n  why: closest: fuse_pointwise"),
        (PROGRAM, "fuse_pointwise{max_opps=3}", "max_opps"),
        ("program x\n  nonsense\n", "canonicalize", "error: "),
        (PROGRAM.replace("outputs y", "outputs z"), "canonicalize", "error: "),
    ],
)
def test_a_mistake_ends_with_2(flagtree: Flagtree, tmp_path: Path, text: str, passes: str, said: str) -> None:
    path = tmp_path / "wrong.ir"
    path.write_text(text)
    ended = flagtree("opt", str(path), "-p", passes)
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_a_file_that_is_no_text_is_named(flagtree: Flagtree, tmp_path: Path) -> None:
    path = tmp_path / "binary.ir"
    path.write_bytes(b"\xff\xfe\x00")
    ended = flagtree("opt", str(path))
    assert ended.code == 2
    assert str(path) in ended.err
