"""`flagtree finalize` against recording stand-ins of MetaX's SDK and Triton, and against real ptxas and Triton for cuda."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flagtree
from flagtree import finalize as module
from flagtree.artifact.bundle import Bundle, open_bundle, write_bundle
from flagtree.artifact.trust import record_built
from flagtree.check.report import PartReport
from flagtree.codegen.launch import launch_list
from flagtree.errors import BundleError, StoreError, ToolchainError, UntrustedBundle
from flagtree.finalize import FinalizeReport, finalize
from flagtree.ir.canonical import digest as digest_of
from flagtree.ir.canonical import isolate
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Kernel
from flagtree.runtime import gpu
from flagtree.settings import settings
from flagtree.targets import find_target, stock_triton
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.device_binary import _elf
from flagtree.toolchain.emulator import execute_built
from flagtree.toolchain.mxcc import Mxcc
from tests.cli.reports import report as written_report
from tests.codegen.triton_kernels import SM90, buffers, keyed
from tests.runtime.stand_in import Recording, compile_launcher
from tests.runtime.stand_in import StandIn as Device
from tests.scheduled import build_maca, build_triton
from tests.toolchain.vendor_sdk import StandIn, make_sdk, make_triton

pytestmark = pytest.mark.skipif(bool(stock_triton.problem()), reason=stock_triton.problem() or "Triton is here")
OTHERS = [p for p in os.environ.get("FLAGTREE_TEST_TRITON_PYTHONS", "").split(os.pathsep) if p]
NAMES = ("rmsnorm", "softmax")
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[BuiltKernel]]:
    keys = [keyed(name) for name in NAMES]
    return {"metax": build_maca(keys, find_target("metax")), "cuda:sm90": build_triton(keys, SM90, 1)}


@pytest.fixture
def build(kernels: dict[str, list[BuiltKernel]], tmp_path: Path) -> Build:
    """A bundle of the two kernels, by default for metax and trusted."""

    def make(target: str = "metax", name: str = "small", trusted: bool = True, **changes: Any) -> Path:
        path = tmp_path / name
        evidence = {"kernels": {k.digest: {"name": "k", "executed": ["maca-ir (emulated)"], "verdict": "pass"} for k in kernels[target]}}
        arguments = {"name": "small", "target": target, "parts": {}, "kernels": kernels[target], "certificate": evidence,
                     "versions": {"triton": "3.9.0"}, "coverage": {}} | changes  # fmt: skip
        digest = write_bundle(path, **arguments)
        if trusted:
            record_built(digest)
        return path

    return make


@pytest.fixture
def sdk(tmp_path: Path) -> StandIn:
    return make_sdk(tmp_path / "sdk")


@pytest.fixture
def triton(tmp_path: Path) -> StandIn:
    return make_triton(tmp_path / "vendor")


def with_sdk(sdk: StandIn, path: Path, **options: Any) -> FinalizeReport:
    with settings.override(maca_path=sdk.home):
        return finalize(path, jobs=1, **options)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def functions(bundle: Bundle) -> list[str]:
    return sorted(str(k.launch["function"]) for k in bundle.manifest.kernels.values())


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- MetaX's compiler ------------------------------------------------------------------------------------------------
def test_mxcc_is_given_the_bundles_ir_and_these_words(build: Build, sdk: StandIn) -> None:
    before = open_bundle(build())
    texts = {n: before.read(n) for n in before.manifest.files}
    report = with_sdk(sdk, before.path)
    calls = sdk.calls()
    wanted = []
    for digest, kernel in sorted(before.manifest.kernels.items()):
        for variant in kernel.launch["variants"]:  # type: ignore[attr-defined]
            wanted += [(digest, variant, step) for step in ("better", "binary")]
    assert len(calls) == len(wanted)
    for call, (digest, variant, step) in zip(calls, wanted, strict=True):
        words = call["arguments"]
        assert call["tool"] == "mxcc" and call["function"] == f"ft_{digest[:16]}"
        assert call["input"] == sha(texts[f"kernels/{digest[:16]}/{variant}.llir"])  # the stand-in's first step changes nothing
        if step == "better":
            assert words[:6] == ["-x", "ir", "-O3", "-S", "-emit-llvm", "-forward-unknown-to-compiler"]
            assert words[6] == "--target=mxc-metax-macahca" and words[7].endswith(f"/{variant}.ll") and words[8] == "-o"
            made = words[9]
        else:
            assert words[:4] == ["-x", "ir", "-input-is-device", "-offload-arch=xcore1000"]
            assert words[4:7] == ["-device-bin", "-fmad=false", f"--maca-path={sdk.home}"]
            assert words[7:] == [made, "-o", made.replace(".opt.ll", ".devbin")]
    assert report.tool == "mxcc version 1.0.0 (stand-in)" and not report.failed


def test_the_device_library_is_linked_where_the_ir_calls_it(sdk: StandIn, tmp_path: Path) -> None:
    tool = Mxcc(sdk.home, find_target("metax"), 60.0, "mxcc", "")
    source = tmp_path / "aligned.ll"
    text = "declare float @llvm.sqrt.f32(float)\ndeclare float @mc_math_func_tanhf(float)\n"
    link, better, _ = tool.commands(source, text)
    assert link == [str(sdk.home / "mxgpu_llvm/bin/llvm-link"), str(source), str(sdk.home / "lib/maca_kernellib.bc"),
                    str(sdk.home / "lib/maca_mathlib.bc"), "--only-needed", "-S", "-o", str(tmp_path / "aligned.linked.ll")]  # fmt: skip
    assert str(tmp_path / "aligned.linked.ll") in better
    assert len(tool.commands(source, text.splitlines()[0])) == 2


def test_what_comes_out(build: Build, sdk: StandIn) -> None:
    path = build()
    before = open_bundle(path)
    evidence = before.certificate()
    assert evidence is not None
    old = {n: before.read(n) for n in before.manifest.files}
    report = with_sdk(sdk, path)
    after = open_bundle(path)
    after.verify()
    assert report.digest == after.digest != report.source == before.digest and report.trusted
    assert after.manifest.versions == {"triton": "3.9.0", "finalize.mxcc": "mxcc version 1.0.0 (stand-in)"}
    for digest, kernel in after.manifest.kernels.items():
        was: Any = before.manifest.kernels[digest]
        assert (was.tier, kernel.tier, kernel.missing) == ("llir", "binary", "")
        launch: Any = kernel.launch
        assert {k: v for k, v in launch.items() if k != "variants"} == {k: v for k, v in was.launch.items() if k != "variants"}
        for name, variant in launch["variants"].items():
            assert variant == {**was.launch["variants"][name], "file": f"{name}.devbin"}
            assert after.read(f"kernels/{digest[:16]}/{variant['file']}")[:4] == b"\x7fELF"
        made: Any = kernel.facts["finalized"]
        assert made == {"tool": report.tool, "from": "llir", "fingerprint": sha((sdk.home / "mxgpu_llvm/bin/mxcc").read_bytes())}
    assert {n: after.read(n) for n in old} == old  # nothing that was there has changed
    carried = after.certificate()
    assert carried is not None
    for digest, record in carried.evidence["kernels"].items():  # type: ignore[attr-defined]
        note = record.pop("binary")
        assert record == evidence.evidence["kernels"][digest]  # type: ignore[index]
        assert note == f"by {report.tool}, made from the bundle's LLVM IR; not executed"
    assert carried.evidence["finalized"] == [{"from": before.digest, "tool": report.tool, "kernels": 2}]


def test_the_stored_report_follows(build: Build, sdk: StandIn, kernels: dict[str, list[BuiltKernel]]) -> None:
    part = written_report().bundles[0].parts[0]
    mine = replace(part.kernels[0], digest=kernels["metax"][0].digest, tier="llir", missing="the SDK")
    other = replace(part.kernels[0], digest="f" * 64, tier="llir", missing="the SDK")
    path = build(coverage={"decode": {"symbols": {}, "report": replace(part, kernels=(mine, other)).to_dict()}, "odd": {"report": 3}})
    with_sdk(sdk, path)
    coverage: Any = open_bundle(path).manifest.coverage
    found = PartReport.from_dict(coverage["decode"]["report"]).kernels
    assert [(row.tier, row.missing) for row in found] == [("binary", ""), ("llir", "the SDK")]
    assert coverage["odd"] == {"report": 3} and coverage["decode"]["symbols"] == {}


def test_a_grid_that_divides(build: Build, sdk: StandIn) -> None:
    (kernel,) = build_maca([keyed("embedding")], find_target("metax"))
    assert "//" in str(kernel.launch["grid"])
    assert not with_sdk(sdk, build(kernels=[kernel])).failed


def test_equal_bundles_by_equal_tools_are_equal_bytes(build: Build, sdk: StandIn) -> None:
    one, two = build(name="one"), build(name="two")
    assert with_sdk(sdk, one).digest == with_sdk(sdk, two).digest
    assert snapshot(one) == snapshot(two)


def test_a_bundle_without_a_certificate_gets_none(build: Build, sdk: StandIn) -> None:
    path = build(certificate=None)
    with_sdk(sdk, path)
    assert open_bundle(path).certificate() is None


# -- MetaX's Triton --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["3.1.0", "3.4.0+metax3.7.2"])
def test_the_vendors_triton_is_asked_for_what_was_built(build: Build, tmp_path: Path, version: str) -> None:
    vendor = make_triton(tmp_path / "vendor", version)
    path = build()
    before = open_bundle(path)
    vendor.behave(every={"arguments": 7, "shared": 96})
    report = finalize(path, python=vendor.python, jobs=1)
    calls = vendor.calls()
    after = open_bundle(path)
    assert report.tool == f"triton {version} (Python {'.'.join(map(str, sys.version_info[:3]))})"
    for (digest, kernel), (first, second) in zip(sorted(before.manifest.kernels.items()), zip(calls[::2], calls[1::2]), strict=True):
        launch: Any = kernel.launch
        assert first["function"] == second["function"] == launch["function"]
        assert first["target"] == ["maca", 80, 64] and first["cache"]
        assert first["options"] == {"num_warps": launch["warps"], "num_stages": launch["stages"], "enable_fp_fusion": False}
        counted = version.startswith("3.1.")
        assert first["signature"] == [[k if counted else n, t] for k, (n, t) in enumerate(launch["signature"])]
        required = launch["variants"]["aligned"]["requires"]
        assert first["divisible"] == [k for k, (n, _) in enumerate(launch["signature"]) if n in required]
        assert "divisibility" not in second["ttgir"]
        new: Any = after.manifest.kernels[digest].launch
        for name, variant in new["variants"].items():
            nulls = 7 - len(launch["signature"])
            was = launch["variants"][name]
            assert variant == {**was, "file": f"{name}.mcfatbin", "shared": 96, "null_pointers": nulls, "llir_shared": was["shared"]}
        assert new["shared"] == 96
    certificate = after.certificate()
    assert certificate is not None
    notes = {record["binary"] for record in certificate.evidence["kernels"].values()}  # type: ignore[attr-defined]
    assert notes == {f"by {report.tool}, built anew from kernel.py, so what was executed is another build of the same source; not executed"}


def test_arguments_are_counted_in_the_ir() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(module.__file__).parent / "toolchain")!r})
from vendor_worker import count_arguments as count
body = "ptr addrspace(1) nocapture readonly align 16 %0, {{i32, <4 x i8>}} %1, ptr byval({{i32, i32}}) align 8 %2, i32 %3"
lines = f"define metaxgpu_kernel void @ft_1({{body}}) #0 {{{{", "define void @ft_1() {{", "; none"
print(*(count(line, "ft_1") for line in lines))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4 0 -1\n"


def test_a_fat_binary_is_looked_into(build: Build, triton: StandIn) -> None:
    path = build()
    triton.behave(every={"bundle": True})
    assert not finalize(path, python=triton.python, jobs=2).failed


WRONG = {
    "it raises": ({"raise": "no such instruction"}, "RuntimeError: no such instruction"),
    "it crashes": ({"exit": 139}, "exit status 139"),
    "it says nothing": ({"exit": 0}, "no usable answer"),
    "it hangs": ({"sleep": 60}, "did not finish"),
    "text for a binary": ({"image": "warning: deprecated"}, "no 64-bit ELF file"),
    "another kernel": ({"symbol": "main"}, "does not define ft_"),
    "another name": ({"name": "main"}, "it built main"),
    "other threads": ({"warps": 16}, "16 warps, not "),
    "too much shared memory": ({"shared": 1 << 20}, "1048576 of 65536 bytes"),
    "arguments that do not fit": ({"arguments": 40}, "40 for "),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_believed(build: Build, triton: StandIn, case: str) -> None:
    how, why = WRONG[case]
    path = build()
    before = snapshot(path)
    triton.behave(every=how)
    with pytest.raises(ToolchainError) as caught:
        finalize(path, python=triton.python, jobs=2, seconds=2 if case == "it hangs" else 60)
    assert why in str(caught.value) and "2 failed" in caught.value.what
    assert snapshot(path) == before


def test_a_python_that_is_none_or_has_no_such_triton(build: Build, tmp_path: Path) -> None:
    path = build()
    before = snapshot(path)
    script = tmp_path / "not-python"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    others = make_triton(tmp_path / "other", "3.7.0", "cuda").python
    cases = ((tmp_path / "nowhere", "there is no program"), (script, "hello"), (bare, "No module named 'triton'"),
             (others, "no code generator for metax"), (sys.executable, "no code generator"))
    for python, said in cases:
        with pytest.raises(ToolchainError) as caught:
            finalize(path, python=str(python))
        assert said in str(caught.value) and caught.value.hint
    assert snapshot(path) == before


def test_the_llvm_ir_of_a_finalized_kernel_still_runs_in_the_emulator(build: Build, triton: StandIn, kernels: dict[str, Any]) -> None:
    """Its shared memory is not the binary's: 0 bytes would stop the exchange between the warps of this reduction."""
    path = build()
    triton.behave(every={"shared": 0})
    finalize(path, python=triton.python)
    bundle = open_bundle(path)
    digest, program = keyed("softmax")
    kernel = bundle.manifest.kernels[digest]
    files = {name: bundle.read(f"kernels/{digest[:16]}/{name}") for name in kernel.files}
    again = BuiltKernel(digest, kernel.tier, kernel.missing, files, kernel.launch, kernel.facts)
    (first,) = (k for k in kernels["metax"] if k.digest == digest)
    assert again.launch["shared"] == 0 and first.launch["shared"]
    symbols = {s.name: max(s.lo, 2) for s in program.symbols}
    found = []
    for built in (first, again):
        tensors = buffers(program, symbols, 1)
        execute_built(built, "generic", tensors, list(symbols.values()), orders=("forward",))
        found.append(tensors)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


TWICE = """
program twice
  symbol s0 in 1..64 from dim x 0
  buffer x: f32[s0, 8] input
  buffer y: f32[s0, 8] temp
  kernel k {i0 < s0, i1 < 8} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1]
    v1: f32 = add v0, v0
    store y[i0, i1] = v1
  outputs y
"""


def test_what_was_finalized_is_loaded_and_launched(triton: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before, launched after: over a recording driver, with the binary and the number of null pointers that the tool told."""
    program = parse_program(TWICE)
    (kernel,) = program.steps
    assert isinstance(kernel, Kernel)
    alone = isolate(program, kernel)
    key = digest_of(alone.program)
    (built,) = build_maca([(key, alone.program)], find_target("metax"))
    path = tmp_path / "twice"
    record_built(write_bundle(path, name="t", target="metax", parts={"step": launch_list(program, {"k": (alone, key)})}, kernels=[built]))
    with pytest.raises(BundleError, match="flagtree finalize"):
        flagtree.load(path)
    names = len(built.launch["signature"])  # type: ignore[arg-type]
    triton.behave(every={"arguments": names + 3})
    finalize(path, python=triton.python)
    recording = Recording("metax", tmp_path)
    recording.describe(f"ft_{key[:16]}", "p" * (names - 1) + "innn")
    device = Device(recording.driver, "compiled", compile_launcher(tmp_path))
    monkeypatch.setattr(gpu, "find_device", lambda name, tensors=None: device)
    step = flagtree.load(path).parts["step"].bind({})
    x = torch.ones(5, 8)
    y = step({"x": x})["y"]
    (launch,) = recording.lines("launch")
    assert f"ptr:{x.data_ptr():x}" in launch and f"ptr:{y.data_ptr():x}" in launch and "i32:5 null null null" in launch


# -- toolchains that fail --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["fail", "nonsense", "silent", "other symbol", "other machine", "hang"])
def test_mxcc_that_fails_leaves_the_bundle_as_it_was(build: Build, sdk: StandIn, how: str) -> None:
    path = build()
    before = snapshot(path)
    sdk.behave(every=how)
    with pytest.raises(ToolchainError) as caught:
        with_sdk(sdk, path, seconds=1 if how == "hang" else 60)
    said = {"fail": "cannot select: t12", "nonsense": "beginning with 75 73 61 67", "silent": "left no result", "hang": "--timeout",
            "other symbol": "does not define", "other machine": "0x3e"}[how]  # fmt: skip
    assert said in str(caught.value) and "2 failed" in caught.value.what
    assert snapshot(path) == before


def test_some_are_raised_and_the_same_command_goes_on_with_the_rest(build: Build, sdk: StandIn) -> None:
    path = build()
    good, bad = functions(open_bundle(path))
    sdk.behave(**{bad: "fail"})
    first = with_sdk(sdk, path)
    assert [(r.function, r.after) for r in first.kernels] == [(good, "binary"), (bad, "llir")]
    assert "cannot select" in first.failed[0].why and len(first.failed) == 1
    bundle = open_bundle(path)
    bundle.verify()
    assert bundle.manifest.kernels[first.failed[0].digest].missing  # what the next tier needs is still said
    sdk.behave()
    sdk.calls()
    second = with_sdk(sdk, path)
    assert {c["function"] for c in sdk.calls()} == {bad} and not second.failed
    certificate = open_bundle(path).certificate()
    assert certificate is not None
    steps: Any = certificate.evidence["finalized"]
    assert [(s["from"], s["kernels"]) for s in steps] == [(first.source, 1), (first.digest, 1)]


def test_without_a_toolchain_the_error_says_where_it_was_looked_for(build: Build, tmp_path: Path) -> None:
    path = build()
    for folder, said in ((None, "MACA_PATH is not set"), (tmp_path, "is not below it")):
        with settings.override(maca_path=folder), pytest.raises(ToolchainError, match="no toolchain of MetaX") as caught:
            finalize(path)
        assert said in caught.value.why and "--python" in caught.value.hint


# -- the bundle ------------------------------------------------------------------------------------------------------
def test_out_and_one_file(build: Build, sdk: StandIn, tmp_path: Path) -> None:
    path = build()
    before = snapshot(path)
    report = with_sdk(sdk, path, out=tmp_path / "done")
    assert report.path == str(tmp_path / "done" / "small") and snapshot(path) == before
    file = with_sdk(sdk, path, out=tmp_path / "done.ftb")
    assert open_bundle(tmp_path / "done.ftb").digest == file.digest == report.digest
    again = with_sdk(sdk, tmp_path / "done.ftb")
    assert not again.tool and again.digest == file.digest
    link = tmp_path / "link"
    link.symlink_to(path)
    assert with_sdk(sdk, link).path == str(path) and link.is_symlink() and open_bundle(path).digest == report.digest


def test_a_bundle_that_nobody_vouches_for_is_not_finalized(build: Build, sdk: StandIn) -> None:
    path = build(trusted=False, name="stranger", coverage={"note": "from somewhere else"})
    digest = open_bundle(path).digest
    with pytest.raises(UntrustedBundle, match=f"--trust {digest}"):
        with_sdk(sdk, path)
    with pytest.raises(UntrustedBundle, match="not the one that you trust"):
        with_sdk(sdk, path, trust="0" * 64)
    assert not sdk.calls()
    assert with_sdk(sdk, path, trust=digest).trusted


def test_a_damaged_bundle_or_certificate_is_refused(build: Build, sdk: StandIn) -> None:
    path = build()
    certificate = path / "certificate.json"
    original = certificate.read_bytes()
    certificate.write_bytes(original.replace(b"pass", b"PASS"))
    with pytest.raises(BundleError, match="certificate was edited"):
        with_sdk(sdk, path)
    certificate.write_bytes(original)
    kernel = next(path.glob("kernels/*/kernel.py"))
    kernel.write_bytes(kernel.read_bytes() + b"#")
    with pytest.raises(BundleError, match="damaged or was edited"):
        with_sdk(sdk, path)
    assert not sdk.calls()


def test_a_bundle_in_the_store_is_not_changed_in_its_place(build: Build, sdk: StandIn, tmp_path: Path) -> None:
    path = build()
    with settings.override(cache_dir=tmp_path), pytest.raises(BundleError, match="--out"):
        with_sdk(sdk, path, trust=open_bundle(path).digest)


def test_a_place_that_cannot_be_written_costs_no_work(build: Build, sdk: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build()
    before, mkdir = snapshot(path), Path.mkdir

    def refuse(folder: Path, *arguments: Any, **options: Any) -> None:
        if folder.name.endswith(".building"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        mkdir(folder, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="--out names another place"):
        with_sdk(sdk, path)
    assert snapshot(path) == before and not sdk.calls()


def test_a_store_that_cannot_be_written_vouches_for_nothing(build: Build, sdk: StandIn, tmp_path: Path) -> None:
    path = build(trusted=False, coverage={"note": "read-only store"})
    (tmp_path / "file").write_text("")
    with settings.override(cache_dir=tmp_path / "file"):
        report = with_sdk(sdk, path, trust=open_bundle(path).digest)
    assert not report.trusted and not report.failed and open_bundle(path).digest == report.digest


def test_a_place_that_is_something_else_costs_no_work(build: Build, sdk: StandIn, tmp_path: Path) -> None:
    (tmp_path / "done").write_text("notes")
    with pytest.raises(StoreError, match="a file stands where a folder should"):
        with_sdk(sdk, build(), out=tmp_path / "done")
    (tmp_path / "more" / "small").mkdir(parents=True)
    (tmp_path / "more" / "small" / "letter").write_text("dear")
    with pytest.raises(BundleError, match="no bundle stands"):
        with_sdk(sdk, build(), out=tmp_path / "more")
    assert not sdk.calls()


def test_a_bundle_that_changes_meanwhile_is_left_alone(build: Build, sdk: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build()
    run = module._run

    def slow(*arguments: Any) -> Any:
        made = run(*arguments)
        build(versions={"triton": "another"})
        return made

    monkeypatch.setattr(module, "_run", slow)
    with pytest.raises(BundleError, match="changed while it was finalized"):
        with_sdk(sdk, path)
    assert open_bundle(path).manifest.versions == {"triton": "another"}
    sdk.calls()
    monkeypatch.undo()
    with_sdk(sdk, path)
    assert not sdk.calls()  # what was finished was kept


def test_a_manifest_that_does_not_say_how_a_kernel_was_built(build: Build, sdk: StandIn, kernels: dict[str, list[BuiltKernel]]) -> None:
    launch = dict(kernels["metax"][0].launch)
    del launch["stages"]
    with pytest.raises(BundleError, match="does not say how a kernel was built"):
        with_sdk(sdk, build(kernels=[replace(kernels["metax"][0], launch=launch)]))
    with pytest.raises(BundleError, match="no aligned.llir"):
        with_sdk(sdk, build(kernels=[replace(kernels["metax"][0], files={"kernel.py": b""})]))


# -- interruption ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_loses_nothing(build: Build, sdk: StandIn, repository: Path, number: signal.Signals) -> None:
    path = build()
    before = snapshot(path)
    quick, slow = functions(open_bundle(path))
    sdk.behave(**{slow: "hang"})
    environment = {**os.environ, "MACA_PATH": str(sdk.home), "PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", "flagtree", "finalize", str(path), "-j", "1"]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    record, deadline = sdk.home / "record", time.monotonic() + 100
    while not (record.exists() and slow in record.read_text()):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(number)
    _, said = running.communicate(timeout=20)
    assert running.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), said
    assert snapshot(path) == before
    sdk.behave()
    if number == signal.SIGKILL:  # nobody can end the children of a process that is killed like this
        os.kill(sdk.calls()[-1]["process"], signal.SIGKILL)
    else:
        assert not Path(f"/proc/{sdk.calls()[-1]['process']}").exists()
    report = with_sdk(sdk, path)
    assert not report.failed
    assert {c["function"] for c in sdk.calls()} == {slow}, f"{quick} was finished before the signal"


# -- real tools ------------------------------------------------------------------------------------------------------
def test_all_binaries_and_no_tool_is_nothing_to_do(build: Build, tmp_path: Path) -> None:
    path = build("cuda:sm90")
    before = snapshot(path)
    report = finalize(path)
    assert not report.tool and report.digest == report.source and snapshot(path) == before
    finalize(path, out=tmp_path / "copy")
    assert snapshot(tmp_path / "copy" / "small") == before


def test_the_same_triton_once_more_makes_the_same_binaries(build: Build) -> None:
    path = build("cuda:sm90")
    before = open_bundle(path)
    files = {n: before.read(n) for n in before.manifest.files}
    report = finalize(path, python=sys.executable, jobs=2)
    after = open_bundle(path)
    assert report.digest != report.source  # it says who made it
    assert {n: after.read(n) for n in after.manifest.files} == files
    for digest, kernel in after.manifest.kernels.items():
        was = before.manifest.kernels[digest]
        assert kernel.launch == was.launch
        assert {k: v for k, v in kernel.facts.items() if k != "finalized"} == was.facts


def _ptxas() -> list[Path]:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return sorted(folder.glob("ptxas*"))


@pytest.mark.parametrize("program", _ptxas() if not stock_triton.problem() else [], ids=lambda p: p.name)
def test_another_ptxas(build: Build, program: Path) -> None:
    path = build("cuda:sm90")
    before = open_bundle(path)
    files = {n: before.read(n) for n in before.manifest.files}
    report = finalize(path, ptxas=str(program), jobs=2)
    after = open_bundle(path)
    release = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert report.tool.removeprefix("ptxas ") in release and not report.failed
    for digest, kernel in after.manifest.kernels.items():
        folder = f"kernels/{digest[:16]}"
        for variant in ("aligned", "generic"):
            assert after.read(f"{folder}/{variant}.ptx") == files[f"{folder}/{variant}.ptx"]
            told: Any = kernel.facts[variant]
            assert 8 <= told["registers"] <= 255 and told["spills"] == 0
            if program.name == "ptxas-blackwell":  # which the build used for this chip: the same options give the same instructions
                code = [_elf(data)[1] for data in (files[f"{folder}/{variant}.cubin"], after.read(f"{folder}/{variant}.cubin"))]
                one, two = ({s.name: s.data for s in sections if s.name.startswith(".text.")} for sections in code)
                assert one and one == two
        assert kernel.launch == before.manifest.kernels[digest].launch


@pytest.mark.parametrize("python", OTHERS or [pytest.param("", marks=pytest.mark.skip(
    reason="FLAGTREE_TEST_TRITON_PYTHONS names no Python with another Triton release"))])  # fmt: skip
def test_another_release_of_triton(build: Build, python: str) -> None:
    path = build("cuda:sm90")
    report = finalize(path, python=python, jobs=2)
    after = open_bundle(path)
    assert not report.failed and report.tool.startswith("triton 3.")
    wide = re.compile(r"ld\.global[.\w:]*\.v[248]|st\.global[.\w:]*\.v[248]")
    for digest, kernel in after.manifest.kernels.items():
        launch: Any = kernel.launch
        for name, variant in launch["variants"].items():
            folder = f"kernels/{digest[:16]}"
            text = after.read(f"{folder}/{name}.ptx").decode()
            # the promises reached that release, and only the variant that makes them; softmax has nothing wide at its width
            assert bool(wide.search(text)) == (name == "aligned" and digest == keyed("rmsnorm")[0])
            entry = text.split(".entry", 1)[1].split(")", 1)[0]
            assert entry.count(".param") == len(launch["signature"]) + variant["null_pointers"]


# -- the command -----------------------------------------------------------------------------------------------------
def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flagtree", "finalize", *arguments]
    repository = str(Path(__file__).resolve().parent.parent)
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": repository, **environment}, capture_output=True, text=True, check=False)


def test_the_command(build: Build, sdk: StandIn) -> None:
    path = build()
    good, bad = functions(open_bundle(path))
    sdk.behave(**{bad: "fail"})
    partial = run_command(str(path), MACA_PATH=str(sdk.home), COLUMNS="200")
    assert partial.returncode == 2 and "error: 1 of 2 kernels were not raised" in partial.stderr and "Traceback" not in partial.stderr
    assert good in partial.stdout and "cannot select" in partial.stdout
    sdk.behave()
    done = run_command(str(path), "--json", MACA_PATH=str(sdk.home))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["raised"], report["failed"], report["digest"]) == (1, 0, open_bundle(path).digest)
    nothing = run_command(str(path))
    assert nothing.returncode == 0 and "nothing to raise" in nothing.stdout
    refused = run_command(str(path), "--ptxas", "ptxas")
    assert refused.returncode == 2 and "ptxas makes no code for metax" in refused.stderr and refused.stderr.count("error:") == 1
