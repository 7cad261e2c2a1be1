"""The statements of a Triton kernel: loads, stores, reductions, scans and loops over tiles, with their masks.

Invariant: no statement touches memory outside the domain, and lanes outside it hold the identity when a reduction reads them.
Place in the flow: codegen/triton.py drives it over the phases of a body.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from flagtree.codegen.triton_index import IndexText, fits32
from flagtree.codegen.triton_ops import TYPES, Combination, Speller, bare, cast, combination, literal, working_type
from flagtree.codegen.triton_phases import Phase
from flagtree.codegen.triton_tile import Shape, Tile, TiledAxis
from flagtree.errors import CodegenError
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.flat import operands
from flagtree.ir.index import Index
from flagtree.ir.program import Access, BodyOp, IndexValue, Load, Reduce, Scan, Store

_ATOMIC_ADD = {"f16", "f32", "f64", "i32", "i64"}  # what tl.atomic_add takes from 3.1 on
_ATOMIC_MAX = {"i32", "i64"}
_NATIVE_SUM = {"f32", "f64", "i32", "i64"}  # tl.sum leaves these types as they are in every release


class BodyWriter:
    """Appends lines to `lines`.  `dtypes`: of SSA values; `memory`: of buffers; `need`: told each helper function
    called.  `threads`: of a program instance."""

    def __init__(
        self,
        tile: Tile,
        index: IndexText,
        speller: Speller,
        memory: dict[str, str],
        need: Callable[[str], None],
        accumulator: str,
        threads: int,
    ) -> None:
        self.tile, self.index, self.speller, self.memory, self.need, self.accumulator = tile, index, speller, memory, need, accumulator
        self.lines: list[str] = []
        self.indent = ""
        self.shapes: dict[str, Shape] = {n: tile.shape((n,)) for n in tile.axes}
        self.open: tuple[str, ...] = ()  # the axes of the loops around the next statement
        self.atomic = False
        loaded = {op.access.buffer for op in tile.body if isinstance(op, Load)}
        self.in_place = loaded & {op.access.buffer for op in tile.body if isinstance(op, Store)}
        self.unsafe: set[str] = set()  # in-place buffers that another thread may still be reading
        self.crosses_threads = any(isinstance(op, (Reduce, Scan)) for op in tile.body)
        self.alone = max(tile.elements, threads)  # a tensor of so many elements has each of them in one thread only

    def emit(self, line: str) -> None:
        self.lines.append(self.indent + line)

    # -- shapes and masks --------------------------------------------------------------------------------------------
    def shape_of(self, names: Iterable[str]) -> Shape:
        out: Shape = ()
        for name in names:
            shape = self.shapes.get(name, ())
            out = tuple(map(max, out, shape)) if out and shape else out or shape
        return out

    def axis_masks(self, deps: Iterable[str]) -> list[str]:
        return [f"m_{a.name}" for a in self.tile.tiled(deps) if not a.full]

    def axis_lines(self, axis: TiledAxis, start: str) -> None:
        """Define the positions of an axis that a tile covers, and their mask."""
        if axis.dim is None:
            if start != axis.name:
                self.emit(f"{axis.name} = {start}")
            return
        where = "" if self.tile.rank == 1 else "[" + ", ".join(":" if d == axis.dim else "None" for d in range(self.tile.rank)) + "]"
        lanes = f"tl.arange(0, {axis.tile}){where}"
        self.emit(f"{axis.name} = {lanes}" if start == "0" else f"{axis.name} = {start} + {lanes}")
        if not axis.full:
            wide = self.index.widths[axis.name] == 64
            self.emit(f"m_{axis.name} = {axis.name} < {self.index.operand(axis.extent, wide)}")

    # -- memory ------------------------------------------------------------------------------------------------------
    def pointer(self, access: Access, shape: Shape) -> str:
        """The address of each element: narrow offsets in one sum, else one sum for each set of axes, 64 bits where it needs them."""
        offset, flat = access.index[0], self.tile.flat
        if flat.access_fits_int32(access):
            parts = [self.index.operand(offset)] if offset.terms else []
        else:
            groups: dict[frozenset[str], Index] = {}
            for monomial, coefficient in offset.terms:
                term = Index(((monomial, coefficient),))
                key = frozenset(a.name for a in self.tile.tiled(self.tile.index_deps((term,))))
                groups[key] = groups.get(key, Index.of(0)) + term
            ordered = sorted(groups.items(), key=lambda g: (len(g[0]), sorted(g[0])))
            parts = [self.index.operand(term, not key or not fits32(term, self.index.bounds)) for key, term in ordered]
        text = " + ".join([access.buffer, *parts])
        own = self.shape_of(n for n in offset.names())
        return text if own == shape else f"tl.broadcast_to({text}, {list(shape)})"

    def load(self, op: Load) -> None:
        deps = self.tile.op_deps(op)
        shape = self.shape_of(operands(op))
        masks = self.axis_masks(deps) + ([op.access.mask] if op.access.mask else [])
        arguments = [self.pointer(op.access, shape)]
        stored = self.memory[op.access.buffer]
        if masks:
            floats = DTYPES[stored].is_float and DTYPES[stored].bits < 64 and stored != "f8e4m3fn"
            filled = "f32" if floats else stored
            other = literal(0 if op.other is None else op.other, filled)
            arguments += [f"mask={' & '.join(masks)}", f"other={other if stored != 'b1' else int(bool(op.other))}"]
        text = f"tl.load({', '.join(arguments)})"
        self.emit(f"{op.name} = {text} != 0" if stored == "b1" else f"{op.name} = {text}")
        if stored != op.dtype:
            self.emit(f"{op.name} = {cast(op.name, stored, op.dtype)}")
        self.shapes[op.name] = shape
        if op.access.buffer in self.in_place and (self.crosses_threads or math.prod(shape) < self.alone):
            self.unsafe.add(op.access.buffer)

    def store(self, op: Store) -> None:
        stored = self.memory[op.access.buffer]
        missing = [a for a in self.tile.missing_from(op) if a.in_grid or a.name in self.open]
        if op.access.buffer in self.in_place and any(a.in_grid for a in missing):
            raise CodegenError(
                f"{op.access.buffer} is updated in place by program instances that share its elements",
                why=f"the store does not vary over {', '.join(a.name for a in missing)}",
            )
        if op.access.buffer in self.unsafe:
            self.emit("tl.debug_barrier()  # every thread has read what is overwritten")
            self.unsafe.clear()
        shape = self.shape_of(operands(op))
        masks = [f"({a.name}_start == 0)" if a.dim is not None else f"({a.name} == 0)" for a in missing]
        masks += self.axis_masks(self.tile.op_deps(op)) + ([op.access.mask] if op.access.mask else [])
        mask = f", mask={' & '.join(masks)}" if masks else ""
        dtype = self.speller.dtypes[op.value]
        pointer = self.pointer(op.access, shape)
        if op.mode == "set":
            covered = self.tile.index_deps(op.access.index)
            if not self.tile.of((op.value,)) <= covered:
                raise CodegenError(
                    f"the store to {op.access.buffer} writes several values to one element", why="its value varies where its index does not"
                )
            value = cast(op.value, dtype, stored) if stored != "b1" else f"{cast(op.value, dtype, 'b1')}.to(tl.int8)"
            self.emit(f"tl.store({pointer}, {value}{mask})")
        else:
            self._update(op, pointer, mask, dtype, stored)

    def _update(self, op: Store, pointer: str, mask: str, dtype: str, stored: str) -> None:
        """Add or max into memory: plain load and store when each element has one writer, else an atomic."""
        work = working_type(stored)
        if self._one_writer(op):
            self.emit(f"{op.access.buffer}_at = {pointer}")
            old = cast(f"tl.load({op.access.buffer}_at{mask})", stored, work)
            value = cast(op.value, dtype, work)
            if op.mode == "max":
                function = "nan_max" if DTYPES[work].is_float else "int_max"
                self.need(function)
            new = f"({old} + {value})" if op.mode == "add" else f"{function}({old}, {value})"
            self.emit(f"tl.store({op.access.buffer}_at, {cast(new, work, stored)}{mask})")
            return
        if stored not in (_ATOMIC_ADD if op.mode == "add" else _ATOMIC_MAX):
            raise CodegenError(
                f"several elements are {op.mode}ed into one of {op.access.buffer}", why=f"there is no portable atomic {op.mode} on {stored}"
            )
        self.atomic = True
        value = cast(op.value, dtype, stored)
        self.emit(f'tl.atomic_{op.mode}({pointer}, {value}{mask}, sem="relaxed")')

    def _one_writer(self, op: Store) -> bool:
        """Proved: different points of the store's domain have different offsets (a mixed-radix number of the axes)."""
        offset = op.access.index[0]
        deps = self.tile.op_deps(op)
        factors: list[tuple[Index, str]] = []
        for axis in sorted(deps):
            factor = offset.coefficient(axis)
            if factor is None or not self.tile.bounds.nonnegative(factor - 1):
                return False
            factors.append((factor, axis))
        if self.tile.index_deps((offset,)) != deps or any(n in self.speller.dtypes for n in offset.names()):
            return False
        reach = Index.of(0)
        for factor, axis in sorted(factors, key=lambda f: (self.tile.bounds.minimum(f[0]) or 0, f[1])):
            if not self.tile.bounds.nonnegative(factor - reach - 1):
                return False
            reach = reach + factor * (self.tile.axes[axis].extent - 1)
        return True

    # -- values ------------------------------------------------------------------------------------------------------
    def op(self, op: BodyOp) -> None:
        """One op that does not accumulate over a loop."""
        if isinstance(op, Load):
            self.load(op)
        elif isinstance(op, Store):
            self.store(op)
        elif isinstance(op, Reduce):
            self.reduce(op)
        elif isinstance(op, Scan):
            self.scan(op)
        elif isinstance(op, IndexValue):
            self.position(op)
        else:
            self.emit(f"{op.name} = {bare(self.speller.compute(op))}")
            self.shapes[op.name] = self.shape_of(operands(op))

    def position(self, op: IndexValue) -> None:
        wide = self.index.is_wide(op.expr)
        if op.expr.constant is not None:
            text = f"tl.full((), {op.expr.constant}, {TYPES[op.dtype]})"
        else:
            computed = self.index.operand(op.expr, wide)
            text = f"{computed}.to({TYPES[op.dtype]})"
        self.emit(f"{op.name} = {text}")
        self.shapes[op.name] = self.shape_of(operands(op))

    # -- reductions --------------------------------------------------------------------------------------------------
    def operands_of(self, op: Reduce, rule: Combination) -> list[str]:
        """What enters a reduction: working types, the tile's whole shape, the identity outside the domain."""
        shape = self.tile.shape(self.tile.op_deps(op))
        masks = self.axis_masks(op.axes)
        out = []
        for arg, work, identity in zip(op.args, rule.types, rule.identity, strict=True):
            text = cast(arg, self.speller.dtypes[arg], work)
            if masks:
                text = f"tl.where({' & '.join(masks)}, {text}, {identity})"
            if self.shape_of((arg, *(op.axes if masks else ()))) != shape:
                text = f"tl.broadcast_to({text}, {list(shape)})"
            out.append(text)
        return out

    def reduce(self, op: Reduce) -> None:
        rule = combination(op.combiner, op.dtypes, self.accumulator)
        self.finish(op, rule, self.operands_of(op, rule))

    def finish(self, op: Reduce, rule: Combination, values: list[str]) -> None:
        """Reduce along the tile's dimensions and give each result its dtype."""
        keep = ", keep_dims=True" if self.tile.rank > 1 else ""
        names = ", ".join(op.names)
        shape = list(self.tile.shape(self.tile.op_deps(op)))
        for axis in reversed(self.tile.tiled(op.axes)):
            if rule.function == "add" and rule.types[0] in _NATIVE_SUM:
                self.emit(f"{names} = tl.sum({values[0]}, axis={axis.dim}{keep})")
            else:
                self.need(rule.function)
                arguments = values[0] if len(values) == 1 else f"({', '.join(values)})"
                self.emit(f"{names} = tl.reduce({arguments}, {axis.dim}, {rule.function}{keep})")
            values = list(op.names)
            assert axis.dim is not None
            shape[axis.dim] = 1
        if values != list(op.names):
            self.emit(f"{names} = {', '.join(values)}")
        for name, work, dtype in zip(op.names, rule.types, op.dtypes, strict=True):
            if work != dtype:
                self.emit(f"{name} = {cast(name, work, dtype)}")
            self.shapes[name] = () if self.tile.rank == 1 else tuple(shape)

    def scan(self, op: Scan, carry: str | None = None) -> None:
        """A running combination along a tile; `carry` names the combination of all earlier tiles."""
        rule = combination(op.combiner, (op.dtype,), self.accumulator)
        axis = self.tile.axes.get(op.axis)
        shape = self.tile.shape(self.tile.op_deps(op))
        value = cast(op.arg, self.speller.dtypes[op.arg], rule.types[0])
        if axis is None or axis.dim is None:
            running = value
        else:
            if self.shapes[op.arg] != shape:
                value = f"tl.broadcast_to({value}, {list(shape)})"
            self.need(rule.function)
            running = f"tl.associative_scan({value}, {axis.dim}, {rule.function})"
        if carry is None:
            self.emit(f"{op.name} = {cast(running, rule.types[0], op.dtype)}")
        else:
            self._carried(op, rule, axis, value, running, carry)
        self.shapes[op.name] = shape

    def _carried(self, op: Scan, rule: Combination, axis: TiledAxis | None, value: str, running: str, carry: str) -> None:
        self.need(rule.function)
        self.emit(f"{op.name} = {cast(f'{rule.function}({carry}, {running})', rule.types[0], op.dtype)}")
        if axis is not None and axis.dim is not None:
            masks = self.axis_masks((op.axis,))
            value = f"tl.where({masks[0]}, {value}, {rule.identity[0]})" if masks else value
            value = f"tl.reduce({value}, {axis.dim}, {rule.function}{', keep_dims=True' if self.tile.rank > 1 else ''})"
        self.emit(f"{carry} = {rule.function}({carry}, {value})")

    # -- loops -------------------------------------------------------------------------------------------------------
    def phase(self, phase: Phase) -> None:
        """What comes before a loop, the accumulators, the loop, and the ends of its reductions."""
        for op in phase.before:
            self.op(op)
        if not phase.loops:
            return
        rules = {op: combination(op.combiner, op.dtypes, self.accumulator) for op in phase.reduces}
        for op, rule in rules.items():
            shape = self.tile.shape(self.tile.op_deps(op))
            for name, work, identity in zip(op.names, rule.types, rule.identity, strict=True):
                self.emit(f"{name}_acc = {self._filled(shape, identity, work)}")
        carries = self._start_scans(phase)
        outer = self.indent
        self.open = phase.loops
        for name in phase.loops:
            self._open_loop(self.tile.axes[name])
        for op in phase.inside:
            if op in rules:
                self._accumulate(op, rules[op])
            elif isinstance(op, Scan) and op.name in carries:
                self.scan(op, carries[op.name])
            else:
                self.op(op)
        self.indent, self.open = outer, ()
        for op, rule in rules.items():
            self.finish(op, rule, [f"{n}_acc" for n in op.names])

    def _filled(self, shape: Shape, identity: str, work: str) -> str:
        return f"tl.full({list(shape)}, {identity}, {TYPES[work]})" if shape else f"tl.full((), {identity}, {TYPES[work]})"

    def _start_scans(self, phase: Phase) -> dict[str, str]:
        carries: dict[str, str] = {}
        for op in phase.inside:
            if isinstance(op, Scan) and op.axis in phase.loops:
                rule = combination(op.combiner, (op.dtype,), self.accumulator)
                shape = self.tile.shape(self.tile.op_deps(op))
                dim = self.tile.axes[op.axis].dim
                if dim is not None:  # the carry has no lanes along the scan
                    shape = () if self.tile.rank == 1 else (*shape[:dim], 1, *shape[dim + 1 :])
                carries[op.name] = f"{op.name}_carry"
                self.emit(f"{op.name}_carry = {self._filled(shape, rule.identity[0], rule.types[0])}")
        return carries

    def _open_loop(self, axis: TiledAxis) -> None:
        end = self.index.text(axis.extent, self.index.widths[axis.name] == 64)
        if axis.dim is None:
            self.emit(f"for {axis.name} in range(0, {end}):")
            self.indent += "    "
            return
        self.emit(f"for {axis.name}_start in range(0, {end}, {axis.tile}):")
        self.indent += "    "
        self.axis_lines(axis, f"{axis.name}_start")

    def _accumulate(self, op: Reduce, rule: Combination) -> None:
        values = self.operands_of(op, rule)
        held = [f"{n}_acc" for n in op.names]
        if rule.function == "add":
            self.emit(f"{held[0]} += {values[0]}")
            return
        self.need(rule.function)
        self.emit(f"{', '.join(held)} = {rule.function}({', '.join(held + values)})")
