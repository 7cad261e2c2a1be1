"""C++ for the attention that `ir.attention` writes down: the keys are walked once in blocks, for up to ROWS rows that share a key head.

Each form says of a row which keys it sees, from one to another; the work is in templates/cpp_attention.h, that of many bf16 rows in
templates/cpp_attention_pairs.h.  `cpp.py` calls this for a kernel whose numerics leave roundings inside it free; bits are equal at every
level (docs/cpu.md).
"""

from __future__ import annotations

from typing import Any

from flagtree.codegen import cpp_ops as ops
from flagtree.errors import CodegenError
from flagtree.ir import attention
from flagtree.ir.attention import Form, group_of
from flagtree.ir.index import Index
from flagtree.ir.program import Buffer, Program

# rows of an instance: their sums stay in the second-level cache, and a key is read once for all of them
ROWS, PAIR_ROWS = 64, 128
FEW = 16  # rows up to which turning a block of keys over costs more than it saves
WEIGHT_ERROR = 2.0**-17  # of a weight in products of pairs, before it is rounded to bf16 (templates/cpp_attention_pairs.h, weight_of)
_TILE = 16  # rows, columns and words of a product of pairs (templates/cpp_pairs.h)
_PARTIALS = 16
_STEP = {"f32": _PARTIALS, "bf16": 2 * _PARTIALS}  # elements that one step along a head takes
_NAN = {"f32": "__builtin_nanf(\"\")", "bf16": "0x7fc0"}
_STEPS = {"f32": 7, "bf16": 3}  # steps whose sums fit the widest level's registers, for 4 rows

# what a mask does to a score, and to a vector of them
_MASKS = {"seen": "#define MASKED(score, m) ((m) ? (score) : -__builtin_inff())", "added": "#define MASKED(score, m) ((score) + (m))"}
_LANE_MASKS = {
    "seen": "#define MASKED(scores, m) select(widen_b1(m) != 0, scores, splat(-__builtin_inff()))",
    "added": "#define MASKED(scores, m) ((scores) + widen_bf16(m))",
}
# a position outside of the cache: eager refuses the call
_OUTSIDE = (
    "for (i64 r = 0; r < held; ++r)",
    "  for (i64 e = 0; e < WIDTH && results[r] && !inside[r]; ++e) results[r][e] = NOT_A_NUMBER;",
)


def context(program: Program) -> dict[str, Any]:
    """What templates/cpp_kernel.cpp.j2 needs, apart from names.  CodegenError for a kernel that is no such attention."""
    form = attention.form_of(program)
    if form is None or (dtype := program.buffers[-1].dtype) not in _STEP:
        raise CodegenError("only attention over f32 and bf16 leaves its roundings free", where=program.name)
    q, k, v, *where, out = attention.operands(program, form)
    packed = form.kind == attention.PACKED
    group, key_heads = group_of(q, k), k.shape[1]
    tokens, sequences = (q.shape[0], Index.of(1)) if packed else (q.shape[2], q.shape[0])
    depth, width = q.shape[-1].constant or 0, v.shape[-1].constant or 0
    few, pairs = _is_few(tokens, group), in_pairs(program, form)
    symbols = [f"const i64 {s.name} = symbols[{n}];" for n, s in enumerate(program.symbols)]
    keys = k.shape[0] if packed else k.shape[2]
    rows = PAIR_ROWS if pairs else ROWS
    blocks = f"(({tokens}) * {group} + {rows - 1}) / {rows}"
    return {
        "widest": 4, "partials": _PARTIALS, "clean_nans": int(pairs), "threads": True,
        "symbols": symbols, "after": [], "decode": [], "advance": [],
        "definitions": [
            f"#define ELEMENT {ops.memory(dtype)}", f"#define NOT_A_NUMBER {_NAN[dtype]}", f"#define SCALE {form.scale!r}f",
            f"#define ROWS {rows}", f"#define DEPTH {depth}", f"#define WIDTH {width}",
            *(_sizes_of_pairs(depth, width) if pairs else _sizes(dtype, depth, width, few)),
            *((f"#define MASK_ELEMENT {ops.memory(where[0].dtype)}", (_LANE_MASKS if pairs else _MASKS)[form.mask]) if form.mask else ()),
        ],
        "head": [
            *(f"const ELEMENT *const {n} = (const ELEMENT *)buffers[{_place(program, b)}];" for n, b in zip("qkv", (q, k, v), strict=True)),
            *(f"const {ops.memory(b.dtype)} *const where = (const {ops.memory(b.dtype)} *)buffers[{_place(program, b)}];" for b in where),
            f"ELEMENT *const out = (ELEMENT *)buffers[{_place(program, out)}];",
            *symbols,
            f"const i64 tokens = {tokens}, keys = {keys}, blocks = {blocks};",
        ],
        "body": _body(form, group, key_heads, (q, k, v, *where, out), pairs),
        "count": f"{blocks} * ({key_heads}) * ({sequences})", "work": f"({tokens}) * ({q.shape[1]}) * ({sequences}) * ({keys}) * {width}",
    }  # fmt: skip


def _sizes(dtype: str, depth: int, width: int, few: bool) -> list[str]:
    """Definitions for templates/cpp_attention.h."""
    step = _STEP[dtype]
    padded = _padded(width, step)
    return [
        f"#define TILE_DEPTH {step}", f"#define PART part_{dtype}", f"#define STORE_STEP store_step_{dtype}",
        f"#define KEYS_ALONG_LANES {int(not few)}", f"#define DEPTH_PADDED {_padded(depth, _PARTIALS)}", f"#define WIDTH_PADDED {padded}",
        f"#define WIDE_STEPS {_steps(padded // step, _STEPS[dtype])}",
    ]  # fmt: skip


def _sizes_of_pairs(depth: int, width: int) -> list[str]:
    """Definitions for templates/cpp_attention_pairs.h."""
    return [f"#define WORDS {_padded(depth, 2 * _TILE) // 2}", f"#define COLUMNS {_padded(width, _TILE)}"]


def in_pairs(program: Program, form: Form) -> bool:
    """Are rows many (or under a mask) and elements bf16, so that an isolated attention is made of products of pairs, its weights rounded
    to bf16?"""
    q, k, *_ = attention.operands(program, form)
    few = _is_few(q.shape[0 if form.kind == attention.PACKED else 2], group_of(q, k)) and not form.mask
    return q.dtype == "bf16" and not few


def _is_few(tokens: Index, group: int) -> bool:
    return tokens.constant is not None and tokens.constant * group <= FEW


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _steps(count: int, most: int) -> int:
    """As many of `count` steps at a time as registers hold, so that none are left over where that can be."""
    return max((n for n in range(1, most + 1) if count % n == 0 and n > most // 2), default=min(count, most))


def _place(program: Program, buffer: Buffer) -> int:
    return program.buffers.index(buffer)


def _body(form: Form, group: int, key_heads: Index, buffers: tuple[Buffer, ...], pairs: bool) -> list[str]:
    """One instance: which rows it has, what each sees, and the call."""
    q, k, v, *where, out = buffers
    packed = form.kind == attention.PACKED
    q_at, out_at = (_offset(b.layout, ("token", "head") if packed else order) for b, order in
                    ((q, ("sequence", "head", "token")), (out, ("sequence", "token", "head"))))  # fmt: skip
    k_at, v_at = (_offset(b.layout, (None, "key_head") if packed else ("sequence", "key_head")) for b in (k, v))
    k_row, v_row = (b.layout[0 if packed else 2] for b in (k, v))
    masks = ", masks" if form.mask else ""
    attend, tile = ("attend_pairs", _TILE) if pairs else ("attend_rows", 4)
    return [
        f"const i64 block = row % blocks, key_head = row / blocks % ({key_heads}), sequence = row / blocks / ({key_heads});",
        "const ELEMENT *queries[ROWS];",
        "ELEMENT *results[ROWS];",
        "i64 seen_from[ROWS], seen_to[ROWS], held = 0;",
        *(("const MASK_ELEMENT *masks[ROWS];",) if form.mask else ()),
        *(("bool inside[ROWS];",) if form.kind == attention.CACHED else ()),
        f"for (i64 place = block * ROWS; place < (block + 1) * ROWS && place < tokens * {group}; ++place, ++held) {{",
        f"  const i64 token = place / {group}, head = key_head * {group} + place % {group};",
        *(f"  {line}" for line in _seen(form, where)),
        *(("  inside[held] = seen_to[held] > token && seen_to[held] <= keys;",) if form.kind == attention.CACHED else ()),
        "  seen_to[held] = seen_to[held] < keys ? seen_to[held] : keys;",
        f"  queries[held] = q + {q_at};",
        f"  results[held] = out + {out_at};",
        *((f"  masks[held] = where + {_mask_at(where[0])};",) if form.mask else ()),
        "}",
        "// whole tiles: rows that see nothing and are not stored",
        f"for (; held % {tile}; ++held) queries[held] = queries[held - 1], results[held] = 0, seen_from[held] = seen_to[held] = 0"
        f"{', masks[held] = masks[held - 1]' if form.mask else ''};",
        f"{attend}(queries, k + {k_at}, {k_row}, v + {v_at}, {v_row}, seen_from, seen_to, held, results{masks});",
        *(_OUTSIDE if form.kind == attention.CACHED else ()),
    ]


def _seen(form: Form, where: list[Buffer]) -> list[str]:
    """The keys seen_from[held]..seen_to[held]-1 that a token sees."""
    if form.kind == attention.FULL:
        end = _element(where[0], "sequence") if form.limited else "keys"
        own = ("if (seen_to[held] > token) seen_to[held] = token + 1;",) if form.causal else ()
        return [f"seen_from[held] = 0, seen_to[held] = {end};", *own]
    if form.kind == attention.CACHED:
        first = f"seen_from[held] = {f'seen_to[held] > {form.window} ? seen_to[held] - {form.window} : 0' if form.window else '0'};"
        return [f"seen_to[held] = {_element(where[0], 'sequence')} + token + 1;", first]
    low_bound = _element(where[0], "low")
    return [
        f"const i64 bounds = {where[0].shape[0]};",
        "i64 low = 0;  // the first bound behind the token",
        f"for (i64 high = bounds, middle; low < high; {_element(where[0], 'middle')} <= token ? low = middle + 1 : high = middle) "
        "middle = (low + high) / 2;",
        "seen_from[held] = seen_to[held] = 0;",
        f"if (low > 0 && low < bounds) seen_to[held] = {'token + 1' if form.causal else low_bound}, --low, seen_from[held] = {low_bound};",
    ]


def _element(buffer: Buffer, at: str) -> str:
    return f"where[{at} * ({buffer.layout[0]})]"


def _mask_at(mask: Buffer) -> str:
    names = ("sequence", "head", "token")[4 - len(mask.shape) :]
    along = zip(names, mask.layout[:-1], mask.shape[:-1], strict=True)
    return " + ".join(f"{name} * ({stride})" for name, stride, extent in along if extent.constant != 1) or "0"


def _offset(layout: tuple[Index, ...], along: tuple[str | None, ...]) -> str:
    return " + ".join(f"{name} * ({stride})" for name, stride in zip(along, layout, strict=False) if name is not None) or "0"
