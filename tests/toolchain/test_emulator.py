"""The emulator on small kernels written in MACA LLVM IR: what it must report, and that a fault never takes the caller with it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from flagtree.errors import ToolchainError
from flagtree.toolchain import emulator, emulator_session
from flagtree.toolchain.base import BuiltKernel

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())

TAIL = """
declare i32 @llvm.mxc.thread.id.x()
declare i32 @llvm.mxc.block.id.x()
declare i32 @llvm.mxc.block.id.y()
declare void @llvm.mxc.barrier()
declare i32 @llvm.mxc.bsm.bpermute(i32, i32)
"""
POINTER = "ptr addrspace(1)"
COPY = """  %p = getelementptr i32, ptr addrspace(1) %0, i32 %t
  %v = load i32, ptr addrspace(1) %p, align 4
  %q = getelementptr i32, ptr addrspace(1) %1, i32 %t
  store i32 %v, ptr addrspace(1) %q, align 4
"""


def source(body: str, parameters: str = f"{POINTER} %0, {POINTER} %1") -> str:
    return (f"@global_smem = external addrspace(3) global [0 x i8], align 16\n"
            f"define metaxgpu_kernel void @k({parameters}, {POINTER} %scratch, {POINTER} %profile) convergent nounwind {{\n"
            f"  %t = call i32 @llvm.mxc.thread.id.x()\n{body}  ret void\n}}\n{TAIL}")  # fmt: skip


def kernel(body: str) -> emulator.Emulated:
    return emulator.load(source(body), "k", ["*i32", "*i32"])


def integers(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


def test_copies_in_place_and_leaves_holes_alone() -> None:
    x, base = integers(64), torch.full((130,), -7, dtype=torch.int32)
    run = kernel(COPY).run((1,), 1, [x, base[1:65]])
    assert base.tolist() == [-7, *range(64), *[-7] * 65]
    assert run == emulator.Run(1, 0, 0, 64)


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_tensors_that_overlap_overlap_in_the_emulator(order: str) -> None:
    base = integers(80)
    kernel(COPY).run((1,), 1, [base[:64], base[16:]], order=order)
    assert base[:16].tolist() == list(range(16))
    if order == "reverse":  # the highest thread first: every load sees the old value
        assert base[16:].tolist() == list(range(64))
    if order == "forward":
        assert base[16:].tolist() == [i % 16 for i in range(64)]


@pytest.mark.parametrize(("bad", "order", "where"), [
    (16, "forward", "read 0 bytes past the end of argument 0"), (-16, "reverse", "read 4 bytes before argument 0"),
    (2**20, "forward", "past the end of argument 0"), (-(2**24), "forward", "before argument 0"),
])  # fmt: skip
def test_an_access_outside_is_an_error_with_its_place(bad: int, order: str, where: str) -> None:
    shifted = COPY.replace("i32 %t\n  %v", "i32 %s\n  %v")
    with pytest.raises(ToolchainError, match=where):
        kernel(f"  %s = add i32 %t, {bad}\n{shifted}").run((1,), 1, [integers(64), integers(64)], order=order)
    out = integers(64)
    kernel(COPY).run((1,), 1, [integers(64) + 1, out])  # the same process goes on
    assert out[0] == 1


def test_a_write_outside_is_called_a_write() -> None:
    with pytest.raises(
        ToolchainError, match=r"write 0 bytes past the end of argument 1 \(240 bytes\)[\s\S]*thread 60|thread 60[\s\S]*write 0 bytes"
    ):
        kernel(COPY).run((1,), 1, [integers(64), integers(60)])


def test_one_element_too_far_is_seen_whatever_the_size() -> None:
    """61 elements end 12 bytes before a multiple of 16: exact placement faults, the rounded one sees the damaged pattern."""
    with pytest.raises(ToolchainError, match="past the end of argument 1"):
        kernel(COPY).run((1,), 1, [integers(64), integers(61)], exact=True)
    with pytest.raises(ToolchainError, match="wrote after argument 1"):
        kernel(COPY).run((1,), 1, [integers(64), integers(61)], order="reverse")


def test_empty_tensors_have_no_byte() -> None:
    with pytest.raises(ToolchainError, match=r"argument 0 \(0 bytes\)"):
        kernel(COPY).run((1,), 1, [integers(0), integers(64)])
    assert kernel(COPY).run((1,), 1, [integers(0), integers(0)], blocks=[]).blocks == 0


def test_alignment_of_the_arguments_is_kept() -> None:
    body = "  %a = ptrtoint ptr addrspace(1) %0 to i64\n  %b = trunc i64 %a to i32\n  %c = and i32 %b, 15\n"
    body += "  store i32 %c, ptr addrspace(1) %1, align 4\n"
    base, out = integers(40), torch.empty(1, dtype=torch.int32)
    for order in emulator.ORDERS:
        for first in range(4):
            kernel(body).run((1,), 1, [base[first:], out], order=order)
            assert out.item() == base[first:].data_ptr() % 16


DIVERGENT = """  %c = icmp ult i32 %t, 32
  br i1 %c, label %some, label %all
some:
  call void @llvm.mxc.barrier()
  br label %all
all:
"""
SPLIT = DIVERGENT.replace("label %all\nsome", "label %other\nsome").replace(
    "\nall:", "\nother:\n  call void @llvm.mxc.barrier()\n  br label %all\nall:"
)


@pytest.mark.parametrize(("body", "why"), [
    (DIVERGENT, "at a barrier"), (SPLIT, "at a barrier"),
    (DIVERGENT.replace("call void @llvm.mxc.barrier()", "%g = call i32 @llvm.mxc.bsm.bpermute(i32 0, i32 %t)"), "in a lane exchange"),
])  # fmt: skip
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_threads_that_do_not_meet_are_an_error(body: str, why: str, order: str) -> None:
    with pytest.raises(ToolchainError, match=rf"wait for each other[\s\S]*{why}"):
        kernel(body).run((1,), 1, [integers(1), integers(1)], order=order)


NEIGHBOUR = """  %a = getelementptr i32, ptr addrspace(3) @global_smem, i32 %t
  store i32 %t, ptr addrspace(3) %a, align 4
  call void @llvm.mxc.barrier()
  %n = xor i32 %t, 65
  %b = getelementptr i32, ptr addrspace(3) @global_smem, i32 %n
  %v = load i32, ptr addrspace(3) %b, align 4
  %q = getelementptr i32, ptr addrspace(1) %1, i32 %t
  store i32 %v, ptr addrspace(1) %q, align 4
"""


def test_shared_memory_and_barriers() -> None:
    out = integers(128)
    for order in emulator.ORDERS:
        run = kernel(NEIGHBOUR).run((3,), 2, [integers(1), out], order=order, shared=512)
        assert out.tolist() == [i ^ 65 for i in range(128)] and run.barriers == 3
    kernel(NEIGHBOUR.replace("  call void @llvm.mxc.barrier()\n", "")).run((1,), 2, [integers(1), out], shared=512)
    assert (out == -1).any()  # poison: nobody has written yet


def test_shared_memory_has_its_size() -> None:
    with pytest.raises(ToolchainError, match="past its shared memory"):
        kernel(NEIGHBOUR).run((1,), 2, [integers(1), integers(128)], shared=256)
    with pytest.raises(ToolchainError, match="near no argument"):
        kernel(NEIGHBOUR.replace("%a = getelementptr i32", "%a = getelementptr [2048 x i32]")).run(
            (1,), 2, [integers(1), integers(128)], shared=512
        )
    with pytest.raises(ToolchainError, match="do not fit MACA"):
        kernel(COPY).run((1,), 9, [integers(1), integers(1)])
    with pytest.raises(ToolchainError, match="do not fit MACA"):
        kernel(COPY).run((1,), 1, [integers(1), integers(1)], shared=65537)


RACE = "  store i32 %t, ptr addrspace(1) %1, align 4\n"


def built(body: str, grid: list[object]) -> BuiltKernel:
    launch = {"function": "k", "signature": [["b0", "*i32"], ["b1", "*i32"], ["n0", "i64"]], "grid": grid, "warps": 2, "shared": 512,
              "variants": {"generic": {"shared": 512}}}  # fmt: skip
    text = source(body, f"{POINTER} %0, {POINTER} %1, i64 %count")
    return BuiltKernel("d" * 64, "llir", "", {"generic.llir": text.encode()}, launch)


def test_orders_that_differ_are_a_race() -> None:
    with pytest.raises(ToolchainError, match="other bits in another order"):
        emulator.execute_built(built(RACE, [1, 1, 1]), "generic", [integers(1), integers(1)], [1])
    blocks = "  %b = call i32 @llvm.mxc.block.id.x()\n" + RACE.replace("i32 %t", "i32 %b")
    with pytest.raises(ToolchainError, match="other bits in another order"):
        emulator.execute_built(built(blocks, ["n0", 1, 1]), "generic", [integers(1), integers(1)], [2])
    out = integers(128)
    runs = emulator.execute_built(built(NEIGHBOUR, [["//", ["+", "n0", 1], 2], 1, 1]), "generic", [integers(1), out], [5])
    assert [r.blocks for r in runs] == [3, 3, 3] and out[0] == 65


def test_built_kernels_are_checked() -> None:
    assert emulator.execute_built(built(COPY, ["n0", 1, 1]), "generic", [integers(1), integers(1)], [0]) == []  # an empty grid runs nothing
    with pytest.raises(ToolchainError, match=r"has no aligned\.llir"):
        emulator.execute_built(built(COPY, [1, 1, 1]), "aligned", [integers(64), integers(64)], [1])
    with pytest.raises(ToolchainError, match="takes 3 arguments, not 2"):
        emulator.execute_built(built(COPY, [1, 1, 1]), "generic", [integers(64)], [1])
    with pytest.raises(ToolchainError, match="not an index expression"):
        emulator.execute_built(built(COPY, [["-", "n0", 1], 1, 1]), "generic", [integers(64), integers(64)], [1])


def test_promises_are_checked_before_the_run() -> None:
    kernel = built(COPY, [1, 1, 1])
    launch = {**kernel.launch, "variants": {"aligned": {"shared": 0, "requires": ["b1", "n0"]}}}
    aligned = dataclasses.replace(kernel, launch=launch, files={"aligned.llir": kernel.files["generic.llir"]})
    base = integers(80)
    with pytest.raises(ToolchainError, match="needs b1 divisible by 16"):
        emulator.execute_built(aligned, "aligned", [base, base[1:]], [32])
    with pytest.raises(ToolchainError, match="needs n0 divisible by 16"):
        emulator.execute_built(aligned, "aligned", [base, base], [7])


def test_an_interrupted_request_is_not_answered_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    kernel(COPY).run((1,), 1, [integers(64), integers(64)])
    with monkeypatch.context() as patch:
        patch.setattr(emulator_session.selectors.DefaultSelector, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kernel(COPY).run((1,), 1, [integers(64), integers(64)])
    out = integers(64)
    kernel(COPY).run((1,), 1, [integers(64) + 2, out])
    assert out[0] == 2


def test_arithmetic_faults_and_endless_loops() -> None:
    divide = "  %d = udiv i32 1, %t\n  store i32 %d, ptr addrspace(1) %1, align 4\n"
    with pytest.raises(ToolchainError, match="division by zero"):
        kernel(divide).run((1,), 1, [integers(1), integers(1)])
    with pytest.raises(ToolchainError, match="does not end"):
        kernel("  br label %l\nl:\n  call void @llvm.mxc.barrier()\n  br label %l\nx:\n").run(
            (1,), 1, [integers(1), integers(1)], seconds=1
        )
    out = integers(64)
    kernel(COPY).run((1,), 1, [integers(64) + 1, out])  # a new process serves
    assert out[0] == 1


def test_time_that_others_took_is_not_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is over and the process has not run: it is waited for again."""
    waits: list[float] = []
    select = emulator_session.selectors.DefaultSelector.select

    def late(selector: object, timeout: float) -> object:
        waits.append(timeout)
        return [] if len(waits) == 1 else select(selector, timeout)

    kernel(COPY).run((1,), 1, [integers(64), integers(64)])
    out = integers(64)
    with monkeypatch.context() as patch:
        patch.setattr(emulator_session.selectors.DefaultSelector, "select", late)
        kernel(COPY).run((1,), 1, [integers(64) + 3, out], seconds=20)
    assert out[0] == 3 and len(waits) > 1 and waits[0] <= 20


def test_arguments_are_checked() -> None:
    with pytest.raises(ToolchainError, match="do not fit its signature"):
        emulator.load(source(COPY), "k", ["*i32", "i32"])
    with pytest.raises(ToolchainError, match="not 'other'"):
        emulator.load(source(COPY), "other", ["*i32", "*i32"])
    with pytest.raises(ToolchainError, match=r"llvm\.mxc\.unheard"):
        kernel("  %z = call i32 @llvm.mxc.unheard(i32 %t)\n")
    with pytest.raises(ToolchainError, match="must be a tensor"):
        kernel(COPY).run((1,), 1, [integers(64), 3])
    with pytest.raises(ToolchainError, match="unknown order 'sideways'"):
        kernel(COPY).run((1,), 1, [integers(64), integers(64)], order="sideways")
    with pytest.raises(ToolchainError, match="failed to parse IR"):
        kernel("  %v = fadd i32 %t, %t\n").run((1,), 1, [integers(64), integers(64)])  # LLVM refuses the text


@pytest.mark.parametrize(("kind", "llvm", "value"), [
    ("i32", "i32", -5), ("i64", "i64", 2**40 + 3), ("fp32", "float", 0.1), ("fp64", "double", 0.1), ("i8", "i8", -3),
])  # fmt: skip
def test_numbers_arrive(kind: str, llvm: str, value: float) -> None:
    dtype = {"i32": torch.int32, "i64": torch.int64, "fp32": torch.float32, "fp64": torch.float64, "i8": torch.int8}[kind]
    text = source(f"  store {llvm} %n, ptr addrspace(1) %0, align 1\n", f"{POINTER} %0, {llvm} %n")
    out = torch.zeros(1, dtype=dtype)
    emulator.load(text, "k", [f"*{kind}", kind]).run((1,), 1, [out, value])
    assert out.item() == torch.tensor(value, dtype=dtype).item()


def test_blocks_of_a_large_grid() -> None:
    grid = (1000, 7, 3)
    blocks = emulator.sample_blocks(grid, 5)
    assert len(blocks) == 5 and blocks[0] == (0, 0, 0) and blocks[-1] == (999, 6, 2) and blocks == emulator.sample_blocks(grid, 5)
    assert emulator.sample_blocks((2, 2), 9) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    mark = ("  %x = call i32 @llvm.mxc.block.id.x()\n  %y = call i32 @llvm.mxc.block.id.y()\n  %r = mul i32 %y, 3\n  %i = add i32 %r, %x\n"
            "  %q = getelementptr i32, ptr addrspace(1) %1, i32 %i\n  store i32 1, ptr addrspace(1) %q, align 4\n")  # fmt: skip
    out = torch.zeros(6, dtype=torch.int32)
    assert kernel(mark).run((3, 2), 1, [integers(1), out], blocks=[(2, 0, 0), (0, 1, 0)]).blocks == 2
    assert out.tolist() == [0, 0, 1, 1, 0, 0]


def test_products_are_not_fused() -> None:
    """x * x - (1 + 2^-11) for x = 1 + 2^-12 is 2^-24 exactly, and 0 when the product is rounded to float first."""
    body = """  %a = load float, ptr addrspace(1) %0, align 4
  %m = fmul float %a, %a
  %s = fsub float %m, 0x3FF0020000000000
  store float %s, ptr addrspace(1) %1, align 4
"""
    x, out = torch.tensor([1 + 2.0**-12]), torch.empty(1)
    emulator.load(source(body), "k", ["*fp32", "*fp32"]).run((1,), 1, [x, out])
    assert out.item() == 0.0


def test_importing_and_dying_parents() -> None:
    """Importing starts nothing and imports neither triton nor torch; the emulator's process ends with its parent."""
    code = "import sys, flagtree.toolchain.maca, flagtree.toolchain.emulator; print([m for m in ('torch', 'triton') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    code = "from flagtree.toolchain import emulator_session; s = emulator_session.current(); print(s._process.pid, flush=True)"
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
