"""The verifier's rules about a whole program: declarations, memory, order of writes and reads, externs, repeats.

Each check yields (where, why) for one program; `ir/verify.py` holds the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from flagtree.ir.dtypes import DTYPES
from flagtree.ir.index import Index
from flagtree.ir.lines import NAME, RESERVED
from flagtree.ir.program import ROLES, Buffer, Extern, Kernel, Program, Ref, Repeat, Step, Template

Found = Iterator[tuple[str, str]]
ProgramCheck = Callable[[Program], Found]
_EFFECT = re.compile(r"|rng|(collective|state):.+")
_IN_PLACE = re.compile(r".*[^_]_")  # aten's convention: a trailing underscore writes the first operand


def walk(steps: tuple[Step, ...]) -> Iterator[Step]:
    """Every step, those inside repeats after their repeat."""
    for step in steps:
        yield step
        if isinstance(step, Repeat):
            yield from walk(step.body)


def unique_names(program: Program) -> Found:
    named = [("symbol", s.name) for s in program.symbols] + [("buffer", b.name) for b in program.buffers]
    named += [("step", s.name) for s in walk(program.steps)]
    seen: set[tuple[str, str]] = set()
    for kind, name in named:
        if (kind, name) in seen:
            yield f"{kind} {name}", "the name is taken"
        if name in RESERVED or NAME.fullmatch(name) is None:
            yield f"{kind} {name}", "not a name: letters, digits, '_' and '.', starting with a letter, no reserved word"
        seen.add((kind, name))


def buffer_declared(program: Program) -> Found:
    known = {b.name for b in program.buffers}
    for symbol in program.symbols:
        if len(symbol.source) > 1 and symbol.source[1] not in known:
            yield f"symbol {symbol.name}", f"its source '{symbol.source[1]}' is not declared"
    for name in program.outputs:
        if name not in known:
            yield "outputs", f"buffer '{name}' is not declared"
    for step in walk(program.steps):
        if isinstance(step, Extern | Template):
            for name in (*step.reads, *step.writes):
                if name not in known:
                    yield f"step {step.name}", f"buffer '{name}' is not declared"


def declarations(program: Program) -> Found:
    symbols = {s.name for s in program.symbols}
    for b in program.buffers:
        where = f"buffer {b.name}"
        if b.role not in ROLES:
            yield where, f"'{b.role}' is no role"
        if b.dtype not in DTYPES and b.role != "opaque":
            yield where, f"'{b.dtype}' is no dtype"
        if b.strides is not None and len(b.strides) != len(b.shape):
            yield where, f"{len(b.strides)} strides for {len(b.shape)} dimensions"
        exprs = (*b.shape, *(b.strides or ()), *((b.alias_of.offset,) if b.alias_of else ()))
        if unknown := frozenset().union(*(e.names() for e in exprs)) - symbols:
            yield where, f"'{min(unknown)}' is no symbol"


def alias_declared(program: Program) -> Found:
    known = {b.name: b for b in program.buffers}
    rooted: set[str] = set()
    for b in program.buffers:
        chain: list[str] = []
        at: Buffer | None = b
        while at is not None and at.alias_of is not None and at.name not in rooted:
            if at.name in chain:
                yield f"buffer {b.name}", "its aliases run in a circle"
                break
            chain.append(at.name)
            base = known.get(at.alias_of.base)
            if base is None:
                yield f"buffer {at.name}", f"its base '{at.alias_of.base}' is not declared"
            elif base.dtype != at.dtype:
                yield f"buffer {at.name}", f"{at.dtype}, its base '{base.name}' {base.dtype}"
            at = base
        rooted.update(chain)


def symbol_in_range(program: Program) -> Found:
    known = {b.name: b for b in program.buffers}
    for s in program.symbols:
        where = f"symbol {s.name}"
        if s.lo > s.hi or s.multiple < 1 or -(-s.lo // s.multiple) * s.multiple > s.hi:
            yield where, f"no multiple of {s.multiple} lies in {s.lo}..{s.hi}"
        kind = s.source[0] if s.source else ""
        if kind not in ("dim", "stride", "scalar", "argument"):
            yield where, f"'{kind}' is no source"
        elif kind in ("dim", "stride") and not 0 <= s.source[2] < len(known[s.source[1]].shape):
            yield where, f"'{s.source[1]}' has no dimension {s.source[2]}"
        elif kind == "scalar" and known[s.source[1]].shape != ():
            yield where, f"'{s.source[1]}' is no single number"


def state_write_allowed(program: Program) -> Found:
    for step in walk(program.steps):
        if isinstance(step, Repeat):
            continue  # its body's steps and its bindings are looked at one by one
        mutated = set(step.mutates) if isinstance(step, Extern) else set()
        for name in step.writes:
            role = program.buffer(program.root(name)).role
            if role == "input" and name not in mutated:
                yield f"step {step.name}", f"'{name}' is an input: declare it state, or let an extern mutate it"
            elif role in ("weight", "constant", "opaque") or (role == "scalar" and not isinstance(step, Extern)):
                yield f"step {step.name}", f"'{name}' is a {role}, which is never written"


def extern_dependence_complete(program: Program) -> Found:
    for step in walk(program.steps):
        if not isinstance(step, Extern):
            continue
        where = f"extern {step.name}"
        operands = set(step.reads)
        for name in step.mutates:
            if name not in operands:
                yield where, f"it mutates '{name}', which is no operand"
        for output in step.outputs:
            if output is not None and output in operands:
                yield where, f"'{output}' is operand and output: list it under mutates"
        first, parts = step.args[0] if step.args else None, step.callee.split(".")
        if _IN_PLACE.fullmatch(parts[min(1, len(parts) - 1)]) and isinstance(first, Ref) and first.buffer not in step.mutates:
            yield where, f"'{step.callee}' writes '{first.buffer}', which is not under mutates"
        if _EFFECT.fullmatch(step.effect) is None:
            yield where, f"effect '{step.effect}' is not rng, collective:<group> or state:<name>"


def write_before_read(program: Program) -> Found:
    roots: dict[str, str] = {}
    for b in program.buffers:
        roots[b.name] = program.root(b.name)
    temps = {b.name for b in program.buffers if b.role == "temp"}
    written: set[str] = set()

    def steps(body: tuple[Step, ...], scope: dict[str, str], done: set[str]) -> Found:
        for step in body:
            if isinstance(step, Repeat):
                yield from repeat(step, scope, done)
                continue
            reads = _exposed(step)
            for name in sorted(reads):
                root = _actual_root(name, scope, roots)
                if root in temps and root not in done:
                    yield f"step {step.name}", f"'{name}' is read before anything wrote it"
            done.update(_actual_root(n, scope, roots) for n in step.writes)

    def repeat(step: Repeat, scope: dict[str, str], done: set[str]) -> Found:
        for i in range(step.count):
            inner = {**scope, **{f: scope.get(a[i], a[i]) for f, a in step.bindings}}
            yield from steps(step.body, inner, done)

    yield from steps(program.steps, {}, written)


def _exposed(step: Kernel | Template | Extern) -> set[str]:
    """Buffers that a step reads; what it adds to is read too, what a call writes in place may be memory that nothing wrote yet."""
    if isinstance(step, Extern):
        return set(step.reads) - set(step.mutates)
    added = {s.access.buffer for s in step.stores if s.mode != "set"} if isinstance(step, Kernel) else set()
    return set(step.reads) | added


def _actual_root(name: str, scope: dict[str, str], roots: dict[str, str]) -> str:
    root = roots[name]
    while root in scope and scope[root] != root:
        root = roots[scope[root]]
    return root


def output_defined(program: Program) -> Found:
    written = {program.root(n) for s in program.steps for n in s.writes}
    for name in program.outputs:
        root = program.root(name)
        if program.buffer(root).role == "temp" and root not in written:
            yield f"output {name}", "nothing writes it"


def repeat_bindings(program: Program) -> Found:
    known = {b.name for b in program.buffers}
    for step in walk(program.steps):
        if not isinstance(step, Repeat):
            continue
        where = f"repeat {step.name}"
        if step.count < 0:
            yield where, f"count {step.count}"
        formals = [f for f, _ in step.bindings]
        if len(set(formals)) != len(formals):
            yield where, "a formal is bound twice"
        for formal, actual in step.bindings:
            if len(actual) != step.count:
                yield where, f"'{formal}' is bound to {len(actual)} buffers, the count is {step.count}"
            yield from ((where, why) for why in _binding_errors(program, formal, actual))
        if all(f in known and len(a) == step.count and known.issuperset(a) for f, a in step.bindings):
            yield from ((where, why) for why in _hidden_aliases(program, step))


def _binding_errors(program: Program, formal: str, actual: tuple[str, ...]) -> Iterator[str]:
    known = {b.name for b in program.buffers}
    if formal not in known:
        yield f"the formal '{formal}' is not declared"
        return
    want = _signature(program.buffer(formal))
    for name in dict.fromkeys(actual):
        if name not in known:
            yield f"'{name}', bound to '{formal}', is not declared"
        elif _signature(program.buffer(name)) != want:
            yield f"'{name}' and its formal '{formal}' differ in dtype, shape or strides"


def _hidden_aliases(program: Program, step: Repeat) -> Iterator[str]:
    """Formals are different memory to whoever reads the body: where one is written, no other name may mean the same buffer."""
    inner = list(walk(step.body))
    written = {program.root(n) for s in inner for n in s.writes if not isinstance(s, Repeat)}
    formals = {f for f, _ in step.bindings}
    free = {program.root(n): program.root(n) for s in inner for n in (*s.reads, *s.writes) if program.root(n) not in formals}
    for i in range(step.count):
        owner = dict(free)
        for formal, actual in step.bindings:
            root = program.root(formal)  # a formal that is a view of another formal is declared to be the same memory
            other = owner.setdefault(program.root(actual[i]), root)
            if other != root and (root in written or other in written):
                yield f"in iteration {i} '{formal}' and '{other}' are one buffer, and the body writes it"
                return


def _signature(b: Buffer) -> tuple[str, tuple[Index, ...], tuple[Index, ...]]:
    return b.dtype, b.shape, b.layout
