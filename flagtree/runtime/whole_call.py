"""A whole call in C: a frame whose steps are all kernels on the CPU becomes one builtin function over the caller's arguments.

toolchain/call.cpp, linked into every library of CPU kernels, does what `Frame.run` does: addresses, new tensors, kernels, results.
A frame that it cannot serve (sizes that change, externs, views handed back) has none, and `launch.py` goes on step by step.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flagtree.runtime.expand import Declared
from flagtree.runtime.frame import Frame, empty_strided_cpu
from flagtree.runtime.prepare import Allocate, Launch, Prepared

Function = Callable[..., Any]  # takes the inputs; None where it leaves the call to `Frame.run`

_METH_FASTCALL = 0x80  # CPython's methodobject.h; of the stable ABI since 3.10
_STABLE = ("PyObject_Call", "PyObject_Vectorcall", "PyTuple_New", "PyTuple_SetItem", "PyLong_AsVoidPtr", "PyErr_Occurred", "Py_IncRef",
           "Py_DecRef", "PyEval_SaveThread", "PyEval_RestoreThread")  # fmt: skip


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = [("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("text", ctypes.c_char_p)]


class _Address(int):
    """The address of the C frame; what that points to lives as long as the number, which the builtin function holds."""

    keeps: tuple


def whole_call(frame: Frame, inputs: Sequence[Declared]) -> Function | None:
    """The frame as one function over `inputs`, which it then has for itself; None where a call needs more than addresses."""
    prepared = frame.prepared
    sources, library = _sources(prepared, inputs), getattr(prepared.library, "shared", None)
    entry = None if library is None else _entry(library)
    if sources is None or entry is None:
        return None
    fresh, outputs = prepared.homes.fresh, prepared.program.outputs
    launches = [s for s in prepared.steps if isinstance(s, Launch)]
    words = array("q", [n for name, k in sources.items() for at, offset in frame.positions(name) for n in (at, k, offset)])
    block, numbers = frame.words.buffer_info()[0], frame.numbers.buffer_info()[0]
    calls = array("q", [n for s in launches for n in (_function_address(s.kernel), block + s.pointers, numbers + s.symbols)])
    results = array("q", [-1 if name is None else sources[name] for name in outputs])
    layouts = [(*prepared.layouts[name].at(frame.values), prepared.layouts[name].dtype) for name in fresh]
    objects, made = array("q", [id(layout) for layout in layouts] or [0]), array("q", [0] * max(1, len(fresh)))
    python, function = entry
    fields = array("q", [_start(python), 0, len(inputs), len(fresh), len(words) // 3, len(launches), len(results), block,
                         *map(_start, (objects, made, words, calls, results))])  # fmt: skip
    method = _Method(b"whole_call", function, _METH_FASTCALL, None)
    address = _Address(_start(fields))
    address.keeps = (frame, layouts, objects, made, words, calls, results, python, fields, method)
    return _builtin()(ctypes.addressof(method), address, None)


def _sources(prepared: Prepared, inputs: Sequence[Declared]) -> dict[str, int] | None:
    """Buffers that a call brings (arguments, then new tensors) by number; None for a launch list that is more than kernels over them."""
    plain = all(isinstance(s, Allocate) or (isinstance(s, Launch) and s.above is None) for s in prepared.steps)
    if prepared.symbols or not plain or any(b.role in ("scalar", "opaque") for b in inputs):
        return None
    sources = {name: k for k, name in enumerate((*(b.name for b in inputs), *prepared.homes.fresh))}
    return sources if all(o is None or (isinstance(o, str) and o in sources) for o in prepared.program.outputs) else None


def _entry(library: ctypes.CDLL) -> tuple[array, int] | None:
    """The table of the interpreter's functions, which the library then knows, and the address of its entry; None for a library or
    an interpreter without."""
    try:
        known = ctypes.c_void_p.in_dll(library, "ft_call_python")
        function = _function_address(library.ft_call)
        table = _python_table()
    except (AttributeError, ValueError):
        return None
    known.value = _start(table)
    return table, function


_tables: list[array] = []  # one for the process, which libraries point to for good


def _python_table() -> array:
    """As `struct python` of call.cpp."""
    if not _tables:
        functions = (_function_address(getattr(ctypes.pythonapi, name)) for name in _STABLE)
        _tables.append(array("q", [*functions, *map(id, _objects)]))
    return _tables[0]


_objects = (None, torch.Tensor.data_ptr, empty_strided_cpu)


def _builtin() -> Any:
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.argtypes, make.restype = (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p), ctypes.py_object
    return make


def _function_address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _start(block: array) -> int:
    return block.buffer_info()[0]
