"""`flagtree verify` on bundles of one kernel: what passes, what is named as wrong, what is refused, and what it leaves on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flagtree.artifact.bundle import open_bundle, write_bundle, write_certificate
from flagtree.artifact.trust import record_built
from flagtree.check.stored import FACTS, TEXT, Description, kernel_files
from flagtree.codegen.launch import launch_list
from flagtree.ir.canonical import Isolated, digest, isolate
from flagtree.ir.program import Kernel, Origin
from flagtree.ir.text import parse_program
from flagtree.passes.tiling import scheduled
from flagtree.runtime.cpu import levels
from flagtree.targets import find_target
from flagtree.toolchain import cxx, emulator, emulator_session
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.build import toolchain_of
from tests.check.test_certify import NORM
from tests.cli.conftest import Flagtree

# y = 3 x, as eager: one ATen call over b0
TRIPLE = """program triple
  symbol s0 in 1..64 from dim x 0
  buffer x: bf16[s0, 48] input
  buffer y: bf16[s0, 48] temp
  kernel triple {i0 < s0, i1 < 48} numerics(eager, contract=off, acc=f32)
    ops "aten.mul.Tensor"
    v0: bf16 = load x[i0, i1]
    v1: f32 = cast v0
    v2: f32 = mul v1, 3.0
    v3: bf16 = cast v2
    store y[i0, i1] = v3
  outputs y
"""


def view(storage: str) -> dict[str, object]:
    return {"storage": storage, "dtype": "bf16", "shape": ["n0", 48], "strides": [48, 1], "offset": 0}


EAGER = {"format": 1, "views": {"v0": view("s0"), "v1": view("s1")}, "given": [["b0", "v0"]], "results": {"b1": "v1"},
         "steps": [{"extern": "aten.mul.Tensor", "args": [{"buffer": "v0"}, 3.0], "kwargs": {}, "outputs": ["v1"]}]}  # fmt: skip
EMULATED = pytest.mark.skipif(bool(emulator.missing()), reason="the emulator does not run here")
Make = Callable[..., Path]


def described(text: str, target: str) -> Description:
    program = parse_program(text)
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    kernel = replace(kernel, origins=(Origin("n", "model.layers.0.mlp", "modeling.py:60"),))
    alone = isolate(program, kernel)
    if find_target(target).warp > 1:
        alone = Isolated(scheduled(alone.program, find_target(target)), alone.buffers, alone.symbols)
    return Description(kernel, alone, EAGER if text == TRIPLE else None, "" if text == TRIPLE else "there is no captured graph")


def code(key: str, text: str, target: str) -> tuple[BuiltKernel, dict[str, bytes]]:
    """The kernel built from `text` under a digest, and the libraries."""
    chip = find_target(target)
    chip = replace(chip, levels=levels()) if chip.levels else chip
    (built,) = toolchain_of(chip).build([(key, described(text, target).isolated.program)], chip, 1)  # type: ignore[call-arg]
    return built, {level: cxx.link([(key, built.files[f"{level}.o"])], level) for level in chip.levels}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A bundle of one kernel; `built_from`: the text that is compiled instead of its own, as a wrong compiler would; `program`: stands
    beside a launch list."""
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "store"))

    def build(text: str = TRIPLE, target: str = "cpu", built_from: str | None = None, trusted: bool = True, form: str = "b 1",
              program: str | None = None, **changes: bytes | None) -> Path:  # fmt: skip
        about = described(text, target)
        key = digest(about.isolated.program)
        built, libraries = code(key, built_from or text, target)
        files = {**built.files, **kernel_files(about), **changes}
        built = replace(built, files={n: d for n, d in files.items() if d is not None})
        path = tmp_path / form
        parts = {} if program is None else {"prefill": launch_list(parse_program(text), {about.kernel.name: (about.isolated, key)})}
        name = write_bundle(path, name="one", target=target, parts=parts, kernels=[built], libraries=libraries, versions={"torch": "0.1"},
                            certificate={"kernels": {}}, programs={part: str(program) for part in parts})  # fmt: skip
        if trusted:
            record_built(name)
        return path

    return build


def content(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("target", ["cpu", pytest.param("metax", marks=EMULATED)])
def test_a_right_kernel(flagtree: Flagtree, make: Make, target: str) -> None:
    path = make(target=target)
    before, name = content(path), open_bundle(path).digest
    ended = flagtree("verify", str(path), "--json", "-j", "1")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    (row,) = found["kernels"]
    assert (found["failed"], found["digest"], row["verdict"], row["eager"]) == (0, name, "pass", "compared")
    assert row["gate"] == "the interpreter's bits" and row["equal_to_interpreter"] == row["equal_to_eager"] == 1.0
    assert 0.4 < row["max_ulp"] <= 0.5 and 0 < row["mean_ulp"] < 0.5
    after = content(path)
    assert {n for n in after if after[n] != before[n]} == {"certificate.json"}
    assert open_bundle(path).digest == name
    certificate = open_bundle(path).certificate()
    assert certificate is not None and certificate.evidence["form"] == "long"
    runs = certificate.evidence["kernels"][row["digest"]]["runs"]  # type: ignore[index]
    kinds = {run["inputs"]["kind"] for run in runs}
    assert kinds == {"ordinary", "ordinary, small", "wide range", "cancelling", "denormal", "zero", "inf", "NaN"}
    assert {run["inputs"]["symbols"]["n0"] for run in runs} >= {1, 3, 64}
    assert {run["inputs"].get("misaligned_by", 0) for run in runs} == {0, 1}
    table = flagtree("verify", str(path), "-j", "1")
    assert table.code == 0 and "1 of 1 kernels pass" in table.out and "mlp" in table.out


@pytest.mark.parametrize("target", ["cpu", pytest.param("metax", marks=EMULATED)])
def test_a_wrong_kernel_is_named(flagtree: Flagtree, make: Make, target: str) -> None:
    ended = flagtree("verify", str(make(target=target, built_from=TRIPLE.replace("3.0", "3.0078125"))), "-j", "1")
    assert ended.code == 1
    wrong = next(line for line in ended.err.splitlines() if line.startswith("wrong: "))
    for word in ("kernel triple", "aten.mul.Tensor", "model.layers.0.mlp", "s0=1", "ordinary inputs", "stored buffer y", "must be"):
        assert word in wrong, wrong
    assert "fail" in ended.out


def test_a_wrong_sum_is_named(flagtree: Flagtree, make: Make) -> None:
    """One addend in 64 twice: far inside any tolerance of a bf16, outside of what the sum's error allows."""
    path = make(NORM, built_from=NORM.replace("v4: f32 = div v3, 64.0", "v4: f32 = div v3, 63.0"))
    assert flagtree("verify", str(path), "-j", "1").code == 1
    assert flagtree("verify", str(make(NORM, form="c")), "-j", "1").code == 0


def test_only_some_inputs_are_wrong(flagtree: Flagtree, make: Make) -> None:
    """Infinity becomes the largest number: ordinary inputs do not see it."""
    clipped = TRIPLE.replace("v2: f32 = mul v1, 3.0", "t: f32 = mul v1, 3.0\n    v2: f32 = min t, 3.0e38")
    ended = flagtree("verify", str(make(built_from=clipped)), "-j", "1")
    assert ended.code == 1 and "inf inputs" in ended.err and "ordinary inputs" not in ended.err


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"kernels"', b'"kernelz"') + (b"" if path.suffix == ".json" else b" "))


def another_certificate(path: Path) -> None:
    evidence = json.loads((path / "certificate.json").read_text())
    (path / "certificate.json").write_text(json.dumps({**evidence, "bundle": "0" * 64}))


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no certificate": (lambda p: (p / "certificate.json").unlink(), "no certificate"),
    "an edited certificate": (lambda p: edit(p / "certificate.json"), "certificate"),
    "another's certificate": (another_certificate, "certificate"),
    "an edited kernel": (lambda p: edit(next(p.glob("kernels/*/kernel.cpp"))), "damaged or was edited"),
    "an edited text": (lambda p: edit(next(p.glob("kernels/*/kernel.ir"))), "damaged or was edited"),
    "an edited library": (lambda p: edit(next(p.glob("lib/*.so"))), "damaged or was edited"),
    "no bundle": (lambda p: (p / "manifest.json").unlink(), "not a bundle"),
}


@pytest.mark.parametrize("harm", REFUSALS)
def test_what_is_not_whole_is_refused_and_left_alone(flagtree: Flagtree, make: Make, harm: str) -> None:
    path = make()
    change, said = REFUSALS[harm]
    change(path)
    before = content(path)
    ended = flagtree("verify", str(path))
    assert ended.code == 2 and ended.out == "" and ended.err.count("error: ") == 1 and said in ended.err
    assert content(path) == before


def test_nobody_vouches(flagtree: Flagtree, make: Make) -> None:
    path = make(trusted=False)
    before, name = content(path), open_bundle(path).digest
    ended = flagtree("verify", str(path))
    assert ended.code == 2 and f"flagtree verify {path} --trust {name}" in ended.err
    assert flagtree("verify", str(path), "--trust", "0" * 64).code == 2
    assert content(path) == before
    assert flagtree("verify", str(path), "--trust", name, "-j", "1").code == 0


@pytest.mark.parametrize(("changes", "said"), [
    ({TEXT: None, FACTS: None}, "does not hold the text of its kernels"),
    ({TEXT: b"program isolated\n  outputs\n"}, "not the kernel of its digest"),
    ({TEXT: b"nonsense"}, "text of a kernel is not valid"),
    ({FACTS: b"{}\n"}, "what is stored of a kernel is not valid"),
    ({FACTS: b"[\n"}, FACTS),
])  # fmt: skip
def test_hostile_kernel_files(flagtree: Flagtree, make: Make, changes: dict[str, bytes | None], said: str) -> None:
    ended = flagtree("verify", str(make(**changes)))
    assert ended.code == 2 and ended.out == "" and said in ended.err


def test_building_again(flagtree: Flagtree, make: Make) -> None:
    path = make()
    levels_ = levels()
    found = json.loads(flagtree("verify", str(path), "--rebuild", "--json", "-j", "1").out)["rebuilt"]
    others = [f"kernels/{next(path.glob('kernels/*')).name}/{level}.o" for level in find_target("cpu").levels if level not in levels_]
    assert set(found["differs"]) <= {*others, *(f"lib/{level}.so" for level in find_target("cpu").levels if level not in levels_)}
    assert found["compared"]["kernels"] >= 1 + len(levels_) and found["compared"]["libraries"] >= len(levels_)
    assert found["compared"]["launch lists"] == 0 and found["changed"]["torch"][0] == "0.1"
    assert {Path(name).name for name in found["inputs"]} == {TEXT, FACTS}
    edited = make(form="edited", **{"kernel.cpp": b"// another compiler\n"})
    ended = flagtree("verify", str(edited), "--rebuild", "-j", "1")
    assert ended.code == 1 and f"differs: kernels/{next(edited.glob('kernels/*')).name}/kernel.cpp" in ended.err
    assert "torch 0.1 then" in " ".join(ended.out.split())


def test_launch_lists_are_made_again(flagtree: Flagtree, make: Make) -> None:
    again = ("--rebuild", "--json", "-j", "1")
    found = json.loads(flagtree("verify", str(make(program=TRIPLE)), *again).out)["rebuilt"]
    assert found["compared"]["launch lists"] == 1 and "launch/prefill.ir" in found["inputs"]
    assert not any(name.startswith("launch/") or name.endswith(TEXT) for name in found["differs"])
    other = flagtree("verify", str(make(form="other", program=TRIPLE.replace("3.0", "5.0"))), *again)
    differs = json.loads(other.out)["rebuilt"]["differs"]
    assert other.code == 1 and "launch/prefill.json" in differs and any(name.endswith(f"/{TEXT}") for name in differs)
    path = make(form="nonsense", program="nonsense")
    before = content(path)
    ended = flagtree("verify", str(path), *again)
    assert ended.code == 2 and "program of a part is not valid" in ended.err and content(path) == before


BROKEN = {  # a C++ compiler that says what it is, and then ...
    "fails": ("echo 'fatal error: no such instruction' >&2; exit 1", "no such instruction"),
    "hangs": ("exec sleep 600", "did not finish"),
    "prints nonsense": ("echo usage; exit 0", ""),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("target", ["cpu", pytest.param("metax", marks=EMULATED)])
def test_a_toolchain_that_does_not_work(
    flagtree: Flagtree, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, how: str
) -> None:
    """One error, exit code 2, and the bundle is as it was: no kernel is blamed for it."""
    path = make(target=target)
    before = content(path)
    body, said = BROKEN[how]
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ncase $1 in --version) echo g++ 12;; -dumpmachine) echo x86_64-linux-gnu;; *) {body};; esac\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("FLAGTREE_CXX", str(compiler))
    monkeypatch.setattr(cxx, "TIMEOUT", 1.0)
    monkeypatch.setattr(emulator_session, "COMPILE", 1.0)
    if emulator_session._session is not None:
        emulator_session._session.close()  # the next one is started with this compiler
    ended = flagtree("verify", str(path), "-j", "1", *(["--rebuild"] if target == "cpu" else []))
    assert ended.code == 2 and ended.out == "" and ended.err.count("error: ") >= 1 and said in ended.err, ended
    assert "wrong:" not in ended.err and "Traceback" not in ended.err and content(path) == before


def test_without_a_way_to_execute_nothing_is_certified(flagtree: Flagtree, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make()
    before = content(path)
    monkeypatch.setattr("flagtree.check.execute.levels", lambda: ())
    ended = flagtree("verify", str(path), "-j", "1")
    assert ended.code == 2 and "nothing of the bundle can be executed here" in ended.err and content(path) == before


def test_a_single_file(flagtree: Flagtree, make: Make) -> None:
    path = make(form="one.ftb")
    name = open_bundle(path).digest
    assert flagtree("verify", str(path), "-j", "1").code == 0
    assert open_bundle(path).digest == name and open_bundle(path).certificate().evidence["form"] == "long"  # type: ignore[union-attr]


def test_a_certificate_is_written_anew_over_any_other(make: Make) -> None:
    path = make()
    write_certificate(path, {"kernels": {}, "form": "short"})
    assert open_bundle(path).certificate() is not None
