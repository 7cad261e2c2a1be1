"""The meaning of one kernel: its body executed with torch on the CPU, vectorised over the domain.

A value is a tensor with one dimension for each axis of the kernel, of size 1 where it does not depend on the axis.
Accesses out of range raise.  `ir/interp.py` runs whole programs with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from flagtree.errors import IRError
from flagtree.ir.dtypes import DTYPES, opmath
from flagtree.ir.evaluate import Tensor, accumulator_dtype, compute, reduce, scan, torch_dtype
from flagtree.ir.index import Index, Quotient
from flagtree.ir.ops import OPS
from flagtree.ir.program import Access, Arg, BodyOp, Compute, IndexValue, Kernel, Load, Program, Reduce, Scan, Store
from flagtree.ir.text import print_op


def run_kernel(
    program: Program,
    kernel: Kernel,
    tensors: Mapping[str, Tensor],
    symbols: Mapping[str, int],
    precise: bool = False,
    values: Mapping[str, tuple[str, Tensor]] | None = None,
) -> None:
    """Execute one kernel on `tensors` (buffer name to tensor of the declared shape and strides; stores write in place).
    `precise` computes every float in float64 and rounds nowhere; integers are untouched.  `values` (name to dtype and tensor
    over the kernel's axes) are defined before the body, as a template's accumulator is."""
    walk = Walk(kernel, tensors, symbols, precise)
    for name, (dtype, value) in (values or {}).items():
        walk.define(name, dtype, value)
    walk.run(program.name)


class Walk:
    """The values of one kernel while its body runs."""

    def __init__(self, kernel: Kernel, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], precise: bool) -> None:
        self.kernel, self.tensors, self.symbols, self.precise = kernel, tensors, symbols, precise
        self.place = {a.name: k for k, a in enumerate(kernel.axes)}
        self.extents = [a.extent.evaluate(symbols) for a in kernel.axes]
        self.values: dict[str, Tensor] = {}
        self.dtypes: dict[str, str] = {}
        self.constants = {n: Index.of(v) for n, v in symbols.items()}
        self.written = {tensors[b].untyped_storage().data_ptr() for b in kernel.writes}

    def run(self, program: str) -> None:
        """Execute the body; an IRError gets the place in `program`."""
        for op in self.kernel.body:
            try:
                self.execute(op)
            except IRError as error:
                raise IRError(error.what, where=f"program {program}, kernel {self.kernel.name}: {print_op(op)}", why=error.why) from error

    def define(self, name: str, dtype: str, value: Tensor) -> None:
        self.dtypes[name], self.values[name] = dtype, value.to(self.held(dtype))

    def held(self, dtype: str) -> torch.dtype:
        """The torch type that holds a value of this dtype."""
        return torch.float64 if self.precise and DTYPES[dtype].is_float else torch_dtype(dtype)

    def execute(self, op: BodyOp) -> None:
        if isinstance(op, Load):
            self.define(op.name, op.dtype, self.load(op))
        elif isinstance(op, Compute):
            self.define(op.name, op.dtype, self.compute(op))
        elif isinstance(op, Reduce):
            self.reduce(op)
        elif isinstance(op, Scan):
            k = self.place[op.axis]
            value = self.spread(self.values[op.arg], (k,)).to(self.accumulator(op.dtype))
            self.define(op.name, op.dtype, scan(op.combiner, value, k))
        elif isinstance(op, IndexValue):
            self.define(op.name, op.dtype, self.point(op.expr))
        else:
            self.store(op)

    # -- values ------------------------------------------------------------------------------------------------------
    def operand(self, arg: Arg, dtype: str, work: torch.dtype, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """An operand in `work`: a literal of type `dtype`, or a value, from `values` if given."""
        if isinstance(arg, str):
            return (self.values if values is None else values)[arg].to(work)
        return torch.full([1] * len(self.extents), arg, dtype=self.held(dtype)).to(work)

    def compute(self, op: Compute, values: Mapping[str, Tensor] | None = None) -> Tensor:
        dtype, work = self.working(op)
        args = [self.operand(a, dtype, work, values) for a in (op.args[1:] if op.op == "where" else op.args)]
        if op.op == "where":
            args.insert(0, self.operand(op.args[0], "b1", torch.bool, values))
        return compute(op.op, args, torch_dtype(op.dtype) if op.op == "bitcast" else self.held(op.dtype))

    def working(self, op: Compute) -> tuple[str, torch.dtype]:
        """(dtype of the operands, torch type in which the operation is done)."""
        typed = op.args[1:] if op.op == "where" else op.args
        named = [self.dtypes[a] for a in typed if isinstance(a, str)]
        dtype = named[0] if named else op.dtype if OPS[op.op].result == "same" else _natural(typed[0])
        if op.op == "bitcast":
            return dtype, torch_dtype(dtype)
        if op.op == "cast":
            return dtype, self.held(dtype)
        return dtype, self.held(opmath(dtype)) if DTYPES[dtype].is_float else torch_dtype(dtype)

    def accumulator(self, dtype: str) -> torch.dtype:
        if self.precise and DTYPES[dtype].is_float:
            return torch.float64
        return accumulator_dtype(dtype, self.kernel.numerics.accumulator)

    def reduce(self, op: Reduce) -> None:
        dims = tuple(self.place[a] for a in op.axes)
        shapes = torch.broadcast_shapes(*(self.values[a].shape for a in op.args))
        args = [
            self.spread(self.values[a].expand(shapes), dims).to(self.accumulator(d)) for a, d in zip(op.args, op.dtypes, strict=True)
        ]
        for name, dtype, value in zip(op.names, op.dtypes, reduce(op.combiner, args, dims), strict=True):
            self.define(name, dtype, value)

    def spread(self, value: Tensor, dims: Sequence[int]) -> Tensor:
        """A value repeated along axes it may not depend on: a constant summed over n points is n constants."""
        return value.expand([self.extents[k] if k in dims else n for k, n in enumerate(value.shape)])

    # -- indices -----------------------------------------------------------------------------------------------------
    def point(self, expr: Index) -> Tensor:
        """An index expression at every point of the axes it depends on, int64."""
        total = torch.zeros([1] * len(self.extents), dtype=torch.int64)
        for monomial, coefficient in expr.terms:
            product = torch.full([1] * len(self.extents), coefficient, dtype=torch.int64)
            for atom in monomial:
                if isinstance(atom, str):
                    product = product * self.integer(atom)
                else:
                    numerator, divisor = self.point(atom.num), self.point(atom.den)
                    if bool((divisor <= 0).any()):
                        raise IRError(f"a divisor of '{expr}' is not positive")
                    quotient = torch.div(numerator, divisor, rounding_mode="floor")
                    product = product * (quotient if isinstance(atom, Quotient) else numerator - divisor * quotient)
            total = total + product
        return total

    def integer(self, name: str) -> Tensor | int:
        if name in self.place:
            k = self.place[name]
            return torch.arange(self.extents[k]).view([-1 if d == k else 1 for d in range(len(self.extents))])
        return self.values[name].to(torch.int64) if name in self.values else self.symbols[name]

    def affine(self, index: Sequence[Index], tensor: Tensor) -> Tensor | None:
        """The view of `tensor` over the axes that an index names, where every dimension is constant plus non-negative
        multiples of axes; None otherwise.  Raises IRError out of range."""
        strides, offset, used = [0] * len(self.extents), 0, [False] * len(self.extents)
        dimensions = []
        for expr in index:
            linear = _linear(expr.substitute(self.constants), self.place)
            if linear is None:
                return None
            dimensions.append(linear)
        empty = any(not self.extents[k] for _, factors in dimensions for k in factors)
        for d, (constant, factors) in enumerate(dimensions):
            last = constant
            for k, factor in factors.items():
                strides[k] += factor * tensor.stride(d)
                used[k] = True
                last += factor * (self.extents[k] - 1)
            if not empty and not 0 <= constant <= last < tensor.shape[d]:
                raise IRError(f"index {d} runs over {constant}..{last}, the dimension has {tensor.shape[d]}")
            offset += constant * tensor.stride(d)
        shape = [n if used[k] else 1 for k, n in enumerate(self.extents)]
        if math.prod(shape) == 0:
            return tensor.new_empty(shape)
        return torch.as_strided(tensor, shape, strides, tensor.storage_offset() + offset)

    def offsets(self, access: Access, tensor: Tensor, mask: Tensor | None) -> Tensor:
        """Element offsets from `tensor`'s first element, checked where the mask holds, 0 where it does not."""
        total = torch.zeros([1] * len(self.extents), dtype=torch.int64)
        inside = torch.ones_like(total, dtype=torch.bool)
        for d, expr in enumerate(access.index):
            position = self.point(expr)
            total = total + position * tensor.stride(d)
            inside = inside & (position >= 0) & (position < tensor.shape[d])
        touched = ~inside if mask is None else ~inside & mask
        if bool(touched.any()):
            raise IRError(f"an index is out of range of {list(tensor.shape)} at {int(touched.sum())} points")
        return total if mask is None else torch.where(mask, total, 0)

    def load(self, op: Load) -> Tensor:
        tensor = self.tensors[op.access.buffer]
        mask = None if op.access.mask is None else self.values[op.access.mask]
        if mask is None and (view := self.affine(op.access.index, tensor)) is not None:
            return view.clone() if tensor.untyped_storage().data_ptr() in self.written else view
        offsets = self.offsets(op.access, tensor, mask)
        other = torch.tensor(0 if op.other is None else op.other, dtype=tensor.dtype)
        if tensor.numel() == 0:
            return other.expand(offsets.shape)
        value = self.gather(op.access.buffer, offsets, mask)
        return value if mask is None else torch.where(mask, value, other)

    def gather(self, buffer: str, offsets: Tensor, mask: Tensor | None) -> Tensor:
        """The elements at `offsets` of a buffer; where the mask is false any element will do."""
        return flat(self.tensors[buffer])[offsets]

    def store(self, op: Store) -> None:
        tensor = self.tensors[op.access.buffer]
        value = self.values[op.value].to(tensor.dtype)
        mask = None if op.access.mask is None else self.values[op.access.mask]
        if mask is None and op.mode == "set":
            view = self.affine(op.access.index, tensor)
            if view is not None and torch.broadcast_shapes(view.shape, value.shape) == view.shape:
                view.copy_(value)
                return
        offsets, value = self.placed(op, mask, value)
        if not offsets.numel():
            return
        if op.mode == "max":
            flat(tensor).scatter_reduce_(0, offsets, value, "amax")
        else:
            flat(tensor).index_put_((offsets,), value, accumulate=op.mode == "add")

    def placed(self, op: Store, mask: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
        """(element offsets, values) of a store where its mask holds, one-dimensional."""
        offsets = self.offsets(op.access, self.tensors[op.access.buffer], mask)
        everywhere = torch.ones([1] * len(self.extents), dtype=torch.bool) if mask is None else mask
        offsets, value, everywhere = torch.broadcast_tensors(offsets, value, everywhere)
        return offsets[everywhere], value[everywhere]


def _natural(literal: Arg) -> str:
    return "b1" if isinstance(literal, bool) else "i64" if isinstance(literal, int) else "f64"


def flat(tensor: Tensor) -> Tensor:
    """The memory from a tensor's first to its last element as one dimension."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.as_strided(tensor, (span if tensor.numel() else 0,), (1,), tensor.storage_offset())


def _linear(index: Index, place: Mapping[str, int]) -> tuple[int, dict[int, int]] | None:
    """(constant, factor of each axis by its place) when the index is that, with no negative factor."""
    constant, factors = 0, {}
    for monomial, coefficient in index.terms:
        if not monomial:
            constant = coefficient
        elif len(monomial) == 1 and isinstance(monomial[0], str) and monomial[0] in place and coefficient > 0:
            factors[place[monomial[0]]] = coefficient
        else:
            return None
    return constant, factors
