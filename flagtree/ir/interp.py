"""The interpreter: a whole program executed with torch on the CPU.  Ground truth for passes and code generators.

A temp exists from its first write; an alias is a view of its base's storage; a caller's buffer is written in place.
Fresh temps hold NaN (floats) or the smallest integer, so that reading what nobody wrote shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flagtree.errors import IRError
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.evaluate import Tensor, torch_dtype
from flagtree.ir.index import Index
from flagtree.ir.program import Axis, Buffer, Extern, Kernel, Operand, Program, Ref, Repeat, Step, Symbol, Template, TypeArg
from flagtree.ir.walk import run_kernel

__all__ = ["run", "run_kernel"]

Scope = Mapping[str, str]  # formal buffer of a repeat to the buffer bound in this iteration


def run(
    program: Program,
    inputs: Mapping[str, Tensor | int | float | bool],
    *,
    symbols: Mapping[str, int] | None = None,
    dtype_override: str | None = None,
) -> dict[str, Tensor]:
    """Execute every step.  `inputs` holds what the caller passes (inputs, weights, states, constants, scalars), written in
    place where the program says so.  Symbols come from the inputs and `symbols`; they are checked against their ranges.
    With `dtype_override="f64"` every float is an f64 and no cast rounds (inputs are copied first): the float64 truth.
    Returns the outputs, then every caller's buffer that was written, by name.  Raises IRError for an input that does not fit, an access
    out of range, a buffer read before it is written, an extern whose result is not what was declared."""
    return _Execution(program, inputs, dict(symbols or {}), dtype_override).run()


class _Execution:
    """One run of one program; `tensors` by buffer name, aliases made on demand."""

    def __init__(self, program: Program, inputs: Mapping[str, Any], symbols: dict[str, int], override: str | None) -> None:
        self.program, self.symbols = program, symbols
        self.override = None if override is None else torch_dtype(override)
        if override not in (None, "f64"):
            raise IRError(f"cannot run in '{override}'", hint="dtype_override is None or 'f64'")
        self.tensors: dict[str, Any] = {}
        self.given: list[str] = []
        declared = {b.name: b for b in program.buffers}
        for name, value in inputs.items():
            if name not in declared or declared[name].alias_of is not None or declared[name].role == "temp":
                raise IRError(f"program '{program.name}' takes no input '{name}'", why=f"it takes {[b.name for b in program.inputs]}")
            self.given.append(name)
            self.tensors[name] = self.adopt(declared[name], value)
        self.resolve_symbols()
        for name in self.given:
            self.check(declared[name], self.tensors[name])

    def run(self) -> dict[str, Tensor]:
        self.steps(self.program.steps, {})
        written = {self.program.root(b) for s in self.program.steps for b in s.writes}
        names = (*self.program.outputs, *(n for n in self.given if n in written))
        return {name: self.tensor(name, {}) for name in dict.fromkeys(names)}

    # -- memory ------------------------------------------------------------------------------------------------------
    def dtype(self, buffer: Buffer) -> torch.dtype:
        return self.override if self.override is not None and DTYPES[buffer.dtype].is_float else torch_dtype(buffer.dtype)

    def adopt(self, buffer: Buffer, value: Any) -> Any:
        if buffer.role == "opaque":
            return value
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=self.dtype(buffer))
        if value.dtype != torch_dtype(buffer.dtype):
            raise IRError(f"input '{buffer.name}' has dtype {value.dtype}", why=f"the program declares {buffer.dtype}")
        if len(value.shape) != len(buffer.shape):
            raise IRError(f"input '{buffer.name}' has {value.dim()} dimensions", why=f"the program declares {len(buffer.shape)}")
        return value if value.dtype == self.dtype(buffer) else value.to(self.dtype(buffer))

    def evaluate(self, index: Index) -> int:
        try:
            return index.evaluate(self.symbols)
        except KeyError as missing:
            raise IRError(f"symbol {missing} has no value", why=f"'{index}' needs it", hint="pass it in `symbols`") from missing

    def shape(self, buffer: Buffer) -> tuple[list[int], list[int]]:
        return [self.evaluate(e) for e in buffer.shape], [self.evaluate(e) for e in buffer.layout]

    def check(self, buffer: Buffer, value: Any) -> None:
        """A caller's tensor, or an extern's result, is what the program declares."""
        if buffer.role == "opaque":
            return
        shape, strides = self.shape(buffer)
        if list(value.shape) != shape:
            raise IRError(f"buffer '{buffer.name}' has shape {list(value.shape)}", why=f"the program declares {shape}")
        if value.dtype != self.dtype(buffer):
            raise IRError(f"buffer '{buffer.name}' has dtype {value.dtype}", why=f"the program declares {buffer.dtype}")
        if value.numel() and any(n > 1 and a != b for n, a, b in zip(shape, value.stride(), strides, strict=True)):
            raise IRError(f"buffer '{buffer.name}' has strides {list(value.stride())}", why=f"the program declares {strides}")

    def tensor(self, name: str, scope: Scope, write: bool = False) -> Any:
        """The tensor of a buffer; with `write`, a temp that does not exist yet is allocated."""
        name = scope.get(name, name)
        buffer = self.program.buffer(name)
        if buffer.alias_of is not None:
            base = self.tensor(buffer.alias_of.base, scope, write)
            shape, strides = self.shape(buffer)
            return torch.as_strided(base, shape, strides, base.storage_offset() + self.evaluate(buffer.alias_of.offset))
        if name not in self.tensors:
            if buffer.role != "temp":
                raise IRError(f"input '{name}' is not given", where=f"program {self.program.name}")
            if not write:
                raise IRError(f"buffer '{name}' is read before it is written", where=f"program {self.program.name}")
            shape, strides = self.shape(buffer)
            dtype = self.dtype(buffer)
            fill = float("nan") if dtype.is_floating_point else False if dtype == torch.bool else torch.iinfo(dtype).min
            fresh = torch.empty_strided(shape, strides, dtype=dtype)
            self.tensors[name] = fresh.fill_(fill) if fresh.numel() else fresh
        return self.tensors[name]

    def resolve_symbols(self) -> None:
        """Give every symbol whose source is there its value, and check it."""
        for symbol in self.program.symbols:
            if symbol.name not in self.symbols and symbol.source[0] != "argument" and symbol.source[1] in self.tensors:
                self.symbols[symbol.name] = self.source_value(symbol, self.tensors[symbol.source[1]])
            value = self.symbols.get(symbol.name)
            if value is not None and not (symbol.lo <= value <= symbol.hi and value % symbol.multiple == 0):
                multiple = f" and a multiple of {symbol.multiple}" if symbol.multiple != 1 else ""
                raise IRError(f"symbol '{symbol.name}' is {value}", why=f"it must lie in {symbol.lo}..{symbol.hi}{multiple}")

    def source_value(self, symbol: Symbol, tensor: Tensor) -> int:
        kind = symbol.source[0]
        if kind == "scalar":
            return int(tensor)
        return tensor.shape[symbol.source[2]] if kind == "dim" else tensor.stride(symbol.source[2])

    # -- steps -------------------------------------------------------------------------------------------------------
    def steps(self, steps: Sequence[Step], scope: Scope) -> None:
        for step in steps:
            if isinstance(step, Kernel):
                self.kernel(step, scope)
            elif isinstance(step, Extern):
                self.extern(step, scope)
            elif isinstance(step, Template):
                self.template(step, scope)
            else:
                self.repeat(step, scope)

    def repeat(self, step: Repeat, scope: Scope) -> None:
        for i in range(step.count):
            self.steps(step.body, {**scope, **{formal: scope.get(a[i], a[i]) for formal, a in step.bindings}})

    def kernel(self, step: Kernel, scope: Scope, values: dict[str, tuple[str, Tensor]] | None = None) -> None:
        tensors = {b: self.tensor(b, scope) for b in step.reads}
        tensors.update((b, self.tensor(b, scope, write=True)) for b in step.writes)
        run_kernel(self.program, step, tensors, self.symbols, self.override is not None, values)

    def template(self, step: Template, scope: Scope) -> None:
        """gemm(a, b): a[..., K] and b[N, K] give acc[..., N] = a @ b^T, summed in the accumulator's type and rounded to a's dtype;
        gemm(a, b, c) adds c[N] before the rounding.  The epilogue's axes are i0, i1, … over acc's dimensions; without one acc is the
        output."""
        if step.kind != "gemm" or step.prologue or len(step.operands) not in (2, 3):
            raise IRError(f"the interpreter has no template '{step.kind}' of this form", where=f"step {step.name}")
        a, b, *bias = (self.tensor(o, scope) for o in step.operands)
        dtype = self.program.buffer(step.operands[0]).dtype
        wide = self.override or torch_dtype(step.numerics.accumulator)
        summed = a.to(wide) @ b.to(wide).T
        acc = (summed + bias[0].to(wide) if bias else summed).to(a.dtype)
        if not step.epilogue:
            self.tensor(step.outputs[0], scope, write=True).copy_(acc)
            return
        axes = tuple(Axis(f"i{k}", Index.of(n)) for k, n in enumerate(acc.shape))
        self.kernel(Kernel(step.name, axes, step.epilogue, step.numerics), scope, {"acc": (dtype, acc)})

    def extern(self, step: Extern, scope: Scope) -> None:
        function = _operator(step)
        args = [self.operand(a, scope) for a in step.args]
        result = function(*args, **{k: self.operand(v, scope) for k, v in step.kwargs})
        results = () if result is None else tuple(result) if isinstance(result, tuple | list) else (result,)
        if step.outputs and len(results) != len(step.outputs):
            why = f"{len(step.outputs)} are declared"
            raise IRError(f"'{step.callee}' returned {len(results)} results", where=f"step {step.name}", why=why)
        for name, value in zip(step.outputs, results, strict=False):
            if name is not None:
                self.bind(scope.get(name, name), value, scope)
        self.resolve_symbols()

    def bind(self, name: str, value: Any, scope: Scope) -> None:
        """Make an extern's result the content of a buffer."""
        buffer = self.program.buffer(name)
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=self.dtype(buffer))
        if buffer.role == "temp" and buffer.alias_of is None:
            self.tensors[name] = value
            self.resolve_symbols()
            self.check(buffer, value)
            return
        place = self.tensor(name, scope, write=True)
        if place.data_ptr() != value.data_ptr():
            place.copy_(value)

    def operand(self, x: Operand, scope: Scope) -> Any:
        if isinstance(x, Ref):
            return self.tensor(x.buffer, scope)
        if isinstance(x, Index):
            return self.evaluate(x)
        if isinstance(x, TypeArg):
            return self.type_argument(x)
        return [self.operand(i, scope) for i in x] if isinstance(x, tuple) else x

    def type_argument(self, x: TypeArg) -> Any:
        if x.kind == "device":
            return torch.device("cpu")  # the interpreter runs here, whatever chip the program is for
        value = torch_dtype(x.value) if x.value in DTYPES else getattr(torch, x.value.removeprefix("torch."), None)
        if value is None:
            raise IRError(f"unknown {x.kind} '{x.value}'")
        floating = isinstance(value, torch.dtype) and value.is_floating_point
        return self.override if self.override is not None and floating else value


def _operator(step: Extern) -> Any:
    function: Any = torch.ops
    for part in step.callee.split("."):
        try:
            function = getattr(function, part)
        except (AttributeError, RuntimeError) as error:
            raise IRError(f"there is no operator '{step.callee}'", where=f"step {step.name}", why=step.reason) from error
    return function
