"""Launches of GPU kernels: a launch record made executable once, then one call into C for each run of launches.

`Compiled` goes through launcher.c, `Interpreted` does the same in Python where that was not built; both look at pointers and symbols on
every launch to choose the variant, and read their arguments where the frame writes them.  `gpu.py` gives them functions to launch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flagtree.errors import BundleError, DeviceError
from flagtree.runtime.launcher_build import LIBRARY

VERSION, MAX_ARGUMENTS, MAX_STACK = 1, 1024, 64  # as in launcher.c
NO_VARIANT, BAD_GRID = -1, -2
PUSH_NUMBER, PUSH_SYMBOL, ADD, MULTIPLY, DIVIDE, REMAINDER = range(6)
_OPERATIONS = {"+": ADD, "*": MULTIPLY, "//": DIVIDE, "%": REMAINDER}
_ALIGNMENT = 16  # bytes of a pointer, or a symbol's value: what Triton's promise of divisibility says
_OURS = {
    NO_VARIANT: "no variant of the kernel takes these arguments: it has no generic one",
    BAD_GRID: "the grid is no size: it is negative, too large or divides by zero",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form.  `function`: the driver's handle; `shared`: dynamic bytes; `nulls`: null pointers that trail the arguments;
    `required`: for each argument 1 where it must divide by 16."""

    function: int
    shared: int
    nulls: int
    required: bytes


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """docs/architecture.md, "GPU kernels: ABI", read: counts, grid as postfix code, `variants` the most demanding first."""

    name: str
    threads: int
    pointers: int
    symbols: int
    grid: tuple[tuple[tuple[int, int], ...], ...]
    variants: tuple[Variant, ...]


Call = tuple[LaunchRecord, int, int]  # the kernel, where its addresses lie, where its symbols lie
Refuse = Callable[[LaunchRecord, int], Exception]


class Route(Protocol):
    """Makes one closure that launches `calls` in order on a stream; it raises what `refuse` makes of the driver's code."""

    def run(self, calls: Sequence[Call], stream: int, refuse: Refuse) -> Callable[[], None]: ...


def read_record(launch: Mapping[str, Any], function_of: Callable[[str, str, int], int]) -> LaunchRecord:
    """The record of a kernel's `launch`; `function_of(variant, file, shared)` gives the handle.  BundleError when it is not valid."""
    try:
        signature = [(str(name), str(kind)) for name, kind in launch["signature"]]
        kinds = [kind for _, kind in signature]
        pointers = sum(kind.startswith("*") for kind in kinds)
        if not all(k.startswith("*") for k in kinds[:pointers]) or not {"i32", "i64"}.issuperset(kinds[pointers:]):
            raise ValueError(f"the signature is not pointers, then integers: {kinds}")
        symbols = {name: i for i, (name, _) in enumerate(signature[pointers:])}
        threads, grid = int(launch["threads"]), tuple(tuple(_postfix(e, symbols)) for e in launch["grid"])
        if len(grid) != 3 or not 0 < threads <= 1024 or any(_depth(code) > MAX_STACK for code in grid):
            raise ValueError("the grid has three sizes and a block at most 1024 threads")
        found = []
        for name, variant in launch["variants"].items():
            required = bytes(n in variant["requires"] for n, _ in signature)
            if not 0 <= variant["null_pointers"] <= 4 or len(signature) + 4 > MAX_ARGUMENTS or not 0 <= variant["shared"] < 1 << 31:
                raise ValueError(f"the variant '{name}' has odd sizes")
            handle = function_of(name, variant["file"], variant["shared"])
            found.append(Variant(handle, variant["shared"], variant["null_pointers"], required))
        found.sort(key=lambda v: -sum(v.required))
        return LaunchRecord(launch["function"], threads, pointers, len(symbols), grid, tuple(found))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BundleError("a kernel's launch record is not valid", where=str(launch.get("function")), why=why) from None


def _postfix(expression: object, symbols: Mapping[str, int], depth: int = 0) -> list[tuple[int, int]]:
    if isinstance(expression, int) and not isinstance(expression, bool):
        return [(PUSH_NUMBER, expression)]
    if isinstance(expression, str):
        return [(PUSH_SYMBOL, symbols[expression])]
    if not isinstance(expression, (list, tuple)) or len(expression) < 3 or expression[0] not in _OPERATIONS or depth > 32:
        raise ValueError(f"not an index expression: {str(expression)[:80]}")
    code = _postfix(expression[1], symbols, depth + 1)
    for operand in expression[2:]:
        code += [*_postfix(operand, symbols, depth + 1), (_OPERATIONS[expression[0]], 0)]
    return code


def _depth(code: Sequence[tuple[int, int]]) -> int:
    height = deepest = 0
    for operation, _ in code:
        height += 1 if operation <= PUSH_SYMBOL else -1
        deepest = max(deepest, height)
    return deepest


def refusal(code: int, record: LaunchRecord) -> DeviceError | None:
    """The error for a code of ours, None for one of the driver's."""
    return DeviceError("a kernel was not launched", where=record.name, why=_OURS[code]) if code in _OURS else None


# -- through C -------------------------------------------------------------------------------------------------------
class Compiled:
    """launcher.c as a shared library at `path`.  DeviceError when it is of another version than this file."""

    def __init__(self, path: Path, launch_address: int) -> None:
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        found = ctypes.c_int32.in_dll(self._library, "ft_launcher_version").value
        if found != VERSION:
            raise DeviceError("the compiled launcher is of another version", where=str(path), why=f"{found} instead of {VERSION}",
                              hint="python -m flagtree.runtime.launcher_build")  # fmt: skip
        self._launch = self._library.ft_launch
        self._launch.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        self._launch.restype = ctypes.c_int32
        self._address = launch_address
        self._kernels: dict[int, tuple[LaunchRecord, list[Any]]] = {}  # by identity of the record, which stays alive beside it

    def run(self, calls: Sequence[Call], stream: int, refuse: Refuse) -> Callable[[], None]:
        block = array("Q", [word for record, words, numbers in calls for word in (self._kernel(record), words, numbers)])
        failed, launch = ctypes.c_int64(), self._launch
        arguments = (block.buffer_info()[0], len(calls), stream, ctypes.addressof(failed))

        def run() -> None:
            code = launch(*arguments)
            if code:
                raise refuse(calls[failed.value][0], code)

        run.keeps = (block, failed)  # type: ignore[attr-defined]  # C holds their addresses
        return run

    def _kernel(self, record: LaunchRecord) -> int:
        """The address of `struct kernel` for a record, made once."""
        kept = self._kernels.get(id(record))
        if kept is None:
            required = [(ctypes.c_uint8 * max(1, len(v.required)))(*v.required) for v in record.variants]
            variants = array("Q")
            for v, flags in zip(record.variants, required):
                variants.extend((v.function, v.shared, v.nulls, ctypes.addressof(flags)))
            grid = array("q")
            for code in record.grid:
                grid.append(len(code))
                grid.extend(x for pair in code for x in pair)
            head = (self._address, record.threads, record.pointers, record.symbols, len(record.variants))
            kernel = array("Q", [*head, variants.buffer_info()[0], grid.buffer_info()[0]])
            kept = self._kernels[id(record)] = (record, [kernel, variants, grid, required])
        return kept[1][0].buffer_info()[0]


# -- through ctypes alone --------------------------------------------------------------------------------------------
class Interpreted:
    """launcher.c in Python, call by call through ctypes; slower, the same launches."""

    def __init__(self, launch: Callable[..., int]) -> None:
        self._launch = launch

    def run(self, calls: Sequence[Call], stream: int, refuse: Refuse) -> Callable[[], None]:
        launches = [(record, self._one(record, words, numbers, stream)) for record, words, numbers in calls]

        def run() -> None:
            for record, launch in launches:
                code = launch()
                if code:
                    raise refuse(record, code)

        return run

    def _one(self, record: LaunchRecord, words: int, numbers: int, stream: int) -> Callable[[], int]:
        pointers = (ctypes.c_uint64 * record.pointers).from_address(words) if record.pointers else ()
        symbols: Any = (ctypes.c_int64 * record.symbols).from_address(numbers) if record.symbols else ()
        null = ctypes.c_uint64()
        forms = []
        for variant in record.variants:
            places = [words + 8 * i for i in range(record.pointers)] + [numbers + 8 * i for i in range(record.symbols)]
            places += [ctypes.addressof(null)] * variant.nulls
            arguments = (ctypes.c_void_p * max(1, len(places)))(*places)
            p = [i for i in range(record.pointers) if variant.required[i]]
            s = [i for i in range(record.symbols) if variant.required[record.pointers + i]]
            forms.append((variant, p, s, arguments))
        launch = self._launch

        def run() -> int:
            null.value = 0
            try:
                grid = [evaluate(code, symbols) for code in record.grid]
            except ZeroDivisionError:
                return BAD_GRID
            if not all(0 <= g < 1 << 32 for g in grid):
                return BAD_GRID
            if 0 in grid:
                return 0
            for variant, p, s, arguments in forms:
                if not any(pointers[i] % _ALIGNMENT for i in p) and not any(symbols[i] % _ALIGNMENT for i in s):
                    return launch(variant.function, *grid, record.threads, 1, 1, variant.shared, stream, arguments, None)
            return NO_VARIANT

        return run


def evaluate(code: Sequence[tuple[int, int]], symbols: Sequence[int]) -> int:
    """The value of a grid expression in postfix form."""
    stack: list[int] = []
    for operation, operand in code:
        if operation <= PUSH_SYMBOL:
            stack.append(symbols[operand] if operation == PUSH_SYMBOL else operand)
            continue
        b, a = stack.pop(), stack.pop()
        stack.append(a + b if operation == ADD else a * b if operation == MULTIPLY else a // b if operation == DIVIDE else a % b)
    return stack[0]


# -- which -----------------------------------------------------------------------------------------------------------
BUILT = Path(__file__).with_name(LIBRARY)  # put there when the package is installed


@functools.cache
def built() -> bool:
    """Was launcher.c built where this package lies?"""
    return BUILT.is_file()


def route(launch: Any) -> Route:
    """How launches go here, for the driver's launch function (ctypes, with its types): through C where it was built."""
    if sys.byteorder != "little":
        raise DeviceError("GPU kernels are launched on little-endian machines only")
    if built():
        return Compiled(BUILT, ctypes.cast(launch, ctypes.c_void_p).value or 0)
    return Interpreted(launch)
