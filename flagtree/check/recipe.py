"""What PyTorch itself computes for one fused kernel, as data: ATen calls over views of memory, run by the code that runs externs.

A recipe is JSON that travels in the bundle, so that a kernel can be compared with eager where no graph was captured.  `check/eager.py`
writes recipes from a captured graph; `check/certify.py` runs them.  Only operators that torch has registered are reached.

    {"format": 1,
     "views": {"v0": {"storage": "s0", "dtype": "bf16", "shape": [index, …], "strides": [index, …], "offset": index}, …},
     "given": [["b0", "v0"], …],                 contents before the kernel, in order
     "steps": [{"extern": "aten.mul.Tensor", "args": [{"buffer": "v0"}, …], "kwargs": {}, "outputs": ["v3", null]}, …],
     "results": {"b2": "v3"},
     "sizes": {"experts": index, …}}             optional: sizes by name, for index expressions beside the kernel's symbols

Whoever runs a recipe may give a size another value: a few experts and columns of a product are a product of the same text.
Operands and index expressions are those of a launch list; an output that is null changes memory in place or is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flagtree.errors import BundleError, FlagtreeError
from flagtree.runtime.dtypes import torch_dtype
from flagtree.runtime.index import compile_index, evaluate
from flagtree.runtime.operands import constant, resolve

Tensor = torch.Tensor
FORMAT = 1
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]


class NoEager(FlagtreeError):
    """A kernel that no part of the captured graph computes on the kernel's own inputs; `why` says what is missing."""


def no_eager(why: str, where: str = "") -> NoEager:
    return NoEager("the kernel has no eager counterpart", where=where, why=why)


def run_recipe(recipe: Mapping[str, Any], tensors: Mapping[str, Tensor], symbols: Mapping[str, int]) -> dict[str, Tensor]:
    """The contents after the kernel of each buffer that it stores, from their contents before (not written to) and the symbols' values.

    Raises NoEager where PyTorch refuses a call or gives another type or shape than the trace saw; BundleError for data that is no
    recipe, or that names an operator which does not exist here.
    """
    try:
        if recipe["format"] != FORMAT:
            raise BundleError("an eager computation has another format", why=f"format {recipe['format']!r}, this flagtree reads {FORMAT}")
        with torch.no_grad():
            return _Evaluation(recipe, tensors, symbols).run()
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise BundleError("an eager computation is not valid", why=f"{type(error).__name__}: {error}", hint="build it again") from None


class _Evaluation:
    """One run: memory is one flat tensor a storage, every operand a view of it."""

    def __init__(self, recipe: Mapping[str, Any], tensors: Mapping[str, Tensor], symbols: Mapping[str, int]) -> None:
        self.recipe, self.tensors = recipe, tensors
        sizes = {name: _index(n, symbols) for name, n in recipe.get("sizes", {}).items() if name not in symbols}
        symbols = {**symbols, **sizes}
        self.places, self.values = {name: i for i, name in enumerate(symbols)}, list(symbols.values())
        self.geometry: dict[str, Geometry] = {}
        spans: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, view in recipe["views"].items():
            shape, strides = (tuple(self._integer(e) for e in view[part]) for part in ("shape", "strides"))
            self.geometry[name] = geometry = shape, strides, self._integer(view["offset"])
            storage = view["storage"]
            spans[storage] = max(spans.get(storage, 0), _span(geometry))
            self.dtypes[storage] = torch_dtype(view["dtype"])
        self.memory = {storage: torch.empty(span, dtype=self.dtypes[storage]) for storage, span in spans.items()}

    def run(self) -> dict[str, Tensor]:
        for buffer, view in self.recipe["given"]:
            _fill(self._view(view), self.tensors[buffer])
        for buffer, view in self.recipe["given"]:
            if not _same(self._view(view), self.tensors[buffer]):
                raise no_eager(f"'{buffer}' is given through views that overlap")
        for step in self.recipe["steps"]:
            self._step(step)
        return {buffer: self._view(view).clone() for buffer, view in self.recipe["results"].items()}

    def _integer(self, json: object) -> int:
        return evaluate(compile_index(json, self.places), self.values)

    def _view(self, name: str) -> Tensor:
        return torch.as_strided(self.memory[self.recipe["views"][name]["storage"]], *self.geometry[name])

    def _operand(self, json: object) -> object:
        if isinstance(json, dict) and "buffer" in json:
            return self._view(json["buffer"])
        if isinstance(json, dict) and "index" in json:
            return self._integer(json["index"])
        if isinstance(json, dict) and "list" in json:
            return [self._operand(v) for v in json["list"]]
        return constant(json)

    def _step(self, step: Mapping[str, Any]) -> None:
        callee = resolve(step["extern"])
        args, kwargs = [self._operand(a) for a in step["args"]], {k: self._operand(v) for k, v in step["kwargs"].items()}
        try:
            result = callee(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError, NotImplementedError) as error:
            raise no_eager(f"eager refuses {step['extern']}: {str(error).splitlines()[0]}") from error
        results = result if isinstance(result, (list, tuple)) else [result]
        for name, value in zip(step["outputs"], results):
            if name is not None:
                self._adopt(step["extern"], name, value)

    def _adopt(self, callee: str, name: str, value: Tensor) -> None:
        """A fresh result becomes memory in the strides that the trace saw."""
        shape, dtype = self.geometry[name][0], self.dtypes[self.recipe["views"][name]["storage"]]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise no_eager(f"{callee} gives {value.dtype} {list(value.shape)} here, the trace saw {dtype} {list(shape)}")
        _fill(self._view(name), value)


def _index(json: object, symbols: Mapping[str, int]) -> int:
    return evaluate(compile_index(json, {name: i for i, name in enumerate(symbols)}), list(symbols.values()))


def _span(geometry: Geometry) -> int:
    shape, strides, offset = geometry
    return offset + (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal values, NaN with NaN; equal bytes where the type is one byte, for which torch compares little."""
    if a.dtype.itemsize == 1:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _fill(place: Tensor, value: Tensor) -> None:
    """Copy into a view; along a dimension of stride 0 all elements are one."""
    for d, (size, stride) in enumerate(zip(place.shape, place.stride(), strict=True)):
        if size > 1 and stride == 0:
            place, value = place.narrow(d, 0, 1), value.narrow(d, 0, 1)
    place.copy_(value)
