"""Externs at run time: the operator that a callee names, and its operands from JSON.

A callee is hostile text: only an operator that torch has registered is ever reached, by three checked identifiers.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from flagtree.errors import BundleError
from flagtree.runtime.dtypes import torch_dtype

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_FLOATS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_LAYOUTS = ("strided", "sparse_coo", "sparse_csr")
_MEMORY_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")


@functools.cache
def resolve(callee: str) -> torch._ops.OpOverload:
    """The operator `namespace.name.overload`: of torch, of flagtree, or registered by the user before the load.
    BundleError when there is none; nothing else of torch can be named."""
    parts = callee.split(".") if isinstance(callee, str) else []
    if len(parts) != 3 or not all(map(_IDENTIFIER.match, parts)):
        raise BundleError("an extern's callee is not an operator's name", where=repr(callee)[:200], why="namespace.name.overload is")
    if parts[0] == "flagtree":
        import flagtree.runtime.operators  # noqa: F401  # registers torch.ops.flagtree.*
    namespace: Any = getattr(torch.ops, parts[0], None)
    packet = getattr(namespace, parts[1], None) if isinstance(namespace, torch._ops._OpNamespace) else None
    operator = getattr(packet, parts[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(operator, torch._ops.OpOverload):
        hint = "update torch" if parts[0] in ("aten", "prims") else f"import the library that registers torch.ops.{parts[0]} before loading"
        raise BundleError(f"there is no operator '{callee}' here", why=f"torch {torch.__version__} has none registered", hint=hint)
    return operator


def returns_view(operator: torch._ops.OpOverload) -> bool:
    """Does the schema say that a result shares memory with an operand that it does not write?"""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)


def constant(operand: object) -> object:
    """An operand without buffers or symbols as the Python value that torch takes.  BundleError for an unknown form."""
    if operand is None or isinstance(operand, (bool, int, float, str)):
        return operand
    if isinstance(operand, dict) and len(operand) == 1:
        kind, value = next(iter(operand.items()))
        if kind == "float" and value in _FLOATS:
            return _FLOATS[value]
        if kind == "list":
            return [constant(v) for v in value]
        if kind == "type" and len(value) == 2 and all(isinstance(v, str) for v in value):
            return _type_argument(*value)
    raise BundleError("an operand has an unknown form", where=repr(operand)[:200])


def _type_argument(kind: str, value: str) -> object:
    plain = value.removeprefix("torch.")
    if kind == "dtype":
        return torch_dtype(plain)
    if kind == "device":
        return torch.device(plain)
    if kind == "layout" and plain in _LAYOUTS:
        return getattr(torch, plain)
    if kind == "memory_format" and plain in _MEMORY_FORMATS:
        return getattr(torch, plain)
    raise BundleError(f"an operand names an unknown {kind}", where=value[:80])
