"""What each function of the wave64 AMD lowering becomes on MACA: renames, library calls and small generated functions.

Owns the tables; anything that is not in one of them is refused by `maca_ir`, which is the only caller.  Sources: the intrinsic
names of MetaX's public mcTriton and of compilers known to run on a C500 (docs/metax.md lists what no device has confirmed here).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flagtree.errors import ToolchainError

# wave64 intrinsic -> MACA function, same operands
RENAMED: dict[str, str] = {
    "llvm.amdgcn.workitem.id.x": "llvm.mxc.thread.id.x",
    "llvm.amdgcn.workgroup.id.x": "llvm.mxc.block.id.x",
    "llvm.amdgcn.workgroup.id.y": "llvm.mxc.block.id.y",
    "llvm.amdgcn.workgroup.id.z": "llvm.mxc.block.id.z",
    "llvm.amdgcn.s.barrier": "llvm.mxc.barrier",
    # Orders shared memory within one warp.  MACA's counterpart is not known, so the whole block waits: stronger, and the emulator checks
    # that all threads come (Triton's control flow around it is uniform).
    "llvm.amdgcn.wave.barrier": "llvm.mxc.barrier",
    "llvm.amdgcn.ds.bpermute": "llvm.mxc.bsm.bpermute",
    # hardware approximations become LLVM's own functions: at least as exact, and MetaX's compiler knows them
    "llvm.amdgcn.sqrt.f32": "llvm.sqrt.f32",
    "llvm.amdgcn.exp2.f32": "llvm.exp2.f32",
    "llvm.amdgcn.log.f32": "llvm.log2.f32",
    "llvm.amdgcn.rsq.f32": "__ft_rsqrt_f32",
    "llvm.amdgcn.rsq.f64": "__ft_rsqrt_f64",
    "llvm.amdgcn.fmed3.f32": "__ft_median_f32",
}

# scheduling hints without a meaning for the result
DROPPED = frozenset({"llvm.amdgcn.s.waitcnt", "llvm.amdgcn.sched.barrier", "llvm.amdgcn.iglp.opt"})

# s_setreg of MODE.FP16_OVFL (register 1, bit 23, one bit): a result in half that would overflow is its largest number.  Triton sets it for
# conversions to fp8, of which that to e4m3fn from f32 is integer arithmetic; without a half in the text it means nothing (AMD's MI200
# Instruction Set Architecture, "MODE register").
HALF_OVERFLOW = "llvm.amdgcn.s.setreg", [("i32", "1473"), ("i32", "1")]

# the 16x16 matrix instructions: MetaX's fragment layout is AMD's (16 deep: lane = row + 16 * (k // 4), 4 elements a lane; f32, 4 deep:
# lane = row + 16 * k, one element a lane)
MATRIX: dict[str, str] = {
    "llvm.amdgcn.mfma.f32.16x16x16f16": "llvm.mxc.mma.f32.16x16x16f16",
    "llvm.amdgcn.mfma.f32.16x16x16bf16.1k": "llvm.mxc.mma.f32.16x16x2bf16",
    "llvm.amdgcn.mfma.f32.16x16x4f32": "llvm.mxc.mma.f32.16x16x4f32",
    "llvm.amdgcn.mfma.i32.16x16x16i8": "llvm.mxc.mma.i32.16x16x16i8",
}

DECLARED: dict[str, str] = {
    "llvm.mxc.thread.id.x": "i32 ()",
    "llvm.mxc.block.id.x": "i32 ()",
    "llvm.mxc.block.id.y": "i32 ()",
    "llvm.mxc.block.id.z": "i32 ()",
    "llvm.mxc.barrier": "void ()",
    "llvm.mxc.bsm.bpermute": "i32 (i32, i32)",
    "llvm.mxc.mma.f32.16x16x16f16": "<4 x float> (<4 x half>, <4 x half>, <4 x float>)",
    "llvm.mxc.mma.f32.16x16x2bf16": "<4 x float> (<4 x half>, <4 x half>, <4 x float>)",
    "llvm.mxc.mma.f32.16x16x4f32": "<4 x float> (float, float, <4 x float>)",
    "llvm.mxc.mma.i32.16x16x16i8": "<4 x i32> (i32, i32, <4 x i32>)",
}

# LLVM's own functions, which any LLVM 19 back end of the AMDGPU family lowers
_GENERIC = re.compile(
    r"llvm\.(?:is\.fpclass|exp2|log2|sqrt|fabs|fma|smin|smax|umin|umax|minnum|maxnum|minimum|maximum|floor|ceil|trunc|rint|abs|ctpop|ctlz|"
    r"cttz|bswap|fshl|fshr|copysign|umul\.with\.overflow|smul\.with\.overflow)\.[\w.]+|llvm\.assume"
)

# libm names that map one to one: the device library calls them mc_math_func_<name>, with `f` appended for float
MATH = frozenset((
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "exp", "exp2", "exp10", "expm1", "log",
    "log2", "log10", "log1p", "pow", "cbrt", "erf", "erfc", "fmod", "remainder", "atan2", "hypot", "tgamma", "lgamma", "nextafter", "ldexp",
))  # fmt: skip
# exact ones have an LLVM function, so that no library is needed
_EXACT = {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "rint": "rint", "nearbyint": "rint", "fabs": "fabs", "copysign": "copysign",
          "sqrt": "sqrt", "fma": "fma", "fmin": "minnum", "fmax": "maxnum"}  # fmt: skip
_TESTS = {"isnan": "fcmp uno {t} %x, 0.0", "isinf": "fcmp oeq {t} %a, 0x7FF0000000000000"}
_ROUNDED = {"div_rn": "fdiv", "add_rn": "fadd", "sub_rn": "fsub", "mul_rn": "fmul"}
_OCML = re.compile(r"__ocml_(\w+)_f(32|64)$")


@dataclass(frozen=True, slots=True)
class Replacement:
    """`function`: what is called instead; `definition`: its text when it is generated, else empty."""

    function: str
    definition: str = ""


def known_generic(name: str) -> bool:
    return _GENERIC.fullmatch(name) is not None


def library_call(name: str) -> Replacement | None:
    """The MACA form of a device library function (`__nv_*` of CUDA's libdevice, `__ocml_*` of ROCm); None when it is none that we know."""
    parsed = _library_name(name)
    if parsed is None:
        return None
    base, bits = parsed
    kind = "float" if bits == 32 else "double"
    if base in _EXACT:
        return Replacement(f"llvm.{_EXACT[base]}.f{bits}")
    if base == "rsqrt":
        return generated(f"__ft_rsqrt_f{bits}")
    if base in _TESTS:
        test = _TESTS[base].format(t=kind)
        absolute = f"  %a = call {kind} @llvm.fabs.f{bits}({kind} %x)\n" if "%a" in test else ""
        function = f"__ft_{base}_f{bits}"
        body = f"{absolute}  %p = {test}\n  %r = zext i1 %p to i32\n  ret i32 %r"
        return Replacement(function, f"define internal i32 @{function}({kind} %x) alwaysinline {{\n{body}\n}}\n")
    if base in _ROUNDED:
        function = f"__ft_{base}_f{bits}"
        body = f"  %r = {_ROUNDED[base]} {kind} %x, %y\n  ret {kind} %r"
        return Replacement(function, f"define internal {kind} @{function}({kind} %x, {kind} %y) alwaysinline {{\n{body}\n}}\n")
    if base in MATH:
        return Replacement(f"mc_math_func_{base}{'f' if bits == 32 else ''}")
    return None


def _library_name(name: str) -> tuple[str, int] | None:
    """("tanh", 32) for `__nv_tanhf` and `__ocml_tanh_f32`."""
    if match := _OCML.match(name):
        return match[1], int(match[2])
    if not name.startswith("__nv_"):
        return None
    base = name.removeprefix("__nv_")
    if match := re.fullmatch(r"([fd])?(sqrt|div|add|sub|mul)_rn", base):
        return ("sqrt" if match[2] == "sqrt" else f"{match[2]}_rn"), 64 if match[1] == "d" else 32
    if base in ("isnand", "isinfd"):
        return base[:-1], 64
    known = MATH | _EXACT.keys() | _TESTS.keys() | {"rsqrt"}
    if base in known:
        return base, 64
    return (base[:-1], 32) if base.endswith("f") and base[:-1] in known else None


def generated(name: str) -> Replacement:
    """One of our own small functions by name.  KeyError for a name that does not exist."""
    return Replacement(name, _GENERATED[name])


def _rsqrt(bits: int) -> str:
    kind = "float" if bits == 32 else "double"
    return (
        f"define internal {kind} @__ft_rsqrt_f{bits}({kind} %x) alwaysinline {{\n  %s = call {kind} @llvm.sqrt.f{bits}({kind} %x)\n"
        f"  %r = fdiv {kind} 1.0, %s\n  ret {kind} %r\n}}\n"
    )


_GENERATED = {
    "__ft_rsqrt_f32": _rsqrt(32),
    "__ft_rsqrt_f64": _rsqrt(64),
    # the middle of three numbers, NaN last as the instruction orders it: max(min(x, y), min(max(x, y), z))
    "__ft_median_f32": """define internal float @__ft_median_f32(float %x, float %y, float %z) alwaysinline {
  %low = call float @llvm.minnum.f32(float %x, float %y)
  %high = call float @llvm.maxnum.f32(float %x, float %y)
  %cut = call float @llvm.minnum.f32(float %high, float %z)
  %r = call float @llvm.maxnum.f32(float %low, float %cut)
  ret float %r
}
""",
    # x.0 * y.0 + x.1 * y.1 + z on bfloat pairs, each product exact and each sum rounded once, in this order
    "__ft_fdot2": """define internal float @__ft_fdot2(<2 x i16> %x, <2 x i16> %y, float %z) alwaysinline {
  %xw = zext <2 x i16> %x to <2 x i32>
  %xs = shl <2 x i32> %xw, <i32 16, i32 16>
  %xf = bitcast <2 x i32> %xs to <2 x float>
  %yw = zext <2 x i16> %y to <2 x i32>
  %ys = shl <2 x i32> %yw, <i32 16, i32 16>
  %yf = bitcast <2 x i32> %ys to <2 x float>
  %x0 = extractelement <2 x float> %xf, i32 0
  %x1 = extractelement <2 x float> %xf, i32 1
  %y0 = extractelement <2 x float> %yf, i32 0
  %y1 = extractelement <2 x float> %yf, i32 1
  %s = call float @llvm.fma.f32(float %x0, float %y0, float %z)
  %r = call float @llvm.fma.f32(float %x1, float %y1, float %s)
  ret float %r
}
""",
}

_LANE = "  %thread = call i32 @llvm.mxc.thread.id.x()\n  %lane = and i32 %thread, 63\n"
_FETCH = "  %byte = shl i32 %from, 2\n  %got = call i32 @llvm.mxc.bsm.bpermute(i32 %byte, i32 %value)\n"


def _quad_source(selectors: int) -> str:
    """Lane 4q+i reads lane 4q+s_i, the four 2-bit selectors s_i packed lowest first."""
    return (
        "  %i = and i32 %lane, 3\n  %shift = shl i32 %i, 1\n"
        f"  %packed = lshr i32 {selectors}, %shift\n  %s = and i32 %packed, 3\n  %quad = and i32 %lane, 60\n  %from = or i32 %quad, %s\n"
    )


def _dpp_source(control: int, where: str) -> str:
    """Defines %from (source lane) and %valid (it exists) for a DPP control word (AMD CDNA2 ISA, table of DPP_CTRL)."""
    always = "  %valid = icmp eq i32 0, 0\n"
    count = control & 15
    if control <= 0xFF:
        return _quad_source(control) + always
    if 0x101 <= control <= 0x10F or 0x111 <= control <= 0x11F:  # row_shl, row_shr: within 16 lanes
        step = "add" if control < 0x110 else "sub"
        return (
            f"  %moved = {step} i32 %lane, {count}\n  %row = and i32 %lane, -16\n  %row2 = and i32 %moved, -16\n"
            "  %valid = icmp eq i32 %row, %row2\n  %from = and i32 %moved, 63\n"
        )
    if 0x121 <= control <= 0x12F:  # row_ror
        return (
            f"  %moved = sub i32 %lane, {count}\n  %column = and i32 %moved, 15\n  %row = and i32 %lane, 48\n"
            "  %from = or i32 %row, %column\n" + always
        )
    if control in (0x140, 0x141):  # row_mirror, row_half_mirror
        return f"  %from = xor i32 %lane, {15 if control == 0x140 else 7}\n" + always
    if control == 0x142:  # row_bcast:15, the last lane of a row to the next row
        return "  %row = and i32 %lane, 48\n  %valid = icmp ne i32 %row, 0\n  %last = sub i32 %row, 1\n  %from = and i32 %last, 63\n"
    if control == 0x143:  # row_bcast:31, lane 31 to rows 2 and 3
        return "  %valid = icmp uge i32 %lane, 32\n  %from = add i32 31, 0\n"
    raise ToolchainError(f"the MACA lowering does not know the lane exchange update.dpp with control 0x{control:x}", where=where)


def dpp(control: int, row_mask: int, bank_mask: int, bound_control: bool, where: str) -> Replacement:
    """`i32 f(i32 old, i32 value)`: the DPP move, as a lane permutation.  Raises ToolchainError for an unknown control word."""
    name = f"__ft_dpp_{control:x}_{row_mask:x}{bank_mask:x}{int(bound_control)}"
    missing = "0" if bound_control else "%old"
    body = _LANE + _dpp_source(control, where) + _FETCH + f"  %moved_in = select i1 %valid, i32 %got, i32 {missing}\n"
    if row_mask == 15 and bank_mask == 15:
        body += "  ret i32 %moved_in\n"
    else:
        body += (
            f"  %r = lshr i32 %lane, 4\n  %rbit = lshr i32 {row_mask}, %r\n  %ron = trunc i32 %rbit to i1\n"
            f"  %b = lshr i32 %lane, 2\n  %b3 = and i32 %b, 3\n  %bbit = lshr i32 {bank_mask}, %b3\n  %bon = trunc i32 %bbit to i1\n"
            "  %on = and i1 %ron, %bon\n  %out = select i1 %on, i32 %moved_in, i32 %old\n  ret i32 %out\n"
        )
    return Replacement(name, f"define internal i32 @{name}(i32 %old, i32 %value) alwaysinline convergent {{\n{body}}}\n")


def swizzle(offset: int) -> Replacement:
    """`i32 f(i32 value)`: ds_swizzle in quad mode (bit 15 set) or in bit mode (and, or, xor masks over 32 lanes)."""
    name = f"__ft_swizzle_{offset:x}"
    if offset & 0x8000:
        source = _quad_source(offset & 0xFF)
    else:
        source = (
            f"  %low = and i32 %lane, {offset & 31}\n  %set = or i32 %low, {offset >> 5 & 31}\n"
            f"  %flip = xor i32 %set, {offset >> 10 & 31}\n  %half = and i32 %lane, 32\n  %from = or i32 %half, %flip\n"
        )
    return Replacement(
        name, f"define internal i32 @{name}(i32 %value) alwaysinline convergent {{\n{_LANE}{source}{_FETCH}  ret i32 %got\n}}\n"
    )
