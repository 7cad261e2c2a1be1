"""The promises of a bundle, checked on the tensors that a caller brings before any kernel sees an address.

Names, element types, device, rank, sizes, symbol ranges and multiples, strides, and that what is written overlaps nothing
else.  Every error names the tensor and the promise.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from flagtree.errors import BindError
from flagtree.runtime.expand import Declared
from flagtree.runtime.index import evaluate, same_strides
from flagtree.runtime.prepare import Layout, Prepared, check_symbol, read_symbol


def check_names(given: Collection[str], wanted: Sequence[str], part: str) -> None:
    """BindError naming what is missing and, for a name that is not known, the closest that is missing."""
    missing = [n for n in wanted if n not in given]
    unknown = sorted(set(given) - set(wanted))
    if not missing and not unknown:
        return
    lines = []
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        lines.append(f"missing: {', '.join(missing[:5])}{more}")
    for name in unknown[:5]:
        near = difflib.get_close_matches(str(name), missing or wanted, n=1, cutoff=0.4)
        lines.append(f"unknown: {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    raise BindError(f"{part} was given other tensors than it takes", why="; ".join(lines), hint="`flagtree inspect BUNDLE` lists them")


class Checker:
    """Checks the buffers `names` of a prepared launch list; `known` are tensors that were bound before.

    A call that brings the same types, sizes and strides as the call before is checked by comparing those.
    """

    def __init__(self, prepared: Prepared, names: Sequence[str], known: Mapping[str, Any] | None = None) -> None:
        self.prepared, self.names, self.known = prepared, list(names), dict(known or {})
        self.layouts = {n: prepared.layouts[n] for n in names}
        present = {*self.names, *self.known}
        self.symbols = [s for s in prepared.symbols if s.buffer in present and s.name not in prepared.homes.late]
        self.complete = all(s.buffer in present for s in prepared.symbols if s.name not in prepared.homes.late)
        self.written = [n for n in self.names if n in prepared.written]
        self.deferred = [n for n in self.known if n in prepared.layouts and not _static(prepared.layouts[n])]
        self._known_spans = _spans(self.known)
        self._signature: list | None = None
        self._addresses: list[int] | None = None

    def check(self, tensors: Mapping[str, Any]) -> None:
        """BindError for the first promise that `tensors` break; the names are known to be right."""
        signature = [_signature(tensors[n]) for n in self.names]
        if signature != self._signature:
            self._check_all(tensors)
            self._signature = signature
            self._addresses = None
        if self.written:
            addresses = [t.data_ptr() for n in self.names if isinstance(t := tensors[n], torch.Tensor)]
            if addresses != self._addresses:
                self._check_overlap(tensors)
                self._addresses = addresses

    def _check_all(self, tensors: Mapping[str, Any]) -> None:
        for name, layout in self.layouts.items():
            _check_kind(name, layout, tensors[name], self.prepared.tensors)
        values = [max(1, s.lo) for s in self.prepared.symbols]
        for symbol in self.symbols:
            source = tensors[symbol.buffer] if symbol.buffer in tensors else self.known[symbol.buffer]
            value = values[self.prepared.places[symbol.name]] = read_symbol(symbol, source)
            check_symbol(symbol, value)
        for name, layout in self.layouts.items():
            # weights that are bound first may have sizes whose symbols come with the inputs; those are checked then
            if layout.role not in ("scalar", "opaque") and (self.complete or _static(layout)):
                self._check_layout(name, layout, tensors[name], values)
        for name in self.deferred if self.complete else ():
            self._check_layout(name, self.prepared.layouts[name], self.known[name], values)

    def _check_layout(self, name: str, layout: Layout, tensor: torch.Tensor, values: Sequence[int]) -> None:
        sizes, strides = layout.at(values)
        found = tuple(tensor.shape)
        for k, (have, want) in enumerate(zip(found, sizes)):
            if have != want:
                symbol = _symbols_in(self.prepared, layout.shape[k], values)
                raise BindError(
                    f"{name} has the wrong size", where=f"dimension {k}", why=f"{have} instead of {want}{symbol} in {list(found)}"
                )
        if not same_strides(sizes, tensor.stride(), strides):
            hint = f"pass {name}.contiguous()" if layout.strides is None else ""
            raise BindError(f"{name} has the wrong strides", why=f"{list(tensor.stride())} instead of {list(strides)}", hint=hint)

    def _check_overlap(self, tensors: Mapping[str, Any]) -> None:
        spans = sorted([*self._known_spans, *_spans({n: tensors[n] for n in self.names})])
        reach, holder = 0, ""
        written = set(self.written)
        for start, end, name in spans:
            if start < reach and (name in written or holder in written):
                changed = name if name in written else holder
                raise BindError(f"{name} and {holder} share memory", why=f"{changed} is written in place", hint=f"pass {changed}.clone()")
            if end > reach:
                reach, holder = end, name


def _static(layout: Layout) -> bool:
    return all(isinstance(e, int) for e in (*layout.shape, *(layout.strides or ())))


def _signature(value: Any) -> tuple:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.device, value.layout, value.is_neg()
    return type(value), value


def _check_kind(name: str, layout: Layout, value: Any, home: torch.device) -> None:
    if layout.role == "opaque":
        return
    if layout.role == "scalar":
        if not isinstance(value, (bool, int, float)):
            raise BindError(f"{name} must be a number", why=f"it is a {type(value).__name__}")
        return
    if not isinstance(value, torch.Tensor):
        raise BindError(f"{name} must be a tensor", why=f"it is a {type(value).__name__}")
    if value.dtype is not layout.dtype:
        hint = f"pass {name}.to({layout.dtype})"
        raise BindError(f"{name} has the wrong element type", why=f"{value.dtype} instead of {layout.dtype}", hint=hint)
    if value.device != home or value.layout is not torch.strided:
        place, hint = ("in main memory", f"pass {name}.cpu()") if home.type == "cpu" else (f"on {home}", f"pass {name}.to('{home}')")
        raise BindError(f"{name} is not a plain tensor {place}", why=f"{value.layout} on {value.device}", hint=hint)
    if value.is_neg():  # conjugate views are complex, and no element type of ours is
        raise BindError(f"{name} is a lazy view", why="its memory does not hold its values", hint=f"pass {name}.resolve_neg()")
    if value.ndim != len(layout.shape):
        raise BindError(f"{name} has the wrong rank", why=f"{value.ndim} dimensions {list(value.shape)} instead of {len(layout.shape)}")


def _symbols_in(prepared: Prepared, expression: object, values: Sequence[int]) -> str:
    if isinstance(expression, int):
        return ""
    moved = [s.name for i, s in enumerate(prepared.symbols) if _depends(expression, values, i)]
    return f" ({', '.join(f'{n} = {values[prepared.places[n]]}' for n in moved)})" if moved else ""


def _depends(expression: Any, values: Sequence[int], i: int) -> bool:
    other = list(values)
    other[i] += 1
    try:
        return evaluate(expression, other) != evaluate(expression, values)
    except ZeroDivisionError:
        return True


def _spans(tensors: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """First byte, last byte + 1 and name of the tensors without gaps; those with gaps may interleave and are left out."""
    out = []
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and (count := tensor.numel()):
            reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
            if reach == count:
                start = tensor.data_ptr()
                out.append((start, start + count * tensor.itemsize, name))
    return out


def describe(buffer: Declared) -> str:
    """`bf16[s0, s1, 4096]`: a declaration for people."""
    return f"{buffer.dtype}[{', '.join(_text(e) for e in buffer.shape)}]"


def _text(expression: object) -> str:
    if isinstance(expression, list):
        return f" {expression[0]} ".join(_text(e) if not isinstance(e, list) else f"({_text(e)})" for e in expression[1:])
    return str(expression)
