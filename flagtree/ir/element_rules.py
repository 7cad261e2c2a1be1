"""The verifier's rules about the elements that one kernel touches: in range, one writer each, in place at one element.

What is not proved is refused.  `ir/verify.py` holds the table; `determined_axes` and `disjoint` are the proofs.
"""

from __future__ import annotations

from flagtree.ir.facts import Facts
from flagtree.ir.index import ZERO, Index, Quotient, floordiv, remainder
from flagtree.ir.kernel_rules import Found, KernelScope, accesses
from flagtree.ir.program import Access, Compute, Load, Store


def index_in_range(s: KernelScope) -> Found:
    for op, access in accesses(s.kernel):
        for index, extent in zip(access.index, s.program.buffer(access.buffer).shape, strict=True):
            if not s.facts.in_range(index, extent, access.mask):
                yield op, f"not proved: 0 <= {s.facts.resolve(index)} < {extent}"


def single_writer(s: KernelScope) -> Found:
    before: dict[str, list[Store]] = {}
    for store in s.kernel.stores:
        if store.mode != "set":
            continue
        missing = s.facts.store_axes(store) - determined_axes(s.facts, store.access)
        if missing:
            yield store, f"several points of axis '{min(missing)}' write one element"
        root = s.program.root(store.access.buffer)
        for other in before.get(root, ()):
            if not disjoint(s.facts, store.access, other.access):
                yield store, f"'{store.access.buffer}' is also written by another store of this kernel that may meet it"
        before.setdefault(root, []).append(store)


def determined_axes(facts: Facts, access: Access) -> frozenset[str]:
    """The axes whose position follows from the element that is accessed: the index is injective over them."""
    done = {name for name, extent in facts.extents.items() if extent.constant == 1}
    exprs: list[Index] = []
    for index in access.index:
        if any(n in facts.definitions for n in index.names()):
            # data decides the element: the operation promises distinct ones
            done |= facts.index_axes(Index.of(n) for n in index.names() if n in facts.definitions)
        exprs.append(facts.resolve(index))
    exprs = _recombined(exprs)
    changed = True
    while changed:
        changed = False
        for expr in exprs:
            left = [n for n in sorted(expr.names()) if n in facts.extents and n not in done]
            if left and _mixed_radix(facts, expr, left):
                done.update(left)
                changed = True
    return frozenset(done)


def _recombined(exprs: list[Index]) -> list[Index]:
    """x // d and x % d together give x, so that a split axis counts as written whole."""
    known = list(exprs)
    changed = True
    while changed:
        changed = False
        for expr in tuple(known):
            atom = expr.terms[0][0][0] if len(expr.terms) == 1 and expr.terms[0][1] == 1 and len(expr.terms[0][0]) == 1 else ""
            if isinstance(atom, str) or atom.num in known:
                continue
            other = remainder(atom.num, atom.den) if isinstance(atom, Quotient) else floordiv(atom.num, atom.den)
            if other in known:
                known.append(atom.num)
                changed = True
    return known


def _mixed_radix(facts: Facts, expr: Index, axes: list[str]) -> bool:
    """Each axis' factor exceeds the sum of all that the smaller ones can reach: the value tells every axis."""
    factors: dict[str, Index] = {}
    for name in axes:
        factor = expr.coefficient(name)
        if factor is None or factor == ZERO or any(n in facts.extents for n in factor.names()):
            return False
        factors[name] = factor if facts.bounds.nonnegative(factor) else -factor
    reach = ZERO
    while factors:
        least = next((n for n, f in factors.items() if all(facts.bounds.nonnegative(g - f) for g in factors.values())), None)
        if least is None or not facts.bounds.nonnegative(factors[least] - reach - 1):
            return False
        reach = reach + factors.pop(least) * (facts.extents[least] - 1)
    return True


def disjoint(facts: Facts, a: Access, b: Access) -> bool:
    """Proved: two accesses to one buffer never meet, by contradicting masks or by ranges apart in one dimension."""
    if a.buffer != b.buffer:
        return False
    for m, n in ((a.mask, b.mask), (b.mask, a.mask)):
        op = facts.definitions.get(m) if m else None
        if isinstance(op, Compute) and op.op == "not" and op.args == (n,) and a.index == b.index:
            return True
    constraints = [(c, d) for c in facts.constraints(a.mask) for d in facts.constraints(b.mask)] if a.index == b.index else []
    if any(facts.bounds.nonnegative(-(c + d) - 1) for c, d in constraints):
        return True
    # two accesses stand at two points of the domain: the first gets axes of its own
    other = {n: n + "'" for n in facts.extents}
    bounds = facts.bounds.narrowed({other[n]: facts.bounds.limits[n] for n in facts.extents})
    for i, j in zip(map(facts.resolve, a.index), map(facts.resolve, b.index), strict=True):
        if facts.definitions.keys().isdisjoint(i.names() | j.names()):
            apart = i.rename(other) - j
            if bounds.nonnegative(apart - 1) or bounds.nonnegative(-apart - 1):
                return True
    return False


def in_place_same_element(s: KernelScope) -> Found:
    stores: dict[str, list[Store]] = {}
    for store in s.kernel.stores:
        stores.setdefault(s.program.root(store.access.buffer), []).append(store)
    seen: set[str] = set()
    parallel, reduced = ({a.name for a in s.kernel.axes if a.kind == kind} for kind in ("parallel", "reduce"))
    for op in s.kernel.body:
        if isinstance(op, Store):
            seen.add(s.program.root(op.access.buffer))
        if not isinstance(op, Load):
            continue
        root = s.program.root(op.access.buffer)
        for store in stores.get(root, ()):
            if op.access.buffer == store.access.buffer and op.access.index == store.access.index:
                if root in seen:
                    yield op, f"'{op.access.buffer}' is loaded after it is stored"
                swept = reduced if s.facts.index_axes(store.access.index) & reduced else set()  # else it is stored behind the sweep
                if loose := (parallel | swept) - determined_axes(s.facts, store.access):
                    yield op, f"points of axis '{min(loose)}' load an element that another of them stores"
            elif not disjoint(s.facts, op.access, store.access):
                yield op, f"'{store.access.buffer}' is stored at another element of the same memory"
