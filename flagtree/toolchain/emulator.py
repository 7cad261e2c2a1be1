"""Runs MACA LLVM IR on the CPU: the numeric gate of generated GPU kernels on a machine without the chip.

The kernel's IR is compiled by libtriton's own LLVM for x86-64 and run with one fiber per GPU thread, in a process of its own, so that a
fault is an error with a place and never a crash.  The invariants are in emulator_runtime.c and emulator_memory.py; docs/emulator.md
says what an emulated run proves.  `execute_built` is what a certificate calls.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from flagtree.errors import KernelFault, ToolchainError
from flagtree.toolchain.emulator_ir import to_host
from flagtree.toolchain.emulator_memory import PROMISED, Memory
from flagtree.toolchain.emulator_session import Session, current, missing

if TYPE_CHECKING:
    import torch

    from flagtree.toolchain.base import BuiltKernel
    from flagtree.toolchain.emulator_sparse import SparseMemory

Argument = Union["torch.Tensor", int, float]
Block = tuple[int, int, int]
LANES = 64
MAX_WARPS = 8
SHARED_BYTES = 64 * 1024
__all__ = [
    "ORDERS", "Emulated", "Run", "evaluate_index", "execute_built", "execute_in", "grid_of", "load", "missing", "sample_blocks",
]  # fmt: skip
ORDERS = ("forward", "reverse", "random:1")
_KINDS = {"forward": 0, "reverse": 1, "random": 2}
_INTEGERS = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
_LLVM_TYPES = {"i1": "i1", "fp32": "float", "fp64": "double"}
_STATES = ("ready", "in a lane exchange", "at a barrier", "at the end")
_SIGNALS = {
    4: "an illegal instruction",
    7: "a bus error",
    8: "an integer division by zero or its overflow",
    11: "an access outside every argument",
}


@dataclass(frozen=True, slots=True)
class Run:
    """What one emulated run did: counts of blocks, barriers of a block, lane exchanges of a warp, and switches of threads."""

    blocks: int
    barriers: int
    exchanges: int
    switches: int


@dataclass(frozen=True, slots=True)
class Emulated:
    """A kernel ready to run.  `signature`: Triton's types of its arguments in order ("*bf16", "i32", "fp32")."""

    function: str
    signature: tuple[str, ...]
    host: str
    key: str

    def run(
        self, grid: Sequence[int], warps: int, arguments: Sequence[Argument], blocks: Sequence[Block] | None = None, order: str = "forward",
        *, shared: int = SHARED_BYTES, exact: bool = False, seconds: float = 120,
    ) -> Run:  # fmt: skip
        """Run on CPU tensors, which are written in place; `blocks` of the grid only (default: all).

        `order` ("forward", "reverse", "random:<seed>") is the order of blocks, warps and lanes; forward puts each tensor right before
        inaccessible memory, reverse right after it.  `shared` bytes are accessible.  `exact`: give no alignment beyond the element's.
        Raises KernelFault: an access outside every tensor, threads that wait for each other, a division by zero, no end in time.
        """
        memory, contents, run = self.execute(grid, warps, arguments, blocks, order, shared, exact, seconds)
        memory.store(contents)
        return run

    def execute(
        self, grid: Sequence[int], warps: int, arguments: Sequence[Argument], blocks: Sequence[Block] | None, order: str, shared: int,
        exact: bool, seconds: float,
    ) -> tuple[Memory, list[bytes], Run]:  # fmt: skip
        """`run` that leaves the tensors as they are: where they are in the emulator's memory, its bytes afterwards, and the counts."""
        tensors = [a for a in arguments if not isinstance(a, (int, float))]
        memory = Memory(current().new_file(), tensors, "start" if order == "reverse" else "end", exact)
        try:
            run = self.run_in(memory, _grid(grid) if blocks is None else blocks, warps, arguments, order, shared, seconds)
            return memory, memory.read(), run
        finally:
            memory.path.unlink(missing_ok=True)

    def run_in(
        self, memory: Memory | SparseMemory, blocks: Sequence[Block], warps: int, arguments: Sequence[Argument], order: str, shared: int,
        seconds: float,
    ) -> Run:  # fmt: skip
        """Run `blocks` in memory that holds the tensors among `arguments`; what the kernel wrote is in it afterwards."""
        kind, seed = _order(order)
        if not 0 < warps <= MAX_WARPS or not 0 <= shared <= SHARED_BYTES:
            raise ToolchainError(
                f"{warps} warps with {shared} bytes of shared memory do not fit MACA",
                where=self.function,
                why=f"a block has at most {MAX_WARPS} warps and {SHARED_BYTES} bytes",
            )
        session = current()
        self._load(session, seconds)
        answer = session.request({
            "do": "run", "key": self.key, "memory": str(memory.path), "guard": memory.guard, "threads": warps * LANES, "shared": shared,
            "regions": [(r.offset, r.size) for r in memory.regions], "slots": self._slots(arguments, memory), "order": kind,
            "seed": seed, "blocks": list(itertools.chain.from_iterable(_ordered(list(blocks), kind, seed))),
        }, seconds)  # fmt: skip
        self._judge(answer, memory, shared)
        return Run(*(answer[name] for name in ("blocks", "barriers", "exchanges", "switches")))

    def _load(self, session: Session, seconds: float) -> None:
        if self.key not in session.loaded:
            path = session.folder / f"{self.key}.ll"
            path.write_text(self.host)
            session.request({"do": "load", "key": self.key, "path": str(path)}, seconds)
            session.loaded.add(self.key)

    def _slots(self, arguments: Sequence[Argument], memory: Memory | SparseMemory) -> list[object]:
        """Each argument as 8 bytes, or as (region, byte) of a tensor; the two null pointers of Triton's ABI last."""
        if len(arguments) != len(self.signature):
            raise ToolchainError(f"{self.function} takes {len(self.signature)} arguments, not {len(arguments)}")
        slots: list[object] = []
        tensors = itertools.count()
        for i, (argument, kind) in enumerate(zip(arguments, self.signature, strict=True)):
            is_number = isinstance(argument, (int, float))
            if is_number == kind.startswith("*"):
                raise ToolchainError(
                    f"argument {i} of {self.function} must be {'a tensor' if is_number else 'a number'}", why=f"it is {kind}"
                )
            slots.append(_number(argument, kind) if isinstance(argument, (int, float)) else memory.slot(next(tensors)))
        return [*slots, 0, 0]

    def _judge(self, answer: Mapping[str, Any], memory: Memory | SparseMemory, shared: int) -> None:
        """Raise what the report says."""
        code, place = answer["code"], f"{self.function}, block ({answer['x']}, {answer['y']}, {answer['z']})"
        if code == 1:
            raise KernelFault(
                "the threads of a block wait for each other in an emulated kernel", where=place,
                why=f"thread {answer['thread']} is {_STATES[answer['state']]} (place {answer['site']}), "
                    f"thread {answer['other_thread']} {_STATES[answer['other_state']]} (place {answer['other_site']})",
                hint="a barrier or a reduction stands where not all threads of a block come",
            )  # fmt: skip
        if code == 2:
            what = _SIGNALS.get(answer["signal"], f"signal {answer['signal']}")
            at = (
                f"{'write' if answer['wrote'] else 'read'} {memory.describe(answer['address'], answer['starts'])}"
                if answer["signal"] == 11
                else ""
            )
            raise KernelFault(
                f"an emulated kernel did {what}", where=f"{place}, thread {answer['thread']}", why=at, hint="a mask or an index is wrong"
            )
        if code == 3:
            raise KernelFault(
                "an emulated kernel wrote past its shared memory", where=place, why=f"byte {answer['address']} of {shared}"
            )
        if code:
            raise ToolchainError("the emulator has no memory for its threads", where=place)


def load(llir: str, function: str, signature: Sequence[str]) -> Emulated:
    """A kernel of MACA LLVM IR.  Raises ToolchainError when the text has no such kernel, or with other parameters than `signature` says."""
    host, parameters = to_host(llir, function)
    expected = [_llvm_type(kind) for kind in signature] + ["ptr addrspace(1)"] * 2
    if list(parameters) != expected:
        raise ToolchainError(
            f"the parameters of {function} do not fit its signature", why=f"{', '.join(parameters)} against {', '.join(expected)}"
        )
    return Emulated(function, tuple(signature), host, hashlib.sha256(host.encode()).hexdigest()[:32])


def _llvm_type(kind: str) -> str:
    if kind.startswith("*"):
        return "ptr addrspace(1)"
    if kind in _LLVM_TYPES:
        return _LLVM_TYPES[kind]
    if kind in _INTEGERS:
        return f"i{8 * _INTEGERS[kind]}"
    raise ToolchainError(f"the emulator takes no argument of type {kind}", why="numbers are integers, fp32 or fp64")


def _number(value: float, kind: str) -> int:
    """A number as the low bytes of an 8-byte slot."""
    if kind == "fp32":
        return int.from_bytes(struct.pack("<f", value), "little")
    if kind == "fp64":
        return int.from_bytes(struct.pack("<d", value), "little")
    if isinstance(value, float):
        raise ToolchainError(f"a kernel takes {kind}, not the float {value}")
    bits = 8 * _INTEGERS[kind]
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise ToolchainError(f"{value} does not fit {kind}")
    return value % (1 << bits)


def _order(order: str) -> tuple[int, int]:
    name, _, seed = order.partition(":")
    if name not in _KINDS or (seed and not seed.isdigit()) or bool(seed) != (name == "random"):
        raise ToolchainError(f"unknown order '{order}'", hint="forward, reverse or random:<seed>")
    return _KINDS[name], int(seed or 0)


def _grid(grid: Sequence[int]) -> list[Block]:
    x, y, z = (*grid, 1, 1)[:3]
    return [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]


def _ordered(blocks: list[Block], kind: int, seed: int) -> list[Block]:
    if kind == _KINDS["random"]:
        random.Random(seed).shuffle(blocks)
    return blocks[::-1] if kind == _KINDS["reverse"] else blocks


def sample_blocks(grid: Sequence[int], count: int, seed: int = 0) -> list[Block]:
    """At most `count` blocks of a grid: the first, the last and random ones, in order."""
    x, y, z = (*grid, 1, 1)[:3]
    total = x * y * z
    chosen = set(range(total)) if total <= count else {0, total - 1, *random.Random(seed).sample(range(total), max(0, count - 2))}
    return [(i % x, i // x % y, i // (x * y)) for i in sorted(chosen)]


def evaluate_index(expression: object, values: Mapping[str, int]) -> int:
    """The integer of an index expression in JSON (docs/architecture.md): a number, a name, [op, a, b, ...].  ToolchainError otherwise."""
    if isinstance(expression, int) and not isinstance(expression, bool):
        return expression
    if isinstance(expression, str) and expression in values:
        return values[expression]
    if isinstance(expression, (list, tuple)) and len(expression) >= 3:
        first, *rest = (evaluate_index(e, values) for e in expression[1:])
        for value in rest:
            match expression[0]:
                case "+":
                    first += value
                case "*":
                    first *= value
                case "//" if value > 0:
                    first //= value
                case "%" if value > 0:
                    first %= value
                case _:
                    raise ToolchainError(f"not an index expression: {expression!r}")
        return first
    raise ToolchainError(f"not an index expression: {expression!r}", why=f"names: {', '.join(sorted(values))}")


def execute_built(
    built: BuiltKernel, variant: str, buffers: Sequence[torch.Tensor], symbols: Sequence[int], orders: Sequence[str] = ORDERS,
    blocks: Sequence[Block] | None = None, seconds: float = 120,
) -> list[Run]:  # fmt: skip
    """Run a kernel that `toolchain.maca` built on CPU tensors b0, b1, … and the values of n0, n1, …; the tensors are written in place.

    `variant` is "aligned" or "generic" (run without any alignment beyond the element's).  The kernel starts from the same bytes once for
    each of `orders`; ToolchainError when two orders differ in a bit (a race), and for what `Emulated.run` raises.
    """
    launch: Mapping[str, Any] = built.launch
    arguments: list[Argument] = [*buffers, *symbols]
    kernel = _variant(built, variant)
    grid = grid_of(built, symbols)
    if not all(grid):
        return []
    _check_promises(launch, variant, arguments)
    shared = _shared(launch, variant)
    runs: list[Run] = []
    first: list[bytes] = []
    for order in orders:
        memory, contents, run = kernel.execute(grid, launch["warps"], arguments, blocks, order, shared, variant == "generic", seconds)
        if runs and contents != first:
            changed = [r.members for r, a, b in zip(memory.regions, first, contents, strict=True) if a != b]
            raise KernelFault(
                f"the emulated kernel {kernel.function} gives other bits in another order of threads",
                why=f"{orders[0]} and {order} differ in argument {changed}",
                hint="two threads race: a barrier is missing, or a combiner gives other bits when its operands change places",
            )
        runs.append(run)
        first = contents
    if runs:
        memory.store(first)
    return runs


def execute_in(
    built: BuiltKernel, variant: str, memory: SparseMemory, symbols: Sequence[int], blocks: Sequence[Block], order: str = "forward",
    seconds: float = 120,
) -> Run:  # fmt: skip
    """Run `blocks` of a kernel that `toolchain.maca` built on sparse memory, whose tensors are b0, b1, …  Raises as `Emulated.run`."""
    launch: Mapping[str, Any] = built.launch
    arguments: list[Argument] = [*memory.tensors, *symbols]
    _check_promises(launch, variant, arguments)
    shared = _shared(launch, variant)
    return _variant(built, variant).run_in(memory, blocks, launch["warps"], arguments, order, shared, seconds)


def grid_of(built: BuiltKernel, symbols: Sequence[int]) -> list[int]:
    """The three sizes of a built kernel's grid at the values of n0, n1, …"""
    grid: Sequence[object] = built.launch["grid"]  # type: ignore[assignment]
    return [evaluate_index(e, {f"n{i}": value for i, value in enumerate(symbols)}) for e in grid]


def _variant(built: BuiltKernel, variant: str) -> Emulated:
    text = built.files.get(f"{variant}.llir")
    if text is None:
        raise ToolchainError(
            f"the kernel {built.digest[:16]} has no {variant}.llir", why=f"tier {built.tier}", hint="build it with toolchain.maca"
        )
    launch: Mapping[str, Any] = built.launch
    return load(text.decode(), launch["function"], [kind for _, kind in launch["signature"]])


def _shared(launch: Mapping[str, Any], variant: str) -> int:
    """Shared bytes of the LLVM IR.  `shared` of a finalized kernel is its binary's, whose compiler may lay them out in another way."""
    record = launch["variants"][variant]
    return int(record.get("llir_shared", record["shared"]))


def _check_promises(launch: Mapping[str, Any], variant: str, arguments: Sequence[Argument]) -> None:
    """A variant must not run on arguments that break what it promises, as the launcher would not choose it."""
    required = set(launch["variants"][variant].get("requires", ()))
    for (name, _), argument in zip(launch["signature"], arguments, strict=False):
        value = argument if isinstance(argument, (int, float)) else argument.data_ptr()
        if name in required and value % PROMISED:
            raise ToolchainError(
                f"the {variant} variant of {launch['function']} needs {name} divisible by {PROMISED}", why=f"it is {value}"
            )
