"""The verifier: a table of named rules that every program obeys, before and after every pass.

`verify` raises at the first broken rule and names rule, step and op; each rule has a failing test in tests/ir/test_verify.py.
Work is linear in the size of the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flagtree.errors import IRError
from flagtree.ir import element_rules as e
from flagtree.ir import kernel_rules as k
from flagtree.ir import program_rules as p
from flagtree.ir.facts import Facts
from flagtree.ir.index import Index
from flagtree.ir.program import Axis, Kernel, Program, Template
from flagtree.ir.text import print_op


@dataclass(frozen=True, slots=True)
class Rule:
    """`of_program` yields (where, why), `of_kernel` (op or None, why), for everything that breaks the rule."""

    name: str
    meaning: str
    of_program: p.ProgramCheck | None = None
    of_kernel: k.KernelCheck | None = None

    def check(self, program: Program, scopes: tuple[k.KernelScope, ...]) -> Iterator[tuple[str, str]]:
        """Everything in the program that breaks this rule, as (where, why)."""
        if self.of_program is not None:
            yield from self.of_program(program)
        for scope in scopes if self.of_kernel is not None else ():
            for op, why in self.of_kernel(scope):  # type: ignore[misc]
                yield f"kernel {scope.kernel.name}" + ("" if op is None else f": {print_op(op)}"), why


# later rules rely on earlier ones: a rule may ask for a buffer that `buffer-declared` has found
RULES: tuple[Rule, ...] = (
    Rule("unique-names", "symbols, buffers, steps, axes and values have one printable name each", p.unique_names, k.unique_names),
    Rule("buffer-declared", "every buffer that something names is declared", p.buffer_declared, k.buffer_declared),
    Rule("declared-well", "a declaration has a role, a dtype, matching strides, and only symbols in it", p.declarations),
    Rule("alias-declared", "an alias has a declared base of its dtype, and no circle", p.alias_declared),
    Rule("symbol-in-range", "a symbol's range holds a value, and its source exists", p.symbol_in_range),
    Rule("repeat-bindings", "each formal is declared and bound once per iteration to its like", p.repeat_bindings),
    Rule("ssa-defined", "a value is defined before it is used", None, k.ssa_defined),
    Rule("reduce-before-use", "a reduced value is used after its reduction", None, k.reduce_before_use),
    Rule("axis-bound", "indices name axes, symbols and earlier values; extents name symbols", None, k.axis_bound),
    Rule("rank-matches", "an access has one index per dimension", None, k.rank_matches),
    Rule("dtype-closed", "operands have the types that ops.py asks for; nothing converts silently", None, k.dtype_closed),
    Rule("literal-fits", "a literal is a value of its operand's type", None, k.literal_fits),
    Rule("reduce-axis-kind", "reductions run over reduce axes, and every reduce axis is reduced", None, k.reduce_axis_kind),
    Rule("index-in-range", "an index is proved in range, by bounds or by its mask; loaded integers are data", None, e.index_in_range),
    Rule("single-writer-per-element", "no two points set one element, no two stores meet", None, e.single_writer),
    Rule("in-place-same-element", "what a kernel loads and stores it does at one element, load first", None, e.in_place_same_element),
    Rule("state-write-allowed", "weights and constants are never written, inputs only by a mutating extern", p.state_write_allowed),
    Rule("extern-dependence-complete", "an extern declares what it reads, writes and orders", p.extern_dependence_complete),
    Rule("write-before-read", "a temp is written before it is read", p.write_before_read),
    Rule("output-defined", "an output is an input or is written", p.output_defined),
    Rule("numerics-explicit", "rounding and accumulator are stated", None, k.numerics_explicit),
    Rule("schedule-fits", "a schedule names axes of its kernel and positive sizes", None, k.schedule_fits),
)


def verify(program: Program) -> None:
    """Raise IRError (what: the rule, where: step and op, why) for the first rule that the program breaks."""
    scopes = tuple(_scopes(program))
    for rule in RULES:
        for where, why in rule.check(program, scopes):
            raise IRError(f"rule {rule.name} is broken: {rule.meaning}", where=f"program {program.name}, {where}", why=why)


def unproved(program: Program, kernel: Kernel) -> str | None:
    """The first kernel rule that `kernel` would break in `program`, with why, else None: what a pass asks before a rewrite."""
    scope = k.KernelScope(program, kernel, Facts.of(program, kernel), frozenset(s.name for s in program.symbols), frozenset())
    for rule in RULES:
        for _, why in rule.of_kernel(scope) if rule.of_kernel is not None else ():
            return f"{rule.name}, {why}"
    return None


def _scopes(program: Program) -> Iterator[k.KernelScope]:
    """One scope for each kernel, those in repeats included, and for each gemm's epilogue."""
    symbols = frozenset(s.name for s in program.symbols)
    declared = {b.name: b for b in program.buffers}
    for step in p.walk(program.steps):
        if isinstance(step, Kernel):
            yield k.KernelScope(program, step, Facts.of(program, step), symbols, frozenset())
        elif isinstance(step, Template) and step.kind == "gemm" and step.epilogue:
            if not {step.operands[0], step.outputs[0]} <= declared.keys():
                continue
            shape = declared[step.outputs[0]].shape
            axes = tuple(Axis(f"i{d}", Index.of(n)) for d, n in enumerate(shape))
            kernel = Kernel(step.name, axes, step.epilogue, step.numerics)
            before = {"acc": (declared[step.operands[0]].dtype, frozenset(a.name for a in axes))}
            yield k.KernelScope(program, kernel, Facts.of(program, kernel, before), symbols, frozenset(before))
