"""The converter from wave64 AMD LLVM IR to MACA LLVM IR: each construct once, checked by executing it, and everything unknown refused."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from flagtree.errors import ToolchainError
from flagtree.toolchain import emulator
from flagtree.toolchain.maca_ir import convert, split_operands
from flagtree.toolchain.maca_literals import lower_constants

HEADER = "define void @k(ptr addrspace(1) %0, ptr addrspace(1) %1, ptr addrspace(1) %2, ptr addrspace(1) %3) #0 {\n"
LANE = "  %t = call i32 @llvm.amdgcn.workitem.id.x()\n"
needs_emulator = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())


def kernel(body: str, *declarations: str) -> str:
    """Wave64 IR of a kernel that reads its lane's element of %0 into %x and writes %y to %1; `body` between."""
    return "\n".join(["declare noundef i32 @llvm.amdgcn.workitem.id.x() #1", *declarations, HEADER + LANE + body, "  ret void\n}"])


def elementwise(kind: str, compute: str, *declarations: str) -> str:
    read = f"  %p = getelementptr {kind}, ptr addrspace(1) %0, i32 %t\n  %x = load {kind}, ptr addrspace(1) %p, align 4\n"
    write = f"\n  %q = getelementptr {kind}, ptr addrspace(1) %1, i32 %t\n  store {kind} %y, ptr addrspace(1) %q, align 4"
    return kernel(read + compute + write, *declarations)


def run(text: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    emulator.load(convert(text, "xcore1000", 1).text, "k", ["*x", "*x"]).run((1,), 1, [x, y])
    return y


# -- lane exchanges, by the tables of AMD's CDNA2 ISA -------------------------------------------------------------------
def dpp_reference(old: list[int], value: list[int], control: int, rows: int, banks: int, bound: bool) -> list[int]:
    result = []
    for lane in range(64):
        row, column = lane // 16, lane % 16
        if control <= 0xFF:
            source = lane // 4 * 4 + (control >> (2 * (lane % 4)) & 3)
        elif control <= 0x10F:
            source = lane + (control & 15) if column + (control & 15) < 16 else None
        elif control <= 0x11F:
            source = lane - (control & 15) if column >= (control & 15) else None
        elif control <= 0x12F:
            source = row * 16 + (column - (control & 15)) % 16
        elif control == 0x140:
            source = row * 16 + 15 - column
        elif control == 0x141:
            source = lane // 8 * 8 + 7 - lane % 8
        elif control == 0x142:
            source = row * 16 - 1 if row else None
        else:
            source = 31 if row >= 2 else None
        moved = (0 if bound else old[lane]) if source is None else value[source]
        enabled = rows >> row & 1 and banks >> (column // 4) & 1
        result.append(moved if enabled else old[lane])
    return result


CONTROLS = [0x1B, 0xB1, 0x4E, 0x101, 0x10F, 0x111, 0x112, 0x114, 0x118, 0x121, 0x128, 0x140, 0x141, 0x142, 0x143]


@needs_emulator
@pytest.mark.parametrize("kind", ["i32", "i64", "f32", "f64"])
@pytest.mark.parametrize("masks", [(15, 15, "true"), (15, 15, "false"), (10, 12, "false")])
def test_dpp(kind: str, masks: tuple[int, int, str]) -> None:
    spelled = {"i32": "i32", "i64": "i64", "f32": "float", "f64": "double"}[kind]
    rows, banks, bound = masks
    for control in CONTROLS:
        name = f"{spelled} @llvm.amdgcn.update.dpp.{kind}"
        call = f"  %y = call {name}({spelled} %x, {spelled} %x, i32 {control}, i32 {rows}, i32 {banks}, i1 {bound})"
        text = elementwise(spelled, call, f"declare {name}({spelled}, {spelled}, i32 immarg, i32 immarg, i32, i1)")
        x = torch.arange(1, 65, dtype={"i32": torch.int32, "i64": torch.int64, "f32": torch.float32, "f64": torch.float64}[kind])
        x = x * (2**40 + 1) if kind == "i64" else x * 1.1 if kind.startswith("f") else x
        expected = dpp_reference(list(range(64)), list(range(64)), control, rows, banks, False)
        wanted = x[torch.tensor(expected)]
        if bound == "true":
            zeroed, kept = (dpp_reference([-1] * 64, list(range(64)), control, rows, banks, b) for b in (True, False))
            wanted = torch.where(torch.tensor(zeroed) != torch.tensor(kept), torch.zeros_like(wanted), wanted)
        assert torch.equal(run(text, x), wanted), hex(control)


@needs_emulator
@pytest.mark.parametrize("offset", [0x801F, 0x8000 | 0xB1, 0x041F, 0x401F, 0x7C1F, 0x0018])
def test_swizzle(offset: int) -> None:
    text = elementwise(
        "i32", f"  %y = call i32 @llvm.amdgcn.ds.swizzle(i32 %x, i32 {offset})", "declare i32 @llvm.amdgcn.ds.swizzle(i32, i32 immarg)"
    )
    x = torch.arange(64, dtype=torch.int32)
    if offset & 0x8000:
        source = [lane // 4 * 4 + (offset >> (2 * (lane % 4)) & 3) for lane in range(64)]
    else:
        source = [lane // 32 * 32 + ((lane % 32 & offset & 31 | offset >> 5 & 31) ^ offset >> 10 & 31) for lane in range(64)]
    assert run(text, x).tolist() == source


@needs_emulator
def test_reading_one_lane() -> None:
    text = elementwise(
        "i64", "  %y = call i64 @llvm.amdgcn.readlane.i64(i64 %x, i32 37)", "declare i64 @llvm.amdgcn.readlane.i64(i64, i32)"
    )
    assert run(text, torch.arange(64) * (2**33 + 5)).tolist() == [37 * (2**33 + 5)] * 64
    first = "declare i32 @llvm.amdgcn.readfirstlane.i32(i32)"
    text = elementwise("i32", "  %y = call i32 @llvm.amdgcn.readfirstlane.i32(i32 %x)", first)
    assert run(text, torch.arange(5, 69, dtype=torch.int32)).tolist() == [5] * 64  # not known to be uniform: a real exchange
    uniform = "  %m = and i32 %t, 63\n  %w = udiv i32 %m, 64\n  %f = call i32 @llvm.amdgcn.readfirstlane.i32(i32 %w)\n  %y = add i32 %x, %f"
    assert "bpermute" not in convert(elementwise("i32", uniform, first), "xcore1000", 1).text


@needs_emulator
@pytest.mark.parametrize(("call", "reference"), [
    ("@llvm.amdgcn.rsq.f32(float %x)", lambda v: 1 / math.sqrt(v)), ("@llvm.amdgcn.sqrt.f32(float %x)", math.sqrt),
    ("@llvm.amdgcn.exp2.f32(float %x)", lambda v: 2.0**v), ("@llvm.amdgcn.log.f32(float %x)", math.log2),
    ("@llvm.amdgcn.fmed3.f32(float %x, float 1.0, float 2.0)", lambda v: min(max(v, 1.0), 2.0)),
    ("@__ocml_floor_f32(float %x)", math.floor), ("@__ocml_tanh_f32(float %x)", math.tanh), ("@__nv_erff(float %x)", math.erf),
    ("@__nv_fdiv_rn(float 1.0, float %x)", lambda v: 1 / v), ("@__nv_fsqrt_rn(float %x)", math.sqrt),
    ("@__nv_powf(float %x, float 2.5)", lambda v: v**2.5), ("@__nv_rsqrtf(float %x)", lambda v: 1 / math.sqrt(v)),
])  # fmt: skip
def test_functions(call: str, reference) -> None:  # type: ignore[no-untyped-def]
    name = call.split("(")[0]
    types = ", ".join(["float"] * (call.count(",") + 1))
    x = torch.rand(64) * 3 + 0.25
    y = run(elementwise("float", f"  %y = call float {call}", f"declare float {name}({types})"), x)
    torch.testing.assert_close(y.double(), torch.tensor([float(reference(v)) for v in x.tolist()], dtype=torch.float64), rtol=2e-7, atol=0)


def test_barriers_of_a_warp_become_barriers_of_the_block() -> None:
    text = kernel("  call void @llvm.amdgcn.wave.barrier()", "declare void @llvm.amdgcn.wave.barrier()")
    assert "  call void @llvm.mxc.barrier()\n" in convert(text, "xcore1000", 1).text


@needs_emulator
def test_remainder_is_exact() -> None:
    x = torch.rand(64) * 1e20
    assert torch.equal(run(elementwise("float", "  %y = frem float %x, 0x3FF3333340000000"), x), torch.fmod(x, torch.tensor(1.2)))


# -- what is refused ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("body", "named"), [
    ("  call void @llvm.amdgcn.s.setreg(i32 1, i32 2)", "llvm.amdgcn.s.setreg"),
    ("  call void @llvm.amdgcn.s.setreg(i32 1473, i32 1)\n  %h = fptrunc float %x to half", "llvm.amdgcn.s.setreg"),
    ("  %y = call float @llvm.amdgcn.cubeid(float %x)", "llvm.amdgcn.cubeid"),
    ("  %y = call i64 @__ockl_get_num_groups(i32 0)", "__ockl_get_num_groups"),
    ("  %y = call float @__nv_unheard_of(float %x)", "__nv_unheard_of"),
    ("  %y = call float @llvm.fmuladd.f32(float %x, float %x, float %x)", "llvm.fmuladd.f32"),
    ("  %y = call i32 @llvm.amdgcn.update.dpp.i32(i32 %t, i32 %t, i32 304, i32 15, i32 15, i1 true)", "0x130"),
    ("  %y = fadd contract float %x, %x", "contract"), ("  %y = fmul fast float %x, %x", "fast"),
    ("  %y = fadd bfloat %x, %x", "bfloat"), ("  %y = load i32, ptr addrspace(7) %p", "address space 7"),
    ('  fence syncscope("cluster") release', "cluster"), ('  %y = call i32 asm "s_nop 0", "=v"()', "asm"),
    ("  %y = fadd float %x, f0x12", "no LLVM 19 spelling"),
])  # fmt: skip
def test_what_is_unknown_is_refused(body: str, named: str) -> None:
    with pytest.raises(ToolchainError, match=named):
        convert(kernel(body), "xcore1000", 1)


def test_other_globals_and_functions_are_refused() -> None:
    with pytest.raises(ToolchainError, match="global"):
        convert("@table = internal addrspace(4) constant [4 x i8] zeroinitializer\n" + kernel(""), "xcore1000", 1)
    with pytest.raises(ToolchainError, match="one kernel"):
        convert(kernel("") + "\n" + kernel("").split("\n", 1)[1], "xcore1000", 1)
    with pytest.raises(ToolchainError, match="no kernel"):
        convert("", "xcore1000", 1)


# -- constants ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("line", "expected"), [
    ("  %1 = fmul float %0, f0x3FB8AA3B", "  %1 = fmul float %0, 0x3FF7154760000000"),
    ("  %1 = fcmp oeq float %0, -inf", "  %1 = fcmp oeq float %0, 0xFFF0000000000000"),
    ("  %1 = fadd double %0, +qnan", "  %1 = fadd double %0, 0x7FF8000000000000"),
    ("  %1 = fadd float %inf, 1.000000e+00", "  %1 = fadd float %inf, 1.000000e+00"),
    ("  %1 = fadd float %0, 1.000000e-01", "  %1 = fadd float %0, 0x3FB99999A0000000"),
    ("  %1 = fmul half %0, f0x3C00", "  %1 = fmul half %0, 0xH3C00"),
    ("  %1 = select i1 %c, bfloat %0, bfloat 1.000000e+00", "  %1 = select i1 %c, i16 %0, i16 16256"),
    ("  store <2 x bfloat> <bfloat 0xR3F80, bfloat -0.000000e+00>, ptr %p", "  store <2 x i16> <i16 16256, i16 32768>, ptr %p"),
    ("  %1 = and <2 x i32> %0, splat (i32 16)", "  %1 = and <2 x i32> %0, <i32 16, i32 16>"),
    ("  fadd <2 x float> %0, splat (float f0x3F800001)", "  fadd <2 x float> %0, <float 0x3FF0000020000000, float 0x3FF0000020000000>"),
    ("  %1 = phi float [ 0.000000e+00, %bb ], [ f0x7FA00000, %cc ]", "  %1 = phi float [ 0.000000e+00, %bb ], [ 0x7FF4000000000000, %cc ]"),
])  # fmt: skip
def test_constants_keep_their_bits(line: str, expected: str) -> None:
    assert lower_constants(line, "test") == expected


@pytest.mark.parametrize(
    "bits", [0, 1, 0x007FFFFF, 0x00800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x80000000]
)
def test_every_float_survives(bits: int) -> None:
    text = lower_constants(f"  %1 = fadd float %0, f0x{bits:08X}", "test").rsplit(" ", 1)[1]
    if bits & 0x7F800000 == 0x7F800000:
        double = int(text, 16)
        assert (double >> 63) << 31 | 0x7F800000 | (double >> 29) & 0x7FFFFF == bits
    else:
        assert struct.pack("<f", struct.unpack("<d", struct.pack("<Q", int(text, 16)))[0]) == struct.pack("<I", bits)


def test_operands_split_at_the_top_level_only() -> None:
    assert split_operands("<2 x i16> <i16 1, i16 2>, { i32, i32 } %a, ptr addrspace(1) %p") == [
        "<2 x i16> <i16 1, i16 2>", "{ i32, i32 } %a", "ptr addrspace(1) %p"]  # fmt: skip
    assert split_operands("") == []
