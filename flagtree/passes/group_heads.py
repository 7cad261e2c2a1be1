"""Attention of one token over shared key heads: the copy that repeats each head for its group of queries is not made.

Models repeat keys and values to the number of query heads before `scaled_dot_product_attention`.  For one query token the queries of a
group can be the rows of one head instead, so the cache is read where it lies.  Runs before fusion; the copies die in `canonicalize`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flagtree.ir.attention import SDPA
from flagtree.ir.index import ONE, ZERO
from flagtree.ir.program import Extern, Kernel, Load, Operand, Program, Ref, Store
from flagtree.passes.base import Fuel, Refused, Report
from flagtree.targets.base import Target

GROUPED = "flagtree.grouped_attention.default"
_PLAIN = {"enable_gqa": (False,), "dropout_p": (0, 0.0), "is_causal": (False,), "attn_mask": ()}  # keywords and what they may be


@dataclass(frozen=True)
class GroupHeads:
    """No options."""

    name: ClassVar[str] = "group_heads"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report, fuel, steps = Report(self.name), fuel or Fuel(), list(program.steps)
        for k, step in enumerate(program.steps):
            if not isinstance(step, Extern) or step.callee != SDPA:
                continue
            found = _grouped(program, k, step)
            if isinstance(found, str):
                report.refused.append(Refused((step.name,), found))
            elif fuel.take():
                steps[k] = found
                report.rewrites += 1
                report.matched.append(step.name)
        return (program.with_(steps=tuple(steps)) if report.rewrites else program), report


def _grouped(program: Program, k: int, step: Extern) -> Extern | str:
    """The call over the heads as they are, or why not."""
    options: dict[str, Operand] = {"attn_mask": None, **dict(zip(("attn_mask", "dropout_p", "is_causal"), step.args[3:], strict=False))}
    options |= dict(step.kwargs)
    scale, mask = options.pop("scale", None), options.pop("attn_mask")
    if any(value not in _PLAIN.get(name, ()) for name, value in options.items()):
        return "dropout or a causal mask"
    query, *both = step.args[:3]
    if not isinstance(query, Ref) or len(program.buffer(query.buffer).shape) != 4 or program.buffer(query.buffer).shape[2] != ONE:
        return "more than one query token"
    if isinstance(mask, Ref) and not _shared(program, mask.buffer):
        return "a mask that differs between heads"
    heads = [_repeated(program, k, x.buffer) if isinstance(x, Ref) else None for x in both]
    if None in heads or program.buffer(heads[0] or "").shape[:3] != program.buffer(heads[1] or "").shape[:3]:
        return "keys and values are not copies that repeat each head"
    args = (query, *(Ref(h) for h in heads if h is not None), mask, scale)
    return replace(step, callee=GROUPED, args=args, kwargs=(), effect="")


def _shared(program: Program, mask: str) -> bool:
    shape = program.buffer(mask).shape
    return len(shape) == 4 and shape[1] == ONE


def _repeated(program: Program, k: int, name: str) -> str | None:
    """The buffer [B, HK, C, D] of which `name` [B, HK * G, C, D] is a copy with each head G times, where it still has the same content at
    step `k`."""
    view = program.buffer(name)
    root = program.buffer(program.root(name))
    if view.alias_of is not None and (view.alias_of.base != root.name or view.alias_of.offset != ZERO):
        return None
    if not (view.is_contiguous and root.is_contiguous) or len(root.shape) != 5 or len(view.shape) != 4:
        return None
    batch, heads, group, rows, width = root.shape
    if view.shape != (batch, heads * group, rows, width):
        return None
    makers = [i for i, s in enumerate(program.steps[:k]) if root.name in map(program.root, s.writes)]
    source = _copied(program, makers[0], root.name) if len(makers) == 1 else None
    if source is None or program.buffer(source).shape != (batch, heads, rows, width):
        return None
    changed = any(program.root(source) in map(program.root, s.writes) for s in program.steps[makers[0] + 1 : k])
    return None if changed else source


def _copied(program: Program, k: int, root: str) -> str | None:
    """The source of a kernel that is one full copy into `root`, the same for each value of the third dimension."""
    step = program.steps[k]
    if not isinstance(step, Kernel) or len(step.body) != 2:
        return None
    load, store = step.body
    if not isinstance(load, Load) or not isinstance(store, Store) or store.value != load.name or store.mode != "set":
        return None
    if load.access.mask is not None or store.access.mask is not None or store.access.buffer != root:
        return None
    extents = {a.name: a.extent for a in step.axes}
    shape, index = program.buffer(root).shape, store.access.index
    walked = [i.name for i, n in zip(index, shape, strict=True) if n != ONE]
    whole = len(set(walked)) == len(walked) and all(extents.get(i.name or "") == n or n == ONE for i, n in zip(index, shape, strict=True))
    return load.access.buffer if whole and load.access.index == (*index[:2], *index[3:]) else None
