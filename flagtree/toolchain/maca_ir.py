"""Converts the LLVM IR that Triton's wave64 AMD lowering prints into MACA LLVM IR, as text.  Fails closed.

The invariant: every function that the result calls is in a table of `maca_intrinsics`, nothing of AMD's is left, and constants
have the forms of LLVM 19; whatever is not understood raises ToolchainError that names it.  `maca_backend` calls `convert`.
MACA's LLVM is a fork of the AMDGPU family: same address spaces and lane semantics, another triple, calling convention and intrinsics.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from flagtree.errors import ToolchainError
from flagtree.toolchain import maca_intrinsics as known
from flagtree.toolchain.maca_literals import lower_constants

TRIPLE = "mxc-metax-macahca"
DATALAYOUT = (
    "e-p:64:64-p1:64:64-p2:32:32-p3:32:32-p4:64:64-p5:32:32-p6:32:32-i64:64-v16:16-v24:32-v32:32-v48:64-v96:128-"
    "v192:256-v256:256-v512:512-v1024:1024-v2048:2048-n32:64-S32-A5-G1-ni:7"
)
LANES = 64
Exchange = Callable[[str, list[str]], None]  # (result, operand words) of one 32-bit lane exchange
_SCOPES = {"workgroup": "block", "agent": "device", "wavefront": "warp", "workgroup-one-as": "block-one-as",
           "agent-one-as": "device-one-as", "wavefront-one-as": "warp-one-as", "singlethread": "singlethread"}  # fmt: skip
_ADDRESS_SPACES = frozenset("1345")  # global, shared, constant, private

_TYPE = r"(?:<\d+ x (?:\w+|ptr addrspace\(\d+\))>|ptr(?: addrspace\(\d+\))?|void|half|float|double|i\d+|\{[^{}]*\})"
_CALL = re.compile(rf"^  (?:(?P<result>%[\w.]+) = )?(?:tail )?call (?P<flags>[^@]*?)(?P<type>{_TYPE}) @(?P<name>[\w.$]+)\((?P<args>.*)\)$")
_SIGNATURE = re.compile(rf"^(?:declare|define) (?:[^@]*? )?(?P<type>{_TYPE}) @(?P<name>[\w.$]+)\((?P<args>.*?)\)(?: [^()]*)?(?:\{{)?$")
_OPERAND = re.compile(rf"^(?P<type>{_TYPE})(?: (?:noundef|immarg|inreg|nofpclass\([^)]*\)|range\([^)]*\)|align \d+))*(?: (?P<value>.+))?$")
_FAST = re.compile(r"^  (?:%[\w.]+ = )?\w+(?: \w+)*? (fast|nnan|ninf|nsz|arcp|contract|afn|reassoc)\b")
_SKIPPED = ("; ", ";", "source_filename", "target ", "attributes #", "!")
_ARITY = {"fma": 3, "minnum": 2, "maxnum": 2, "copysign": 2}


@dataclass(frozen=True, slots=True)
class MacaModule:
    """`text`: LLVM IR that LLVM 19 parses once the `metaxgpu_kernel` convention is known; `function`: the kernel's name."""

    text: str
    function: str


def convert(text: str, processor: str, warps: int) -> MacaModule:
    """Wave64 AMD LLVM IR of one kernel to MACA LLVM IR for `processor` ("xcore1000") and `warps` warps of 64 threads.

    Raises ToolchainError for an intrinsic, a global, an address space, a fast-math flag or a constant that has no known MACA form.
    """
    return _Converter(processor, warps).run(text)


def split_operands(text: str) -> list[str]:
    """Operands at the top level of a list: commas inside <>, (), [] and {} do not split."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "<([{":
            depth += 1
        elif character in ">)]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


class _Converter:
    def __init__(self, processor: str, warps: int) -> None:
        self.processor, self.warps = processor, warps
        self.where = "MACA LLVM IR"
        self.function = ""
        self.globals: list[str] = []
        self.body: list[str] = []
        self.source_types: dict[str, str] = {}  # function -> "result (arguments)" as the source declares it
        self.declared: dict[str, str] = {}  # what the result declares
        self.generated: dict[str, str] = {}  # our own small functions
        self.definitions: dict[str, str] = {}  # value -> right-hand side, for recognising uniform values
        self.temporaries = 0
        self.has_half = False

    def run(self, text: str) -> MacaModule:
        lines = [self.clean(line) for line in text.splitlines() if line.strip() and not line.startswith(_SKIPPED)]
        self.has_half = any(re.search(r"\bhalf\b", line) for line in lines)
        for line in lines:
            if line.startswith("declare"):
                self.declaration(line)
        for line in lines:
            if line.startswith("@"):
                self.global_variable(line)
            elif line.startswith("define"):
                self.definition(line)
            elif not line.startswith("declare"):
                self.instruction(line)
        if not self.function:
            raise self.error("the module has no kernel")
        return MacaModule(self.assemble(), self.function)

    def error(self, what: str, why: str = "") -> ToolchainError:
        return ToolchainError(what, where=self.where, why=why)

    def clean(self, line: str) -> str:
        """Without comments, attribute groups, metadata and flags newer than LLVM 19; constants and scopes in MACA's spelling."""
        line = re.sub(r"/\*.*?\*/ ?", "", line)
        line = re.sub(r" #\d+(?=\s*(?:\{|$))", "", line)
        line = re.sub(r"(?:,)? ![\w.]+ !\d+", "", line)
        line = re.sub(r"\b(icmp) samesign\b", r"\1", line)
        line = re.sub(r'syncscope\("([\w-]+)"\)', self.scope, line)
        if line.startswith("  ") and (match := _FAST.match(line)):
            raise self.error(f"the MACA lowering met the fast-math flag '{match[1]}'", f"line: {line.strip()}")
        for space in re.findall(r"addrspace\((\d+)\)", line):
            if space not in _ADDRESS_SPACES:
                raise self.error(f"the MACA lowering does not know address space {space}", f"line: {line.strip()}")
        return lower_constants(line, self.where).rstrip()

    def scope(self, match: re.Match[str]) -> str:
        if match[1] not in _SCOPES:
            raise self.error(f"the MACA lowering does not know the memory scope '{match[1]}'")
        return f'syncscope("{_SCOPES[match[1]]}")'

    # -- module level --------------------------------------------------------------------------------------------------
    def signature(self, line: str) -> tuple[str, str, list[tuple[str, str]]]:
        """Name, result type and (type, value) of each parameter."""
        match = _SIGNATURE.match(line)
        if match is None:
            raise self.error("the MACA lowering cannot read a declaration", f"line: {line}")
        return match["name"], match["type"], [self.operand(a) for a in split_operands(match["args"])]

    def operand(self, text: str) -> tuple[str, str]:
        match = _OPERAND.match(text)
        if match is None:
            raise self.error("the MACA lowering cannot read an operand", f"operand: {text}")
        return match["type"], match["value"] or ""

    def declaration(self, line: str) -> None:
        name, result, parameters = self.signature(line)
        self.source_types[name] = f"{result} ({', '.join(t for t, _ in parameters)})"

    def global_variable(self, line: str) -> None:
        if not re.fullmatch(r"@global_smem = external addrspace\(3\) global \[0 x i8\], align \d+", line):
            raise self.error("the MACA lowering does not know this global", f"line: {line}")
        self.globals.append(line)

    def definition(self, line: str) -> None:
        name, result, parameters = self.signature(line)
        if self.function or result != "void":
            raise self.error("the MACA lowering takes one kernel without device functions", f"line: {line}")
        self.function = self.where = name
        arguments = ", ".join(f"{t} {v}" for t, v in parameters)
        self.body.append(
            f'define metaxgpu_kernel void @{name}({arguments}) convergent nounwind "target-cpu"="{self.processor}" '
            f'"target-features"="+{self.processor}" "metaxgpu-max-block-size"="{LANES * self.warps}" "uniform-work-group-size"="true" {{'
        )

    def assemble(self) -> str:
        generated = [self.generated[n] for n in sorted(self.generated)]
        for name in re.findall(r"@([\w.]+)\(", "".join(generated)):
            if name not in self.generated:
                self.require(name)
        declared = []
        for name in sorted(self.declared):
            result, arguments = self.declared[name].split(" (", 1)
            declared.append(f"declare {result} @{name}({arguments}")
        parts = [f'target datalayout = "{DATALAYOUT}"\ntarget triple = "{TRIPLE}"\n']
        parts += ["\n".join(self.globals) + "\n"] if self.globals else []
        parts += ["\n".join(self.body) + "\n", *generated, "\n".join(declared) + "\n"]
        text = "\n".join(parts)
        foreign = re.search(r"[\w.]*(?:amdgcn|amdgpu|amdhsa|__nv_|__ocml|__ockl)[\w.]*|\basm\b|\btarget\(", text)
        if foreign:
            raise self.error(f"the MACA lowering left '{foreign[0]}' behind")
        return text

    def require(self, name: str, types: str = "") -> None:
        """Declare a function that the result calls."""
        if name in known.DECLARED:
            types = known.DECLARED[name]
        elif name.startswith("llvm.") and not types:
            kind = "float" if name.endswith(".f32") else "double"
            types = f"{kind} ({', '.join([kind] * _ARITY.get(name.split('.')[1], 1))})"
        self.declared[name] = types

    # -- instructions --------------------------------------------------------------------------------------------------
    def instruction(self, line: str) -> None:
        if match := _CALL.match(line):
            self.call(line, match)
            return
        if re.match(r"^  (?:%[\w.]+ = )?(?:tail |musttail )?(?:call|invoke)\b", line):
            raise self.error("the MACA lowering cannot read a call", f"line: {line.strip()}")
        if match := re.match(r"^  (%[\w.]+) = frem (float|double) (\S+), (\S+)$", line):
            # LLVM's AMDGPU family expands frem inexactly; the library's is exact
            name = f"mc_math_func_fmod{'f' if match[2] == 'float' else ''}"
            self.require(name, f"{match[2]} ({match[2]}, {match[2]})")
            self.emit(f"{match[1]} = call {match[2]} @{name}({match[2]} {match[3]}, {match[2]} {match[4]})")
            return
        if match := re.match(r"^  (%[\w.]+) = (.*)$", line):
            self.definitions[match[1]] = match[2]
        self.body.append(line)

    def emit(self, text: str) -> None:
        self.body.append("  " + text)

    def temporary(self) -> str:
        self.temporaries += 1
        return f"%ft.{self.temporaries}"

    def call(self, line: str, match: re.Match[str]) -> None:
        name, result, operands = match["name"], match["result"], [self.operand(a) for a in split_operands(match["args"])]
        if name in known.DROPPED or ((name, operands) == known.HALF_OVERFLOW and not self.has_half):
            return
        if name.startswith("llvm.amdgcn."):
            self.intrinsic(name, result, match["type"], operands)
        elif known.known_generic(name):
            self.require(name, self.source_types[name])
            self.body.append(line)
        elif (replacement := known.library_call(name)) is not None:
            self.replace(replacement, result, match["type"], operands)
        else:
            raise self.error(f"the MACA lowering does not know the function '{name}'", f"line: {line.strip()}")

    def replace(self, new: known.Replacement, result: str | None, kind: str, operands: list[tuple[str, str]]) -> None:
        """Call `new` with the same operands."""
        if new.definition:
            self.generated[new.function] = new.definition
        else:
            self.require(new.function, f"{kind} ({', '.join(t for t, _ in operands)})")
        arguments = ", ".join(f"{t} {v}" for t, v in operands)
        self.emit(f"{result} = call {kind} @{new.function}({arguments})" if result else f"call {kind} @{new.function}({arguments})")

    def intrinsic(self, name: str, result: str | None, kind: str, operands: list[tuple[str, str]]) -> None:
        short = name.removeprefix("llvm.amdgcn.")
        if name == "llvm.amdgcn.workitem.id.x" and result:
            self.definitions[result] = "thread"
        if name in known.RENAMED:
            new = known.RENAMED[name]
            self.replace(known.generated(new) if new.startswith("__ft_") else known.Replacement(new), result, kind, operands)
        elif short == "readfirstlane.i32" and result:
            self.first_lane(result, operands[0][1])
        elif short.startswith("readlane.") and result:
            byte = self.temporary()
            self.emit(f"{byte} = shl i32 {operands[1][1]}, 2")
            self.by_words(result, kind, [operands[0]], lambda r, words: self.bpermute(r, byte, words[0]))
        elif short.startswith("update.dpp.") and result:
            control, rows, banks = (int(v) for _, v in operands[2:5])
            helper = known.dpp(control, rows, banks, operands[5][1] == "true", self.where)
            self.by_words(result, kind, operands[:2], lambda r, words: self.replace(helper, r, "i32", [("i32", w) for w in words]))
        elif short == "ds.swizzle" and result:
            self.replace(known.swizzle(int(operands[1][1])), result, "i32", operands[:1])
        elif name in known.MATRIX and result:
            self.matrix(name, result, operands)
        elif short == "fdot2.f32.bf16" and result and operands[3:] in ([], [("i1", "false")]):
            self.replace(known.generated("__ft_fdot2"), result, "float", operands[:3])
        else:
            raise self.error(f"the MACA lowering does not know the intrinsic '{name}'", f"operands: {operands}")

    def bpermute(self, result: str, byte: str, value: str) -> None:
        self.replace(known.Replacement("llvm.mxc.bsm.bpermute"), result, "i32", [("i32", byte), ("i32", value)])

    def first_lane(self, result: str, value: str) -> None:
        """Identity for the warp's number (equal in all lanes by construction), else an exchange with lane 0."""
        match = re.fullmatch(r"(?:udiv i32 (%[\w.]+), 64|lshr i32 (%[\w.]+), 6)", self.definitions.get(value, ""))
        source = self.definitions.get((match[1] or match[2]) if match else "", "")
        masked = re.fullmatch(r"and i32 (%[\w.]+), \d+", source)
        if source == "thread" or (masked and self.definitions.get(masked[1]) == "thread"):
            self.emit(f"{result} = add i32 {value}, 0")
        else:
            self.bpermute(result, "0", value)

    def by_words(self, result: str, kind: str, operands: list[tuple[str, str]], exchange: Exchange) -> None:
        """Run a 32-bit lane exchange on a value of 32 or 64 bits: `exchange(result, words)` once for each word."""
        if kind == "i32":
            exchange(result, [v for _, v in operands])
            return
        if kind not in ("float", "i64", "double"):
            raise self.error(f"the MACA lowering does not know lane exchanges of {kind}")
        integer = "i32" if kind == "float" else "i64"
        raw = []
        for operand_kind, value in operands:
            if operand_kind != integer:
                bits = self.temporary()
                self.emit(f"{bits} = bitcast {operand_kind} {value} to {integer}")
                value = bits
            raw.append(value)
        exchanged = self.temporary() if kind != "i64" else result
        if integer == "i32":
            exchange(exchanged, raw)
        else:
            self.join_words(exchanged, [self.exchange_word(raw, shift, exchange) for shift in (0, 32)])
        if exchanged != result:
            self.emit(f"{result} = bitcast {integer} {exchanged} to {kind}")

    def exchange_word(self, values: list[str], shift: int, exchange: Exchange) -> str:
        words = []
        for value in values:
            if shift:
                high = self.temporary()
                self.emit(f"{high} = lshr i64 {value}, {shift}")
                value = high
            word = self.temporary()
            self.emit(f"{word} = trunc i64 {value} to i32")
            words.append(word)
        moved = self.temporary()
        exchange(moved, words)
        return moved

    def join_words(self, result: str, words: list[str]) -> None:
        low, wide, high = self.temporary(), self.temporary(), self.temporary()
        self.emit(f"{low} = zext i32 {words[0]} to i64")
        self.emit(f"{wide} = zext i32 {words[1]} to i64")
        self.emit(f"{high} = shl i64 {wide}, 32")
        self.emit(f"{result} = or i64 {low}, {high}")

    def matrix(self, name: str, result: str, operands: list[tuple[str, str]]) -> None:
        if [v for _, v in operands[3:]] != ["0", "0", "0"]:
            raise self.error(f"the MACA lowering does not know '{name}' with broadcast", f"operands: {operands[3:]}")
        halves = []
        for kind, value in operands[:2]:
            if kind not in ("<4 x half>", "float", "i32"):  # bfloat bits travel as half
                cast = self.temporary()
                self.emit(f"{cast} = bitcast {kind} {value} to <4 x half>")
                kind, value = "<4 x half>", cast
            halves.append((kind, value))
        self.replace(known.Replacement(known.MATRIX[name]), result, operands[2][0], [*halves, operands[2]])
