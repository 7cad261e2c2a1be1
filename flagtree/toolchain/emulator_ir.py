"""Turns MACA LLVM IR into LLVM IR for x86-64: MACA's intrinsics become calls into emulator_runtime.c, plus one entry point.

The invariant: nothing else of the kernel changes (loads become volatile), so what runs is what ships.  `emulator` calls `to_host`.
Each barrier and lane exchange gets a number, by which the runtime sees threads that wait at different places.
"""

from __future__ import annotations

import itertools
import re

from flagtree.errors import ToolchainError

ENTRY = "ft_entry"
_QUERIES = {"thread.id.x": "ft_thread_x", "block.id.x": "ft_block_x", "block.id.y": "ft_block_y", "block.id.z": "ft_block_z"}
_MATRIX = {"mma.f32.16x16x16f16": ("ft_matrix", 0), "mma.f32.16x16x2bf16": ("ft_matrix", 1), "mma.f32.16x16x4f32": ("ft_matrix_f32", 2),
           "mma.i32.16x16x16i8": ("ft_matrix_i8", 3)}  # fmt: skip
_MXC = re.compile(r"@llvm\.mxc\.([\w.]+)\((.*)\)$")
# The host's code generator moves a load into the branch that needs it, which would hide a load outside its tensor.
_LOAD = re.compile(r"^(  %[\w.]+ = load )(?!atomic|volatile)(?=.*addrspace)")
_DEFINE = re.compile(r"^define metaxgpu_kernel void @([\w.]+)\((.*)\) convergent [^{}()]*\{$")


def to_host(text: str, function: str) -> tuple[str, tuple[str, ...]]:
    """(LLVM IR for x86-64 with `void ft_entry(void **slots)`, the kernel's parameter types).

    Slot i holds the i-th argument in its first bytes.  Raises ToolchainError when the text is no MACA module with that kernel.
    """
    sites = itertools.count(1)
    lines: list[str] = []
    parameters: tuple[str, ...] | None = None
    for line in text.splitlines():
        if line.startswith(("target ", "declare")) and ("@llvm.mxc." in line or line.startswith("target ")):
            continue
        if match := _DEFINE.match(line):
            if match[1] != function:
                raise ToolchainError(f"the module holds the kernel '{match[1]}', not '{function}'")
            parameters = tuple(re.sub(r" %[\w.]+$", "", p.strip()) for p in match[2].split(",") if p.strip())
            lines.append(f"define void @{match[1]}({match[2]}) convergent nounwind {{")
        elif match := _MXC.search(line):
            lines.append(line[: match.start()] + _call(match[1], match[2], next(sites)))
        else:
            lines.append(_LOAD.sub(r"\1volatile ", line))
    if parameters is None:
        raise ToolchainError(f"the module has no kernel '{function}'", hint="pass MACA LLVM IR as toolchain.maca builds it")
    return "\n".join([*lines, _RUNTIME, _entry(function, parameters)]), parameters


def _call(name: str, operands: str, site: int) -> str:
    if name in _QUERIES:
        return f"@{_QUERIES[name]}()"
    if name == "barrier":
        return f"@ft_barrier(i32 {site})"
    if name == "bsm.bpermute":
        return f"@ft_bpermute(i32 {site}, {operands})"
    if name in _MATRIX:
        function, element = _MATRIX[name]
        return f"@{function}(i32 {site}, i32 {element}, {operands})"
    raise ToolchainError(f"the emulator does not know the intrinsic 'llvm.mxc.{name}'")


def _entry(function: str, parameters: tuple[str, ...]) -> str:
    lines = [f"define void @{ENTRY}(ptr %slots) {{"]
    for i, kind in enumerate(parameters):
        lines += [f"  %p{i} = getelementptr ptr, ptr %slots, i64 {i}", f"  %a{i} = load {kind}, ptr %p{i}, align 8"]
    arguments = ", ".join(f"{kind} %a{i}" for i, kind in enumerate(parameters))
    return "\n".join([*lines, f"  call void @{function}({arguments})", "  ret void", "}", ""])


_RUNTIME = """
declare i32 @ft_thread_x()
declare i32 @ft_block_x()
declare i32 @ft_block_y()
declare i32 @ft_block_z()
declare void @ft_barrier(i32) convergent
declare i32 @ft_bpermute(i32, i32, i32) convergent
declare void @ft_mma(i32, i64, i64, ptr, i32) convergent
define internal <4 x i32> @ft_matrix_i8(i32 %site, i32 %element, i32 %a, i32 %b, <4 x i32> %c) alwaysinline {
  %x = zext i32 %a to i64
  %y = zext i32 %b to i64
  %sum = alloca <4 x i32>, align 16
  store <4 x i32> %c, ptr %sum, align 16
  call void @ft_mma(i32 %site, i64 %x, i64 %y, ptr %sum, i32 %element)
  %r = load <4 x i32>, ptr %sum, align 16
  ret <4 x i32> %r
}
define internal <4 x float> @ft_matrix(i32 %site, i32 %element, <4 x half> %a, <4 x half> %b, <4 x float> %c) alwaysinline {
  %x = bitcast <4 x half> %a to i64
  %y = bitcast <4 x half> %b to i64
  %sum = alloca <4 x float>, align 16
  store <4 x float> %c, ptr %sum, align 16
  call void @ft_mma(i32 %site, i64 %x, i64 %y, ptr %sum, i32 %element)
  %r = load <4 x float>, ptr %sum, align 16
  ret <4 x float> %r
}
define internal <4 x float> @ft_matrix_f32(i32 %site, i32 %element, float %a, float %b, <4 x float> %c) alwaysinline {
  %i = bitcast float %a to i32
  %j = bitcast float %b to i32
  %x = zext i32 %i to i64
  %y = zext i32 %j to i64
  %sum = alloca <4 x float>, align 16
  store <4 x float> %c, ptr %sum, align 16
  call void @ft_mma(i32 %site, i64 %x, i64 %y, ptr %sum, i32 %element)
  %r = load <4 x float>, ptr %sum, align 16
  ret <4 x float> %r
}
"""
