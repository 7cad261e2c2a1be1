"""Stock Triton ahead of time: binaries for each family, what is promised about them, equal bytes, and compilers that fail."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flagtree.codegen.triton import TritonSource
from flagtree.errors import ToolchainError
from flagtree.ir.parse import parse_program
from flagtree.settings import settings
from flagtree.targets import find_target, stock_triton
from flagtree.targets.base import Target
from flagtree.toolchain import triton_aot
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.triton_aot import STAGES, Compiled, Workers, check_limits, workers
from tests.codegen.triton_kernels import GFX942, SM80, SM90, TEXTS, keyed
from tests.scheduled import build_triton as build
from tests.scheduled import generate
from tests.toolchain.triton31 import compiled_by_31

pytestmark = pytest.mark.skipif(bool(stock_triton.problem()), reason=stock_triton.problem() or "Triton is here")

NAMES = (
    "rmsnorm",
    "residual",
    "rotary",
    "silu_mul",
    "softmax",
    "layernorm",
    "cross_entropy",
    "argmax",
    "cumsum",
    "rmsnorm_long",
    "columns",
)
Built = dict[str, dict[str, BuiltKernel]]


@pytest.fixture(scope="module")
def built() -> Built:
    kernels = [keyed(n) for n in NAMES]
    return {t.name: dict(zip(NAMES, build(kernels, t, jobs=2), strict=True)) for t in (SM80, SM90, GFX942)}


@pytest.fixture
def pool() -> Iterator[Workers]:
    with workers(1, seconds=20) as pool:
        yield pool


def _each(built: Built, *targets: Target) -> Iterator[tuple[str, BuiltKernel]]:
    for target in targets:
        for name, kernel in built[target.name].items():
            yield f"{name} for {target.name}", kernel


def test_every_kernel_reaches_the_binary_in_both_variants(built: Built) -> None:
    for where, kernel in _each(built, SM80, SM90, GFX942):
        family = "hip" if "rocm" in where else "cuda"
        assert kernel.tier == "binary" and not kernel.missing
        assert set(kernel.files) == {"kernel.py"} | {f"{v}.{s}" for v in ("aligned", "generic") for s in STAGES[family]}, where
        assert all(kernel.files.values())
        assert kernel.files[f"aligned.{STAGES[family][-1]}"][:4] == b"\x7fELF"


def test_no_multiplication_is_contracted_with_an_addition(built: Built) -> None:
    """sm_80 multiplies two bf16 by an fma with -0; that is the product, rounded once.  f32 has no fma at all."""
    for where, kernel in _each(built, SM80, SM90):
        for name in ("aligned.ptx", "generic.ptx"):
            text = kernel.files[name].decode()
            assert not re.search(r"fma\.rn(\.ftz)?\.f(32|64)|mad\.(rn\.)?f", text), f"{where} {name}"
    for where, kernel in _each(built, GFX942):
        body = kernel.files["generic.amdgcn"].decode()
        kept = {"cross_entropy", "softmax", "argmax", "layernorm"}  # division, root and exp2 are expanded with fma, exactly
        assert (
            where.split()[0] in kept or "div" in kernel.files["kernel.py"].decode() or not re.search(r"v_(fma|mac|fmac|mad)_f32", body)
        ), where


def test_contraction_is_an_option_of_the_kernel() -> None:
    digest, program = keyed("rmsnorm")
    kernel = program.steps[0]
    loose = program.with_(steps=(replace(kernel, numerics=replace(kernel.numerics, fp_contract=True)),))  # type: ignore[union-attr,arg-type]
    assert "fma.rn.f32" in build([(digest, loose)], SM90, jobs=1)[0].files["aligned.ptx"].decode()


def test_the_ptx_is_for_the_oldest_driver(built: Built) -> None:
    for where, kernel in _each(built, SM80, SM90):
        text = kernel.files["aligned.ptx"].decode()
        assert ".version 8.2" in text, where
        assert f".target sm_{80 if 'sm80' in where else '90a'}" in text


def test_only_the_aligned_variant_uses_wide_accesses(built: Built) -> None:
    for name in ("rmsnorm", "silu_mul", "residual", "columns"):
        files = built["cuda:sm90"][name].files
        wide = re.compile(rb"ld\.global[.\w:]*\.v[248]|st\.global[.\w:]*\.v[248]")
        assert wide.search(files["aligned.ptx"]), name
        assert not wide.search(files["generic.ptx"]), name
        assert b"tt.divisibility" in files["aligned.ttir"] and b"tt.divisibility" not in files["generic.ttir"]
        assert b"_dwordx4" in built["rocm:gfx942"][name].files["aligned.amdgcn"] or name == "columns"
    text = built["rocm:gfx942"]["rmsnorm"].files["generic.amdgcn"]
    assert b"buffer_load_ushort" in text and b"buffer_load_dwordx" not in text


def test_the_launch_record_says_what_a_launcher_must_pass_and_check(built: Built) -> None:
    for where, kernel in _each(built, SM90, GFX942):
        launch = kernel.launch
        assert json.loads(json.dumps(launch)) == launch
        text = kernel.files["kernel.py"].decode()
        assert f"def {launch['function']}({', '.join(n for n, _ in launch['signature'])}):" in text  # type: ignore[attr-defined]
        for name, variant in launch["variants"].items():  # type: ignore[attr-defined]
            assert variant["file"] in kernel.files and variant["null_pointers"] == 2, where
            assert (variant["requires"] != []) == (name == "aligned")
            assert not any(n.startswith("n") for n in variant["requires"])


def test_the_facts_come_from_the_tools(built: Built) -> None:
    for where, kernel in _each(built, SM80, SM90, GFX942):
        for variant in ("aligned", "generic"):
            facts = kernel.facts[variant]
            assert 0 < facts["registers"] <= 255 and facts["spills"] == 0, where  # type: ignore[index]
            assert facts["threads"] == kernel.launch["threads"]  # type: ignore[index]
    assert built["cuda:sm90"]["rmsnorm"].facts["aligned"]["shared"] == 32  # type: ignore[index]


def test_two_builds_from_two_folders_give_the_same_bytes(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "ein Ordner für Versuche"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    monkeypatch.setenv("HOME", str(elsewhere))
    names = ("rotary", "cross_entropy")
    for target in (SM90, GFX942):
        again = build([keyed(n) for n in names], target, jobs=1)
        for name, kernel in zip(names, again, strict=True):
            assert kernel == built[target.name][name]
    assert not list(elsewhere.iterdir())


def test_no_path_of_this_machine_is_in_a_file(built: Built) -> None:
    parts = [str(Path.home()), tempfile.gettempdir() + os.sep, str(Path(__file__).parents[2]), "site-packages"]
    for where, kernel in _each(built, SM80, SM90, GFX942):
        for name, content in kernel.files.items():
            assert not any(p.encode() in content for p in parts), f"{where} {name}"


def _broken(text: str) -> TritonSource:
    digest, program = keyed("scalar")
    source = generate(program, digest, SM90)
    return replace(source, text=source.text.replace("import triton\n", f"import triton\n{text}\n", 1))


def _submit(pool: Workers, source: TritonSource) -> Compiled:
    assert SM90.triton is not None
    return pool.submit(source, SM90.triton, {}, STAGES["cuda"]).result()


def test_a_compiler_that_dies_is_an_error_of_its_kernel_alone(pool: Workers) -> None:
    with pytest.raises(ToolchainError, match="LLVM ERROR: out of ideas") as caught:
        _submit(pool, _broken("import os; os.write(2, b'LLVM ERROR: out of ideas\\n'); os.abort()"))
    assert "ft_" in caught.value.where
    assert "generic.cubin" in _submit(pool, _broken("")).files


def test_a_compiler_that_hangs_is_stopped() -> None:
    with workers(1, seconds=3) as pool:
        with pytest.raises(ToolchainError, match="did not finish in 3 s"):
            _submit(pool, _broken("while True: pass"))
        assert all(w.process.poll() is not None for w in pool.started)


def test_a_kernel_that_triton_refuses_says_why(pool: Workers) -> None:
    source = _broken("")
    with pytest.raises(ToolchainError, match="no_such_function"):
        _submit(pool, replace(source, text=source.text.replace("tl.sqrt_rn", "tl.no_such_function")))


def test_limits_of_the_target_are_checked() -> None:
    source = _broken("")
    fine = {"shared": 0, "threads": 128, "scratch": 0, "arguments": len(source.signature) + 2}
    check_limits(source, Compiled({}, {"generic": fine}), SM90)
    for bad, said in (
        ({"scratch": 16}, "scratch"),
        ({"shared": 300_000}, "shared memory"),
        ({"threads": 2048}, "threads"),
        ({"arguments": -1}, "counted"),
    ):
        with pytest.raises(ToolchainError, match=said):
            check_limits(source, Compiled({}, {"generic": {**fine, **bad}}), SM90)


@pytest.mark.parametrize("version", [None, "3.5.1", "3.10.0", "main"])
def test_a_missing_or_untested_triton_is_an_error_that_says_what_to_install(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_triton, "installed", lambda: version)
    with pytest.raises(ToolchainError) as caught:
        build([keyed("scalar")], SM90, jobs=1)
    assert caught.value.hint == 'pip install "flagtree-toolkit[triton]"'
    assert (version or "not installed") in caught.value.why
    reach = SM90.probe()
    assert reach.tier == "source" and reach.how == caught.value.hint


def test_a_target_without_stock_code_generation_is_refused() -> None:
    with pytest.raises(ToolchainError, match="no code generator for metax"):
        build([keyed("scalar")], find_target("metax"), jobs=1)


@pytest.mark.parametrize("target", ["cuda:sm86", "cuda:sm89", "cuda:sm100", "cuda:sm120", "rocm:gfx90a"])
def test_the_other_chips(target: str) -> None:
    kernels = build([keyed("residual"), keyed("argmax")], find_target(target), jobs=2)
    assert [k.tier for k in kernels] == ["binary"] * 2


def test_progress_counts_kernels() -> None:
    class Count:
        done = 0

        def phase(self, name: str, total: int | None = None) -> None: ...

        def advance(self, count: int = 1) -> None:
            self.done += count

    count = Count()
    build([keyed("scalar"), keyed("cumsum")], SM80, 2, count)
    assert count.done == 2


@pytest.mark.skipif(settings.triton31_python is None, reason="FLAGTREE_TRITON31_PYTHON names no Python with stock Triton 3.1")
def test_stock_triton_31_compiles_every_kernel(tmp_path: Path) -> None:
    """The gate that stands for MetaX's fork of Triton 3.1: the same text, for cuda:80."""
    assert compiled_by_31({name: generate(keyed(name)[1], keyed(name)[0], SM80) for name in TEXTS}, tmp_path) == {}


def test_the_pool_is_idle_when_nothing_is_built() -> None:
    assert build([], SM90, jobs=4) == []
    assert triton_aot.check_triton().startswith("3.")


PRODUCT = """program isolated
  symbol n0 in 1..512 from argument
  buffer b0: i32[5] input
  buffer b1: i32[2*n0] input
  buffer b2: bf16[n0, 256] input
  buffer b3: bf16[4, 256, 256] input
  buffer b4: bf16[2*n0, 128] temp
  kernel kernel {i0 < 2*n0, i1 < 128} reduce {r0 < 4, r1 < 256} numerics(eager, contract=on, acc=f32)
    schedule lane=i1 tiles(i0=64, i1=64, r1=64) loop(r1) warps=4 stages=2
    v0: i32 = load b0[r0 + 1]
    v1: i32 = index i0
    v2: b1 = le v0, v1
    v3: i32 = cast v2
    v4: i32 = sum v3 over r0
    v5: i32 = load b1[i0]
    v6: i32 = floordiv v5, 2
    v7: bf16 = load b2[v6, r1]
    v8: f32 = cast v7
    v9: bf16 = load b3[v4, i1, r1]
    v10: f32 = cast v9
    v11: f32 = mul v8, v10
    v12: f32 = sum v11 over r1
    v13: bf16 = load b3[v4, i1 + 128, r1]
    v14: f32 = cast v13
    v15: f32 = mul v8, v14
    v16: f32 = sum v15 over r1
    v17: bf16 = cast v12
    v18: bf16 = cast v16
    v19: f32 = cast v17
    v20: f32 = cast v18
    v21: f32 = neg v19
    v22: f32 = exp v21
    v23: f32 = add 1.0, v22
    v24: f32 = div v19, v23
    v25: bf16 = cast v24
    v26: f32 = cast v25
    v27: f32 = mul v26, v20
    v28: bf16 = cast v27
    store b4[i0, i1] = v28
  outputs b4
"""


def test_copies_ahead_of_a_loop_are_the_aligned_variants_own() -> None:
    """A product of experts in bf16: NVIDIA's copies to shared memory move four bytes or more, which an element without promises is not."""
    (kernel,) = triton_aot.build([("e" * 64, parse_program(PRODUCT))], SM90, 1)
    assert b"cp.async" in kernel.files["aligned.ptx"] and b"cp.async" not in kernel.files["generic.ptx"]
    assert kernel.files["aligned.ptx"].count(b"wgmma.mma_async") == kernel.files["generic.ptx"].count(b"wgmma.mma_async") > 0
