"""The walk that both fusion passes share: which producer joins which consumer, in what order.

Consumers are visited once in program order and take in their producers, nearest first.  A merge is placed where one of the
two kernels stands, and only when all other dependences allow that place, so the order stays valid without a path search
and the walk is near linear.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

from flagtree.ir.deps import dependences
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.program import Kernel, Program, Reduce, Scan, Step
from flagtree.ir.verify import unproved
from flagtree.passes.append import Known, append, known
from flagtree.passes.base import Fuel, Refused, Report
from flagtree.passes.canonicalize import canonical_kernel, drop_dead
from flagtree.passes.divide import divided
from flagtree.passes.merge import can_merge, merge, moved_reduction
from flagtree.passes.rewrite import EXPENSIVE

Wanted = Callable[[Kernel, Kernel], bool]


def has_reduction(kernel: Kernel) -> bool:
    return any(isinstance(op, (Reduce, Scan)) for op in kernel.body)


class FusionWalk:
    """Steps by identity, their dependences and their places while kernels merge."""

    def __init__(self, program: Program, report: Report, fuel: Fuel, max_ops: int, heads: bool) -> None:
        self.program, self.report, self.fuel, self.max_ops, self.heads = program, report, fuel, max_ops, heads
        self.groups = False
        self.steps: dict[int, Step] = dict(enumerate(program.steps))
        graph = dependences(program)
        self.before: dict[int, set[int]] = {k: set(graph.predecessors(k)) for k in self.steps}
        self.after: dict[int, set[int]] = {k: set(graph.successors(k)) for k in self.steps}
        self.place: dict[int, int] = {k: k for k in self.steps}
        self.reads: dict[int, tuple[str, ...]] = {}
        self.writes: dict[int, tuple[str, ...]] = {}
        self.readers: dict[str, list[tuple[int, int]]] = {}  # of a root: (place, step), in order of place
        self.known: dict[int, Known | None] = {}  # of steps as they are now
        for k in self.steps:
            self._note(k)
        self.escaping = {program.root(n) for n in program.outputs} | {b.name for b in program.buffers if b.role != "temp"}

    # -- what a merge may drop -----------------------------------------------------------------------------------------
    def kept(self, a: int, b: int) -> frozenset[str]:
        """Buffers that `a` hands to `b` and that something else needs too."""
        flowing = frozenset(self.reads[b]).intersection(self.writes[a])
        return frozenset(n for n in flowing if n in self.escaping or self._read_by_another(a, b, n))

    def _read_by_another(self, a: int, b: int, name: str) -> bool:
        """Does a step behind `a` other than `b` read the buffer?  Those before it read what another step wrote."""
        last = self.readers.get(name, ())[-2:]  # the two that stand last decide
        return any(place > self.place[a] and k != b for place, k in last)

    def _readers_after(self, a: int, name: str) -> list[int]:
        """Steps behind `a` that read the buffer, in order."""
        readers = self.readers.get(name, [])
        return [k for _, k in readers[bisect.bisect_right(readers, (self.place[a], a)) :]]

    def _place(self, a: int, b: int) -> int | None:
        """A place where the joined kernel may stand: the consumer's, or the producer's."""
        if all(self.place[x] > self.place[b] for x in self.after[a] if x != b):
            return self.place[b]
        if all(self.place[x] < self.place[a] for x in self.before[b] if x != a):
            return self.place[a]
        return None

    # -- merging -------------------------------------------------------------------------------------------------------
    def try_merge(self, a: int, b: int) -> bool:
        """Join producer `a` into consumer `b`; records a refusal."""
        producer, consumer = self.steps[a], self.steps[b]
        assert isinstance(producer, Kernel) and isinstance(consumer, Kernel)
        found = self._joined(a, b, producer, consumer)
        if isinstance(found, Refused):
            self.report.refused.append(found)
            return False
        if not self.fuel.take():
            return False
        joined, place, state = found
        self._join(a, b, joined, place)
        if state is not None:
            self.known[b] = state
        self.report.matched.append(f"{producer.name} + {consumer.name}")
        self.report.rewrites += 1
        return True

    def _joined(self, a: int, b: int, producer: Kernel, consumer: Kernel) -> tuple[Kernel, int, Known | None] | Refused:
        """The joined kernel, where it stands, and what is known of it if it was appended."""
        both = (producer.name, consumer.name)
        if len(producer.body) + len(consumer.body) > self.max_ops:
            return Refused(both, f"more than {self.max_ops} operations in one kernel")
        kept, place = self.kept(a, b), self._place(a, b)
        apart = Refused(both, "a step between them needs one and is needed by the other")
        state = self._known(a, producer)
        if state is not None and (appended := append(self.program, producer, state, consumer, kept)) is not None:
            return apart if place is None else (appended[0], place, appended[1])
        legal = can_merge(self.program, producer, consumer, kept, self.heads, self.groups)
        if isinstance(legal, Refused) and (parted := self._divided(a, b, consumer)) is not None:
            again = can_merge(self.program, producer, parted, kept, self.heads, self.groups)
            if not isinstance(again, Refused):
                legal, consumer = again, parted
        if isinstance(legal, Refused):
            return legal
        if (why := moved_reduction(producer, consumer, legal)) is not None:
            return Refused(both, why)
        if place is None:
            return apart
        joined = canonical_kernel(self.program, merge(producer, consumer, legal, (frozenset(legal.flowing) - kept) | legal.overwritten))
        if (why := unproved(self.program, joined)) is not None:  # right perhaps, but no reader could know
            return Refused(both, f"the joined kernel cannot be proved: {why}")
        return joined, place, None

    def _divided(self, a: int, b: int, consumer: Kernel) -> Kernel | None:
        """The consumer with its rows as the producer has them; where a kernel reads what it stores, that could not join any more."""
        if any(isinstance(self.steps[k], Kernel) for n in self.writes[b] for k in self._readers_after(b, n)):
            return None
        found = (divided(self.program, consumer, n) for n in self.writes[a] if n in self.reads[b])
        return next((k for k in found if k is not None), None)

    def _known(self, a: int, kernel: Kernel) -> Known | None:
        if a not in self.known:
            self.known[a] = known(self.program, kernel)
        return self.known[a]

    def _join(self, a: int, b: int, joined: Kernel, place: int) -> None:
        self._forget(a)
        self._forget(b)
        self.steps[b], self.place[b] = joined, place
        self._note(b)
        for x in self.before.pop(a):
            self.after[x].discard(a)
            if x != b:
                self.after[x].add(b)
                self.before[b].add(x)
        for x in self.after.pop(a):
            self.before[x].discard(a)
            if x != b:
                self.before[x].add(b)
                self.after[b].add(x)
        del self.steps[a]

    def _forget(self, k: int) -> None:
        for root in {self.program.root(n) for n in self.reads.pop(k)}:
            readers = self.readers[root]
            del readers[bisect.bisect_left(readers, (self.place[k], k))]
        del self.writes[k]
        self.known.pop(k, None)

    def _note(self, k: int) -> None:
        self.reads[k], self.writes[k] = self.steps[k].reads, self.steps[k].writes
        for root in {self.program.root(n) for n in self.reads[k]}:
            bisect.insort(self.readers.setdefault(root, []), (self.place[k], k))

    # -- copying a cheap producer into every reader ----------------------------------------------------------------------
    def copy_cheap(self, a: int) -> None:
        """A cast or a negation read by several kernels is recomputed by each: it reads no more than it wrote."""
        producer = self.steps[a]
        assert isinstance(producer, Kernel)
        readers = {k for n in self.writes[a] for k in self._readers_after(a, n)}
        if len(readers) < 2 or not self._is_cheap(producer):
            return
        read, written = ({self.program.root(n) for n in names} for names in (self.reads[a], self.writes[a]))
        writers = [(x, self._roots_written(x)) for x in sorted(self.after[a])]  # the next ones: few, however many steps read
        writers = [(x, roots) for x, roots in writers if not roots.isdisjoint(read | written)]
        for b in sorted(readers, key=self.place.__getitem__):
            consumer, others = self.steps[b], [(x, roots) for x, roots in writers if x != b]
            if not isinstance(consumer, Kernel) or any(self.place[x] < self.place[b] for x, _ in others):
                continue
            legal = can_merge(self.program, producer, consumer, frozenset())
            if isinstance(legal, Refused) or moved_reduction(producer, consumer, legal):
                continue
            joined = canonical_kernel(self.program, merge(producer, consumer, legal, frozenset(legal.flowing)))
            if unproved(self.program, joined) is not None or not self.fuel.take():
                continue
            self._forget(b)
            self.steps[b] = joined
            self._note(b)
            self.before[b] |= self.before[a]
            for x in self.before[a]:
                self.after[x].add(b)
            for x, roots in others:  # `b` reads what `a` reads now, so it stands before whoever writes that next
                if not roots.isdisjoint(read):
                    self.after[b].add(x)
                    self.before[x].add(b)
            self.report.rewrites += 1

    def _roots_written(self, k: int) -> frozenset[str]:
        return frozenset(map(self.program.root, self.writes[k]))

    def _is_cheap(self, kernel: Kernel) -> bool:
        writes, reads = kernel.writes, kernel.reads
        if has_reduction(kernel) or len(writes) != 1 or writes[0] in self.escaping or len(reads) > 1:
            return False
        if writes[0] in reads:
            return False  # in place: a copy would change the value again
        read = sum(DTYPES[op.dtype].bits for op in kernel.loads)  # a narrowing is stored once rather than read wide by each
        written = DTYPES[self.program.buffer(writes[0]).dtype].bits
        return len(kernel.body) <= 8 and read <= written and not any(getattr(op, "op", "") in EXPENSIVE for op in kernel.body)

    # -- the walk ------------------------------------------------------------------------------------------------------
    def run(self, wanted: Wanted, groups: bool) -> Program:
        """The program after one walk; with `groups` after a second, in which a reduction may take in that of the row around its groups:
        first all that walks the same groups comes together, as one kernel can read the row then."""
        for a in sorted(self.steps):
            if isinstance(self.steps.get(a), Kernel):
                self.copy_cheap(a)
        for b in sorted(self.steps, key=self.place.__getitem__):
            if isinstance(self.steps.get(b), Kernel):
                self._absorb(b, wanted)
        self.groups = groups
        for b in sorted(self.steps, key=self.place.__getitem__) if groups else ():
            if isinstance(self.steps.get(b), Kernel):
                self._absorb(b, lambda a, b: has_reduction(a) and has_reduction(b))
        if not self.report.rewrites:
            return self.program
        order = sorted(self.steps, key=lambda k: (self.place[k], k))
        return drop_dead(self.program.with_(steps=tuple(self.steps[k] for k in order)))

    def _absorb(self, b: int, wanted: Wanted) -> None:
        """Take producers in until none fits; a refused pair is asked again only after the consumer has changed."""
        changed = True
        while changed:
            changed = False
            reads = set(self.reads[b])
            for a in sorted(self.before[b], key=self.place.__getitem__, reverse=True):
                producer, consumer = self.steps[a], self.steps[b]
                if not isinstance(producer, Kernel) or reads.isdisjoint(self.writes[a]):
                    continue
                assert isinstance(consumer, Kernel)
                if wanted(producer, consumer) and self.try_merge(a, b):
                    changed = True
                    break


def fuse(program: Program, name: str, fuel: Fuel | None, max_ops: int, wanted: Wanted, heads: bool = False,
         groups: bool = False) -> tuple[Program, Report]:  # fmt: skip
    """`FusionWalk.run`; refusals that stand are kept once each.  `heads` as in `can_merge`."""
    report = Report(name)
    new = FusionWalk(program, report, fuel or Fuel(), max_ops, heads).run(wanted, groups)
    matched = set(report.matched)
    report.refused = [r for r in dict.fromkeys(report.refused) if " + ".join(r.steps) not in matched]
    return new, report

