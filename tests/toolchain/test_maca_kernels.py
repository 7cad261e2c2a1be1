"""Every kind of generated kernel through its MACA LLVM IR, executed in the emulator, against PyTorch eager and the interpreter."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from flagtree.errors import FlagtreeError
from flagtree.ir import interp
from flagtree.ir.canonical import Isolated, digest, isolate
from flagtree.ir.program import Kernel
from flagtree.ir.text import parse_program
from flagtree.targets import find_target
from flagtree.toolchain import emulator, emulator_session, maca
from flagtree.toolchain.base import BuiltKernel
from flagtree.toolchain.triton_aot import Workers, workers
from tests.scheduled import build_for_emulation, build_maca, build_triton, generate
from tests.toolchain.maca_programs import CASES, Case, Tensors

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
# Pythons with other Triton releases, e.g. FLAGTREE_TEST_TRITON_PYTHONS=.triton36/bin/python
OTHERS = [p for p in os.environ.get("FLAGTREE_TEST_TRITON_PYTHONS", "").split(os.pathsep) if p]
KEYS = [(name, dtype) for name in CASES for dtype in DTYPES]


def full(name: str) -> ParameterSet:
    return pytest.param(name, marks=pytest.mark.full)


def isolated(name: str, dtype: str) -> Isolated:
    program = parse_program(re.sub(r"\bD\b", dtype, CASES[name].text))
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return isolate(program, kernel)


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, str], BuiltKernel]:
    parts = {key: isolated(*key).program for key in KEYS}
    return dict(zip(KEYS, build_maca([(digest(p), p) for p in parts.values()], find_target("metax"), 2), strict=True))


def execute(kernel: BuiltKernel, part: Isolated, variant: str, given: Tensors, size: tuple[int, ...]) -> Tensors:
    """The kernel's buffers after an emulated run in three orders of threads; what nobody writes stays NaN or -1."""
    named = dict(zip(_symbols(part), size, strict=True))
    tensors = {}
    for actual, buffer in zip(part.buffers, part.program.buffers, strict=True):
        shape = [extent.evaluate({f"n{i}": named[s] for i, s in enumerate(part.symbols)}) for extent in buffer.shape]
        dtype = getattr(torch, {"bf16": "bfloat16", "f32": "float32", "i64": "int64"}[buffer.dtype])
        fresh = torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)
        tensors[actual] = given[actual].clone() if actual in given else fresh
    emulator.execute_built(kernel, variant, [tensors[name] for name in part.buffers], [named[name] for name in part.symbols])
    return tensors


def _symbols(part: Isolated) -> list[str]:
    return sorted(part.symbols, key=lambda name: int(name[1:]))


def check(case: Case, got: Tensors, given: Tensors) -> None:
    """DESIGN §9: integers and exact kernels to the bit; floats at most 4 times eager's own error against float64, plus 1e-6 of the mean."""
    eager = case.eager(given)
    truth = case.eager({n: t.double() if t.is_floating_point() else t for n, t in given.items()})
    for name, expected in eager.items():
        found = got[name]
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if case.exact or not expected.is_floating_point():
            assert torch.equal(found, expected), name
        elif expected.numel():
            exact = truth[name]
            own, error = ((t.double() - exact).square().mean().sqrt().item() for t in (expected, found))
            assert error <= 4 * own + 1e-6 * exact.abs().mean().item(), f"{name}: error {error:.3e}, eager's own {own:.3e}"


@pytest.mark.parametrize(("name", "dtype"), KEYS)
def test_numbers_are_eagers(built: dict[tuple[str, str], BuiltKernel], name: str, dtype: str) -> None:
    case, part, kernel = CASES[name], isolated(name, dtype), built[name, dtype]
    for size in case.sizes:
        torch.manual_seed(sum(size))
        given = case.given(DTYPES[dtype], size)
        results = [execute(kernel, part, variant, given, size) for variant in ("aligned", "generic")]
        check(case, results[0], given)
        for buffer in results[0]:
            assert torch.equal(*(r[buffer].contiguous().view(torch.uint8) for r in results)), f"the variants differ in {buffer} at {size}"


@pytest.mark.parametrize("name", list(CASES))
def test_numbers_are_the_interpreters(built: dict[tuple[str, str], BuiltKernel], name: str) -> None:
    case, part = CASES[name], isolated(name, "bf16")
    size = case.sizes[len(case.sizes) // 2]
    torch.manual_seed(1)
    given = case.given(torch.bfloat16, size)
    got = execute(built[name, "bf16"], part, "generic", given, size)
    program = parse_program(re.sub(r"\bD\b", "bf16", case.text))
    symbols = dict(zip((s.name for s in program.symbols), size, strict=True))
    for buffer, expected in interp.run(program, {n: t.clone() for n, t in given.items()}, symbols=symbols).items():
        if case.exact:
            assert torch.equal(got[buffer], expected)
        else:  # the order of a sum and the last bit of exp may move a rounding, rarely
            torch.testing.assert_close(got[buffer], expected, rtol=2**-7 if expected.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
            assert (got[buffer] != expected).float().mean() < 0.02 or expected.dtype == torch.float32


def test_what_a_build_says(built: dict[tuple[str, str], BuiltKernel]) -> None:
    for kernel in built.values():
        assert (
            kernel.tier == "llir" and "MACA_PATH" in kernel.missing and "mxcc" in kernel.missing and "never on a device" in kernel.missing
        )
        assert set(kernel.files) == {"kernel.py", *(f"{v}.{stage}" for v in ("aligned", "generic") for stage in ("ttir", "llir"))}
        launch = kernel.launch
        assert launch["threads"] == 64 * launch["warps"] <= 512  # type: ignore[operator]
        assert launch["shared"] <= 65536 and len(launch["grid"]) == 3  # type: ignore[operator,arg-type]
        assert not any(re.search(rb"/tmp/|/home/|/work/|loc\(|f0x|bfloat", kernel.files[f"{v}.llir"]) for v in ("aligned", "generic"))


def test_bytes_do_not_depend_on_the_jobs(built: dict[tuple[str, str], BuiltKernel]) -> None:
    keys = [("rms_norm", "bf16"), ("argmax", "f32"), ("softmax", "bf16")]
    parts = [isolated(*key).program for key in keys]
    again = build_maca([(digest(p), p) for p in parts], find_target("metax"), 1)
    assert [k.files for k in again] == [built[key].files for key in keys]
    assert [k.launch for k in again] == [built[key].launch for key in keys]


def test_other_targets_run_their_own_ttir() -> None:
    """What the emulator executes for cuda and rocm is lowered from the very TTIR of their binaries, both variants."""
    keys = [("rms_norm", "bf16"), ("softmax", "f32")]
    parts = [(digest(isolated(*key).program), isolated(*key).program) for key in keys]
    for target in (find_target("cuda:sm80"), find_target("rocm:gfx942")):
        shipped = build_triton(parts, target, 2)
        emulated = build_for_emulation(parts, target, 2)
        for (name, dtype), ours, theirs in zip(keys, emulated, shipped, strict=True):
            for variant in ("aligned", "generic"):
                assert ours.files[f"{variant}.ttir"] == theirs.files[f"{variant}.ttir"]
            assert survives(name, dtype, ours)


@pytest.mark.parametrize("python", OTHERS or [pytest.param("", marks=pytest.mark.skip(
    reason="FLAGTREE_TEST_TRITON_PYTHONS names no Python with another Triton release"))])  # fmt: skip
def test_other_triton_releases_give_the_same_numbers(python: str, tmp_path: Path) -> None:
    target = find_target("metax")
    sources = [(digest(p), generate(p, digest(p), target)) for p in (isolated(*key).program for key in KEYS)]
    pool = Workers(tmp_path, 2, python=python)
    try:
        kernels = maca.build_sources(sources, target, pool)
    finally:
        pool.close()
    for (name, dtype), kernel in zip(KEYS, kernels, strict=True):
        assert survives(name, dtype, kernel), f"{name} in {dtype} with {python}"


# -- broken code must be seen -------------------------------------------------------------------------------------------
def survives(name: str, dtype: str, kernel: BuiltKernel) -> bool:
    """Whether the kernel still passes at every size of its case."""
    case, part = CASES[name], isolated(name, dtype)
    for size in case.sizes:
        torch.manual_seed(sum(size))
        given = case.given(DTYPES[dtype], size)
        try:
            check(case, execute(kernel, part, "generic", given, size), given)
        except (AssertionError, FlagtreeError):
            return False
    return True


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers]:
    with workers(1) as running:
        yield running


def rebuilt(pool: Workers, kernel: BuiltKernel, name: str, dtype: str, text: str) -> BuiltKernel:
    """The kernel from changed Triton source, through the same toolchain."""
    program = isolated(name, dtype).program
    source = dataclasses.replace(generate(program, kernel.digest, find_target("metax")), text=text)
    return maca.build_sources([(kernel.digest, source)], find_target("metax"), pool)[0]


@pytest.mark.parametrize("name", ["rms_norm", "softmax", "argmax", full("residual_norm"), full("layer_norm")])
def test_deleting_any_barrier_that_orders_a_reduction_is_seen(built: dict[tuple[str, str], BuiltKernel], name: str) -> None:
    kernel = built[name, "f32"]
    text, barrier = kernel.files["generic.llir"].decode(), "  call void @llvm.mxc.barrier()\n"
    parts = text.split(barrier)
    assert len(parts) > 1
    seen = 0
    for i in range(len(parts) - 1):
        broken = barrier.join(parts[: i + 1]) + parts[i + 1] + "".join(barrier + part for part in parts[i + 2 :])
        seen += not survives(name, "f32", dataclasses.replace(kernel, files={**kernel.files, "generic.llir": broken.encode()}))
    assert seen >= (len(parts) - 1 + 1) // 2, f"{seen} of {len(parts) - 1} missing barriers seen"
    assert survives(name, "f32", kernel)


@pytest.mark.parametrize("name", ["softmax", "concatenate", full("silu_mul"), full("rms_norm_odd"), full("layer_norm")])
def test_deleting_any_mask_is_seen(pool: Workers, built: dict[tuple[str, str], BuiltKernel], name: str) -> None:
    kernel = built[name, "f32"]
    text = kernel.files["kernel.py"].decode()
    masks = list(re.finditer(r", mask=.*?(?=\)$)", text, re.MULTILINE))
    assert masks
    for mask in masks:
        broken = text[: mask.start()] + text[mask.end() :]
        assert not survives(name, "f32", rebuilt(pool, kernel, name, "f32", broken)), f"nobody missed {mask[0]}"


@pytest.mark.parametrize("name", ["residual_norm", full("rotary_norm")])
def test_deleting_a_rounding_is_seen(pool: Workers, built: dict[tuple[str, str], BuiltKernel], name: str) -> None:
    """The interpreter's bits are the measure: a value that eager rounds to bf16 must be rounded where the next op is fused."""
    kernel = built[name, "bf16"]
    text = kernel.files["kernel.py"].decode()
    case, part, size = CASES[name], isolated(name, "bf16"), CASES[name].sizes[1]
    torch.manual_seed(2)
    given = case.given(torch.bfloat16, size)
    good = execute(kernel, part, "generic", given, size)
    expected = dict(case.eager(given))
    wrong = {n: (good[n] != e).float().mean().item() for n, e in expected.items()}
    assert max(wrong.values()) < 0.005
    roundings = [m for m in re.finditer(r"\.to\(tl\.bfloat16\)", text) if not text[m.end() :].startswith("\n    tl.store")]
    seen = 0
    for match in roundings:
        broken = rebuilt(pool, kernel, name, "bf16", text[: match.start()] + ".to(tl.float32)" + text[match.end() :])
        got = execute(broken, part, "generic", given, size)
        seen += any((got[n] != e).float().mean().item() > 0.02 for n, e in expected.items())
    assert seen >= 2, f"{seen} of {len(roundings)} missing roundings seen"


@pytest.mark.full
def test_fifteen_kernels_cost_little(built: dict[tuple[str, str], BuiltKernel]) -> None:
    """The certificate runs each distinct kernel once: at most 15 CPU seconds for 15 kernels (here: well below, tests share the machine)."""
    session = emulator_session.current()
    before, started = sum(_cpu(session)), time.process_time()
    for name in CASES:
        case, part = CASES[name], isolated(name, "bf16")
        size = case.sizes[-1] if name != "far_rows" else (1,)
        torch.manual_seed(3)
        execute(built[name, "bf16"], part, "aligned", case.given(torch.bfloat16, size), size)
    assert time.process_time() - started + sum(_cpu(session)) - before < 15


def _cpu(session: emulator_session.Session) -> tuple[float, float]:
    """Seconds of user and system time of the emulator's process and its children."""
    fields = Path(f"/proc/{session._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    user, system, child_user, child_system = (int(f) / 100 for f in fields[11:15])
    return user + child_user, system + child_system
