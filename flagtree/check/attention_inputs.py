"""Sizes and integers for an attention under test: a cache with room for the tokens, starts and lengths within it, ascending bounds.

What the general rules of check/inputs.py cannot know: the integers that say which keys a row sees enter no index.  Used there only.
"""

from __future__ import annotations

from collections.abc import Mapping

from flagtree.ir.attention import FULL, PACKED, Form, operands
from flagtree.ir.index import Index
from flagtree.ir.program import Kernel, Program

_KEYS = 64  # a tile's, where no schedule says


def sizes(program: Program, form: Form) -> list[dict[str, int]]:
    """Two settings: the low ends, and a few tokens over a little more keys than one tile holds."""
    tile = tile_of(program)
    small = {"batch": 1, "tokens": 1, "keys": 1, "edges": 2}
    several = {"tokens": tile + 5, "keys": tile + 5, "edges": 4} if form.kind == PACKED else {"batch": 2, "tokens": 3, "keys": tile + 3}
    return [setting(program, form, wanted) for wanted in (small, small | several)]


def setting(program: Program, form: Form, wanted: Mapping[str, int]) -> dict[str, int]:
    """The wanted numbers of sequences (batch), tokens, keys and bounds (edges) within each symbol's range; as many keys as tokens at
    least."""
    q, k, _, *further = operands(program, form)
    if form.kind == PACKED:
        roles = {"tokens": q.shape[0], "keys": k.shape[0], "edges": further[0].shape[0]}
    else:
        roles = {"batch": q.shape[0], "tokens": q.shape[2], "keys": k.shape[2]}
    out = {}
    for symbol in program.symbols:
        # a size may be a multiple of its symbol: four patches that merge are one step of it
        each = {role: size.evaluate({symbol.name: 1}) for role, size in roles.items() if size.names() == {symbol.name}}
        value = max((-(-wanted[role] // max(1, step)) for role, step in each.items()), default=1)
        fitting = max(1, symbol.lo, value)
        out[symbol.name] = min(-(-fitting // symbol.multiple), symbol.hi // symbol.multiple) * symbol.multiple
    return with_keys(program, form, out)


def with_keys(program: Program, form: Form, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes with as many keys as tokens at least."""
    out = dict(sizes)
    tokens, keys = (b.shape[0 if form.kind == PACKED else 2] for b in operands(program, form)[:2])
    for symbol in program.symbols:
        if keys == Index.of(symbol.name) and out[symbol.name] < (least := tokens.evaluate(out)):
            out[symbol.name] = -(-least // symbol.multiple) * symbol.multiple
    return out


def tile_of(program: Program) -> int:
    """Keys of a tile, which an attention walks one after the other."""
    kernel = program.steps[0]
    assert isinstance(kernel, Kernel)
    return dict(kernel.schedule.tiles)[kernel.schedule.loop[0]] if kernel.schedule is not None else _KEYS


def told(program: Program, form: Form, symbols: Mapping[str, int]) -> tuple[str, int, bool] | None:
    """The buffer that says which keys a row sees, the largest of its integers (the least is 0), and whether they ascend."""
    q, k, _, *further = operands(program, form)
    if form.operands == 3:
        return None
    tokens, keys = (b.shape[0 if form.kind == PACKED else 2].evaluate(symbols) for b in (q, k))
    return further[0].name, keys if form.kind in (FULL, PACKED) else max(0, keys - tokens), form.kind == PACKED
