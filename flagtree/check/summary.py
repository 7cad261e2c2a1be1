"""Counting what a compiled part moves and launches: the rows of the report, from the program and what the toolchain told.

Bytes before fusion come from the capture, call by call; bytes after from the loads and stores of each kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flagtree.check.report import ExternRow, KernelRow, PartReport, fact
from flagtree.ir.attention import OPERATORS, SDPA
from flagtree.ir.gemm import OTHERWISE, PRODUCT, above_reason
from flagtree.ir.program import Extern, Kernel, Program, Repeat, Step, Template
from flagtree.ir.traffic import ProgramTraffic, program_traffic


@dataclass(frozen=True)
class Built:
    """What the toolchain told of one kernel: see toolchain/base.py."""

    tier: str
    missing: str
    facts: Mapping[str, object]


def part_report(
    part: str,
    target: str,
    program: Program,
    digests: Mapping[str, str],
    built: Mapping[str, Built],
    node_bytes: Mapping[str, int],
    layer_bytes: int | None,
    reference: Mapping[str, int],
) -> PartReport:
    """`program` at full depth; `digests`: kernel name to digest; `node_bytes`: bytes before fusion by graph node; `layer_bytes`: those of
    one inner layer; `reference`: symbol values at which bytes are counted."""
    traffic = program_traffic(program, reference)
    moved = {s.name: s for s in traffic.steps}
    weights = sum(b.role == "weight" and b.alias_of is None for b in program.buffers)
    formals = {f for s in program.steps if isinstance(s, Repeat) for f, _ in s.bindings}
    weights -= sum(program.buffer(f).role == "weight" for f in formals)
    repeat = max((s for s in program.steps if isinstance(s, Repeat)), key=lambda s: s.count, default=None)  # the layers most models are
    kernels = tuple(_kernel_rows(part, program, traffic, digests, built, node_bytes))
    return PartReport(
        name=part,
        target=target,
        kernels=kernels,
        externs=tuple(_extern_rows(part, program, traffic)),
        launches_total=sum(row.launches for row in kernels),
        weights=weights,
        launches_per_layer=len(repeat.body) if repeat else None,
        bytes_before_per_layer=layer_bytes if repeat else None,
        bytes_after_per_layer=sum(moved[s.name].bytes // repeat.count for s in repeat.body) if repeat else None,
        symbols={s.name: (s.lo, s.hi, s.multiple) for s in program.symbols},
        reference=dict(reference),
    )


def _steps(steps: tuple[Step, ...]) -> Iterator[Step]:
    for step in steps:
        yield from step.body if isinstance(step, Repeat) else (step,)


def _kernel_rows(
    part: str,
    program: Program,
    traffic: ProgramTraffic,
    digests: Mapping[str, str],
    built: Mapping[str, Built],
    node_bytes: Mapping[str, int],
) -> Iterator[KernelRow]:
    """One row a digest; a call that two kernels recompute counts before fusion where it stands first.  A template that may be a call
    counts as one, here with no launch."""
    moved = {s.name: s for s in traffic.steps}
    rows: dict[tuple[str, int], KernelRow] = {}
    # what stays a call keeps its bytes, also where a kernel took over a part of it (the cache write of attention)
    calls = (s for s in _steps(program.steps) if isinstance(s, Extern | Template))
    claimed = {o.node for s in calls if isinstance(s, Extern) or is_call(s) for o in s.origins}
    # attention keeps its bytes for the same reason
    attended = {o.node for s in _steps(program.steps) if isinstance(s, Kernel) and is_attention(s) for o in s.origins}
    for step in _steps(program.steps):
        if not isinstance(step, Kernel | Template):
            continue
        nodes = {o.node for o in step.origins} - claimed - (set() if is_attention(step) else attended)
        claimed |= nodes
        before, after = sum(node_bytes.get(n, 0) for n in nodes), moved[step.name]
        digest, launches, size = digests[step.name], after.launches, after.bytes // after.launches
        if isinstance(step, Template):  # one kernel serves products of several sizes: a row a size
            before = size = 0 if is_call(step) else size
            launches = 0 if is_call(step) else launches
        key = digest, size if isinstance(step, Template) else 0
        known = rows.get(key)
        if known is not None:
            launches, before = known.launches + launches, max(before, known.bytes_before)
        told = built[digest]
        rows[key] = KernelRow(
            name=known.name if known else label(step),
            digest=digest,
            part=part,
            launches=launches,
            ops=known.ops if known else (PRODUCT,) if isinstance(step, Template) else step.ops,
            tier=told.tier,
            missing=told.missing,
            bytes_before=before,
            bytes_after=size,
            registers=fact(told.facts, "registers"),
            spills=fact(told.facts, "spills"),
            shared=fact(told.facts, "shared"),
        )
    yield from rows.values()


def is_call(step: Step) -> bool:
    """A template whose rows may be more than its kernel takes."""
    return isinstance(step, Template) and OTHERWISE in dict(step.attrs)


def is_attention(step: Step) -> bool:
    """Was this kernel a call of attention?"""
    return isinstance(step, Kernel) and bool(step.ops) and step.ops[0] in (*OPERATORS, SDPA)


def label(kernel: Kernel | Template) -> str:
    """What a reader calls a kernel: the module in which most of its work was traced, else its own name."""
    leaves = [leaf for o in kernel.origins if (leaf := o.module.rsplit(".", 1)[-1]) and not leaf.isdigit()]
    return max(leaves, key=leaves.count) if leaves else kernel.name


def _extern_rows(part: str, program: Program, traffic: ProgramTraffic) -> Iterator[ExternRow]:
    moved = {s.name: s for s in traffic.steps}
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for step in _steps(program.steps):
        if isinstance(step, Extern):
            key = step.callee, step.reason
        elif isinstance(step, Template) and is_call(step):
            key = str(dict(step.attrs)[OTHERWISE]), above_reason(step)
        else:
            continue
        count, total = rows.get(key, (0, 0))
        rows[key] = count + moved[step.name].launches, total + moved[step.name].bytes
    for (callee, reason), (count, total) in sorted(rows.items()):
        yield ExternRow(callee, part, count, total, reason)
