"""C++ source for the CPU from one isolated kernel: header-free C++17 with vector extensions, one function a kernel.

The ABI stands in docs/architecture.md, the way of walking in docs/cpu.md.  A row is one point of the outer parallel axes (or a
chunk of the lane axis); `rows` executes a range of rows, the entry splits the range over OpenMP threads when there is enough work.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2

from flagtree.codegen import cpp_attention, cpp_gemm
from flagtree.codegen import cpp_ops as ops
from flagtree.codegen.cpp_body import large_name
from flagtree.codegen.cpp_groups import row_statements
from flagtree.codegen.cpp_index import operand_text
from flagtree.codegen.cpp_layout import LARGE, MOVED, Layout, layout
from flagtree.codegen.cpp_prelude import prelude
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.flat import FlatKernel, flatten
from flagtree.ir.index import ONE, Index
from flagtree.ir.program import Compute, Kernel, Load, Program, Store
from flagtree.ir.text import print_program

THREAD_WORK = 32768  # points of the domain from which a second thread pays for being woken
CHUNK = 4096  # elements of a parallel lane axis that are one row
COLUMN_CHUNK = 512  # the same where its columns are reduced


def symbol_name(digest: str) -> str:
    """The function of a kernel in its object file."""
    return f"ft_{digest[:16]}"


def generate(program: Program, digest: str) -> str:
    """C++ source of an isolated kernel (`ir.canonical.isolate`); the same source for every level.

    Raises CodegenError for a kernel that this generator cannot express.
    """
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    template = cpp_attention if kernel.numerics.rounding == "fused" else cpp_gemm if kernel.numerics.fp_contract else None
    context = _walked(program) if template is None else template.context(program)
    text = print_program(program).rstrip("\n").split("\n")
    names = {"digest": digest, "symbol": symbol_name(digest), "text": text, "threshold": THREAD_WORK}
    lines = (*context["definitions"], *context["head"], *context["decode"], *context["body"], *context["after"])
    return _template().render(prelude=prelude("\n".join((*lines, context["count"]))), **names, **context)


def _walked(program: Program) -> dict[str, Any]:
    """A kernel in sweeps over its rows: what the source template needs, apart from names."""
    walk = layout(flatten(program))
    multiples = {s.name: s.multiple for s in program.symbols}
    chunk = _chunk(walk)
    row, partials = row_statements(walk, multiples, chunk)
    body = [*_chunk_bounds(walk, chunk), *row]
    outer = _outer(walk, chunk)
    large = " | ".join(_large_stores(walk))
    return {
        "widest": walk.widest, "partials": partials, "clean_nans": int(_clean_nans(walk.kernel)), "definitions": [],
        "head": _head(walk), "symbols": _symbols(walk), "decode": _decode(walk, outer), "advance": _advance(walk, outer), "body": body,
        "after": [f"settle_stores({large});"] if large else [], "count": " * ".join(_factor(walk, extent) for _, extent in outer) or "1",
        "work": " * ".join(_factor(walk, a.extent) for a in walk.kernel.axes) or "1",
        "threads": _may_use_threads(walk, outer),
    }  # fmt: skip


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
                                     keep_trailing_newline=True, autoescape=False)  # fmt: skip
    return environment.get_template("cpp_kernel.cpp.j2")


# -- rows ------------------------------------------------------------------------------------------------------------
def _chunk(walk: Layout) -> int:
    """Elements of the lane axis in one row: 0 (all of them) when it is reduced or short."""
    if walk.lane is None or walk.lane_reduced:
        return 0
    size = CHUNK if not walk.kernel.reduced else COLUMN_CHUNK
    highest = walk.kernel.bounds.maximum(walk.lane.extent)
    return 0 if highest is not None and highest <= size else size


def _outer(walk: Layout, chunk: int) -> list[tuple[str, Index]]:
    """(counter, number of values) of a row, outermost first."""
    out = [(a.name, a.extent) for a in walk.outer]
    if chunk and walk.lane is not None:
        out.append(("chunk", (walk.lane.extent + (chunk - 1)) // chunk))
    return out


def _chunk_bounds(walk: Layout, chunk: int) -> list[str]:
    if not chunk or walk.lane is None:
        return []
    return [f"const i64 chunk_begin = chunk * {chunk}, chunk_end = chunk_begin + {chunk};"]


def _decode(walk: Layout, outer: list[tuple[str, Index]]) -> list[str]:
    """Counters of row `begin`; later rows count on."""
    if not outer:
        return []
    lines = ["if (begin >= end) return;", "i64 rest = begin;"]
    for name, extent in reversed(outer[1:]):
        size = _factor(walk, extent)
        lines.append(f"i64 {name} = rest % {size}; rest /= {size};")
    return [*lines, f"i64 {outer[0][0]} = rest;"]


def _advance(walk: Layout, outer: list[tuple[str, Index]]) -> list[str]:
    if not outer:
        return []
    text = f"++{outer[0][0]};"
    for name, extent in outer[1:]:
        text = f"if (++{name} == {_factor(walk, extent)}) {{ {name} = 0; {text} }}"
    return [text]


def _may_use_threads(walk: Layout, outer: list[tuple[str, Index]]) -> bool:
    """Rows are independent unless two may update one element; a domain that is always small stays in one thread."""
    if not outer or any(isinstance(op, Store) and op.mode != "set" for op in walk.kernel.body):
        return False
    points = ONE
    for axis in walk.kernel.axes:
        points = points * axis.extent
    highest = walk.kernel.bounds.maximum(points)
    return highest is None or highest >= THREAD_WORK


def _clean_nans(kernel: FlatKernel) -> bool:
    """The low 16 bits of every NaN in an f32 register are zero: it came from a bf16 load, a literal or an invalid operation
    (IEEE 754-2019, 6.2.3: an operation hands on an operand's payload; the default NaN of x86 and ARM has none)."""
    dtypes = {b.name: b.dtype for b in kernel.buffers}
    loaded = {dtypes[op.access.buffer] for op in kernel.body if isinstance(op, Load)}
    made = any(isinstance(op, Compute) and op.op == "bitcast" for op in kernel.body)
    return not made and all(d == "bf16" or not DTYPES[d].is_float for d in loaded)


# -- declarations ----------------------------------------------------------------------------------------------------
def _factor(walk: Layout, index: Index) -> str:
    return operand_text(index, {}, walk.kernel.bounds)


def _symbols(walk: Layout) -> list[str]:
    return [f"const i64 {name} = symbols[{k}];" for k, name in enumerate(walk.kernel.symbols)]


def _head(walk: Layout) -> list[str]:
    written = {op.access.buffer for op in walk.kernel.body if isinstance(op, Store)}
    lines = []
    for k, b in enumerate(walk.kernel.buffers):
        const = "" if b.name in written else "const "
        lines.append(f"{const}{ops.memory(b.dtype)} *const __restrict {b.name} = ({const}{ops.memory(b.dtype)} *)buffers[{k}];")
    lines += _symbols(walk)
    for name, op in _large_stores(walk).items():
        lines.append(f"const bool {name} = {_factor(walk, walk.written(op))} >= {LARGE} && {_factor(walk, walk.moved())} >= {MOVED};")
    return lines


def _large_stores(walk: Layout) -> dict[str, Store]:
    return {large_name(op): op for op in walk.large_stores()}

