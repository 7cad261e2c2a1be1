"""A scheduled kernel as a portable Triton module: text, signature and grid.

Invariant: the text uses only what triton.language of 3.1 to 3.9 shares (docs/triton.md), and importing this module imports no triton.
Place in the flow: after ir.canonical, before toolchain.triton_aot and toolchain.maca, which compile the text.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from flagtree.codegen import triton_attention, triton_experts
from flagtree.codegen.triton_body import BodyWriter
from flagtree.codegen.triton_index import INT32_MAX, IndexText
from flagtree.codegen.triton_ops import CONVERSIONS, POINTERS, Speller
from flagtree.codegen.triton_phases import phases
from flagtree.codegen.triton_tile import Tile, TiledAxis
from flagtree.errors import CodegenError
from flagtree.ir import experts
from flagtree.ir.attention import Form, form_of
from flagtree.ir.flat import FlatKernel, flatten
from flagtree.ir.index import ONE, Index
from flagtree.ir.program import Kernel, Program, Schedule, Symbol
from flagtree.ir.text import print_program
from flagtree.targets.base import Target

GRID_LIMIT = (INT32_MAX, 65535, 65535)  # CUDA programming guide, "Technical Specifications": the same from compute capability 3.0 on


@dataclass(frozen=True, slots=True)
class TritonSource:
    """One generated kernel: plain data that a worker process or a vendor's toolchain can use without the compiler.

    `signature`: (name, type) in order, types as Triton spells them.  `grid`: three index expressions over the symbols (Index.to_json).
    `aligned`: arguments that the aligned variant promises to be divisible by 16 (bytes for a pointer).
    `tiles`: (axis, elements that an instance holds at once); `loops`: axes walked in a loop; `atomic`: uses atomic memory operations.
    """

    text: str
    function: str
    signature: tuple[tuple[str, str], ...]
    grid: tuple[object, object, object]
    constexprs: tuple[tuple[str, int], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    fp_contract: bool
    tiles: tuple[tuple[str, int], ...]
    loops: tuple[str, ...]
    atomic: bool


def generate(program: Program, digest: str, target: Target) -> TritonSource:
    """The source of an isolated one-kernel program.

    Raises CodegenError, with the reason, for what Triton cannot express portably or the target cannot hold.
    """
    kernel = program.steps[0]
    if len(program.steps) != 1 or not isinstance(kernel, Kernel):
        raise CodegenError("cannot generate code for this program", where=program.name, why="it is not one isolated kernel")
    function = f"ft_{digest[:16]}"
    try:
        schedule = kernel.schedule
        if schedule is None:
            raise CodegenError("the kernel has no schedule", hint="the pass `schedule` gives it one")
        _check_target(program, schedule, target)
        if (form := form_of(program)) is not None:
            return _attention(program, kernel, form, schedule, function)
        if (product := experts.known(program, kernel)) is not None:
            return _product(program, kernel, product, schedule, function, "f8e4m3fn" in target.dtypes)
        flat = flatten(program.with_(steps=(replace(kernel, schedule=schedule),)))
        return _write(program, kernel, flat, flat.schedule or schedule, function, schedule.warps * target.warp)
    except CodegenError as e:
        raise CodegenError(e.what, where=e.where or function, why=e.why, hint=e.hint) from e


def _attention(program: Program, kernel: Kernel, form: Form, schedule: Schedule, function: str) -> TritonSource:
    """The module of an attention, from its own template."""
    signature = _signature(program)
    text = _environment().get_template("triton_attention.py.j2").render(
        **_header(program, function, signature), **triton_attention.context(program, form)
    )
    grid = tuple(g.to_json() for g in triton_attention.grid(program, form))
    return TritonSource(
        text, function, signature, grid, (), _alignable(program), schedule.warps, schedule.stages, kernel.numerics.fp_contract,  # type: ignore[arg-type]
        schedule.tiles, schedule.loop, False,
    )  # fmt: skip


def _check_target(program: Program, schedule: Schedule, target: Target) -> None:
    for buffer in program.buffers:
        if target.dtypes and buffer.dtype not in target.dtypes | {"f8e4m3fn"}:  # a byte, converted by integer arithmetic
            raise CodegenError(f"{target.name} has no type {buffer.dtype}", where=buffer.name)
    if schedule.warps * target.warp > target.max_threads:
        raise CodegenError(
            f"{schedule.warps} warps of {target.warp} threads",
            why=f"{target.name} allows {target.max_threads} threads in a program instance",
        )


def _write(program: Program, kernel: Kernel, flat: FlatKernel, schedule: Schedule, function: str, threads: int) -> TritonSource:
    tile = Tile(flat, schedule, program.symbols)
    helpers: set[str] = set()
    axis_widths = {n: 32 if _upper(a.extent, tile) <= INT32_MAX - a.tile else 64 for n, a in tile.axes.items()}
    symbol_widths = {s.name: _symbol_width(s) for s in program.symbols}
    value_widths = {n: 64 if d == "i64" else 32 for n, d in flat.dtypes.items()}
    index = IndexText(tile.bounds, axis_widths | symbol_widths | value_widths, helpers.add)
    memory = {b.name: b.dtype for b in program.buffers}
    writer = BodyWriter(tile, index, Speller(flat.dtypes, helpers.add), memory, helpers.add, kernel.numerics.accumulator, threads)
    grid = _prologue(tile, writer)
    for phase in phases(tile):
        writer.phase(phase)
    signature = _signature(program)
    text = _module(program, function, signature, writer.lines, helpers)
    return TritonSource(
        text, function, signature, tuple(g.to_json() for g in grid), (), _alignable(program), schedule.warps, schedule.stages,  # type: ignore[arg-type]
        kernel.numerics.fp_contract, tuple((a.name, a.tile) for a in tile.axes.values()), tile.loops, writer.atomic,
    )  # fmt: skip


def _symbol_width(symbol: Symbol) -> int:
    return 64 if symbol.hi > INT32_MAX or symbol.lo < -INT32_MAX else 32


def _signature(program: Program) -> tuple[tuple[str, str], ...]:
    """Pointers, then symbols."""
    pointers = tuple((b.name, POINTERS[b.dtype]) for b in program.buffers)
    return pointers + tuple((s.name, f"i{_symbol_width(s)}") for s in program.symbols)


def _product(program: Program, kernel: Kernel, product: experts.Known, schedule: Schedule, function: str,
             float8: bool) -> TritonSource:  # fmt: skip
    """A product from its template; `float8`: the target multiplies e4m3fn."""
    helpers: set[str] = set()
    context = triton_experts.context(program, kernel, product, helpers.add)
    template = "triton_scaled.py.j2" if product.product.scaled else "triton_experts.py.j2"
    context |= triton_experts.scaled(kernel, product, float8) if product.product.scaled else {}
    lines = _environment().get_template(template).render(context).rstrip("\n").split("\n")
    signature = _signature(program)
    grid = triton_experts.grid(program, kernel, product)
    return TritonSource(
        _module(program, function, signature, lines, helpers), function, signature, tuple(g.to_json() for g in grid), (),  # type: ignore[arg-type]
        _alignable(program), schedule.warps, schedule.stages, kernel.numerics.fp_contract, schedule.tiles, schedule.loop, False,
    )  # fmt: skip


def _upper(extent: Index, tile: Tile) -> int:
    high = tile.bounds.interval(extent)[1]
    return 1 << 62 if high is None else high


def _alignable(program: Program) -> tuple[str, ...]:
    """Pointers, symbols that are strides, and symbols whose range promises a multiple of 16; never a token count."""

    def fits(s: Symbol) -> bool:
        return s.multiple % 16 == 0 or bool(s.source and s.source[0] == "stride")

    return tuple(b.name for b in program.buffers) + tuple(s.name for s in program.symbols if fits(s))


# -- grid ------------------------------------------------------------------------------------------------------------
def grid_axes(tile: Tile) -> list[list[TiledAxis]]:
    """Which grid dimension each axis is cut along: all on x, the outermost on y and z where x would pass its limit."""
    axes = [a for a in tile.axes.values() if a.in_grid]
    dimensions: list[list[TiledAxis]] = [axes, [], []]
    for other in (1, 2):
        if _programs(dimensions[0], tile) <= GRID_LIMIT[0]:
            break
        while len(dimensions[0]) > 1 and _programs([*dimensions[other], dimensions[0][0]], tile) <= GRID_LIMIT[other]:
            dimensions[other].append(dimensions[0].pop(0))
    if _programs(dimensions[0], tile) > GRID_LIMIT[0]:
        raise CodegenError(
            "the grid has too many program instances",
            why=f"over {GRID_LIMIT[0]} along x",
            hint="a larger tile, or a smaller range of the symbols",
        )
    return dimensions


def _programs(axes: list[TiledAxis], tile: Tile) -> int:
    total = 1
    for axis in axes:
        total *= max(1, _upper(axis.count, tile))
    return total


def _prologue(tile: Tile, writer: BodyWriter) -> tuple[Index, Index, Index]:
    """Write where each axis stands in this instance; the grid's three sizes."""
    sizes = [ONE, ONE, ONE]
    for k, axes in enumerate(grid_axes(tile)):
        if not axes:
            continue
        p = "xyz"[k]
        writer.emit(f"{p} = tl.program_id({k})")
        for axis in reversed(axes):
            sizes[k] = sizes[k] * axis.count
            _coordinate(axis, p, axis is axes[0], writer)
    for axis in tile.axes.values():
        if not axis.in_grid and not axis.looped:
            if axis.dim is None:
                raise CodegenError(f"axis {axis.name} is neither in the grid nor in a tile", why=f"its extent is {axis.extent}")
            writer.axis_lines(axis, "0")
    return sizes[0], sizes[1], sizes[2]


def _coordinate(axis: TiledAxis, p: str, outermost: bool, writer: BodyWriter) -> None:
    """Take one axis off the instance number `p`, innermost first."""
    count = writer.index.operand(axis.count)
    wide = writer.index.widths[axis.name] == 64
    place = p if outermost else f"{p} % {count}"
    if wide:
        place = f"{place}.to(tl.int64)" if place == p else f"({place}).to(tl.int64)"
    start = place if axis.tile == 1 else f"{place} * {axis.tile}"
    if axis.dim is None:
        writer.emit(f"{axis.name} = {start}")
    else:
        writer.emit(f"{axis.name}_start = {start}")
        writer.axis_lines(axis, f"{axis.name}_start")
    if not outermost:
        writer.emit(f"{p} = {p} // {count}")


# -- text ------------------------------------------------------------------------------------------------------------
@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )


@functools.cache
def helper_functions() -> dict[str, str]:
    """The text of every function that a generated module may contain, by name."""
    template = _environment().get_template("triton_math.py.j2")
    return {name: "".join(block(template.new_context())).strip() for name, block in sorted(template.blocks.items())}


def with_callees(names: set[str]) -> list[str]:
    """The functions `names` and all that they call, by name."""
    known = helper_functions()
    call = re.compile(r"(?<![\w.])(" + "|".join(known) + r")\(")
    found, todo = set(), sorted(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += sorted(set(call.findall(known[name])) - found)
    return sorted(found)


def _header(program: Program, function: str, signature: tuple[tuple[str, str], ...]) -> dict[str, object]:
    """What every template of a module begins with."""
    return {
        "function": function,
        "ir": print_program(program).splitlines(),
        "symbols": ", ".join(f'"{s.name}"' for s in program.symbols),
        "arguments": ", ".join(n for n, _ in signature),
    }


def _module(program: Program, function: str, signature: tuple[tuple[str, str], ...], body: list[str], helpers: set[str]) -> str:
    helpers = helpers | {name for name in CONVERSIONS if any(f"{name}(" in line for line in body)}
    return _environment().get_template("triton_kernel.py.j2").render(
        **_header(program, function, signature), helpers=[helper_functions()[n] for n in with_callees(helpers)], body=body or ["pass"]
    )
