"""Every rule of the verifier has a program that breaks it, and only it is named; well-formed programs pass, and fast."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest

from flagtree.errors import IRError
from flagtree.ir import element_rules, kernel_rules, program_rules
from flagtree.ir.program import Kernel, Program, Repeat
from flagtree.ir.text import parse_program
from flagtree.ir.verify import RULES, verify
from tests.work import calls

GOOD = """program p
  symbol n in 1..64 from dim x 0
  symbol m in 8..64 multiple 8 from dim x 1
  buffer x: f32[n, m] input
  buffer w: f32[m] weight
  buffer t: i64[n] input
  buffer one: f32[m] weight
  buffer c: f32[n, m] state
  buffer v: f32[m] state alias c + 0
  buffer h: f32[n, m] temp
  buffer f: f32[n, m] temp
  buffer y: f32[2*n, m] temp
  kernel k0 {i < n} reduce {r < m} numerics(eager, contract=off, acc=f32)
    schedule lane=r tiles(r=64) loop() warps=4 stages=1
    a: f32 = load x[i, r]
    s: f32 = sum a over r
    b: f32 = mul a, s
    store h[i, r] = b
  kernel k1 {i < n, j < m} numerics(eager, contract=off, acc=f32)
    d: i64 = load t[i]
    e: f32 = load x[d, j]
    p: i64 = index j - 1
    q: b1 = ge p, 0
    g: f32 = load w[j - 1] if q else 0.0
    z: f32 = add e, g
    store y[i, j] = z
    store y[i + n, j] = e
    u: f32 = load c[i, j]
    o: f32 = add u, 1.0
    store c[i, j] = o
  repeat layers 2 bind f = (h, h)
    kernel k2 {i < n, j < m} numerics(eager, contract=off, acc=f32)
      a: f32 = load f[i, j]
      store f[i, j] = a
  extern e0: () = aten.relu_.default(c) mutates(c) effect "state:c"
  outputs y, x
"""

BROKEN = {
    "unique-names": [
        ("buffer t: i64", "buffer x: i64"),
        ("p: i64 = index", "e: i64 = index"),
        ("kernel k1", "kernel k0"),
        ("{i < n}", "{m < n}"),
    ],
    "buffer-declared": [
        ("outputs y, x", "outputs y, zz"),
        ("load w[", "load ww["),
        ("relu_.default(c)", "relu_.default(cc)"),
        ("dim x 0", "dim xx 0"),
    ],
    "declared-well": [
        ("y: f32[2*n, m]", "y: f32[2*k, m]"),
        ("f: f32[n, m]", "f: f33[n, m]"),
        ("h: f32[n, m] temp", "h: f32[n, m] temp strides(1)"),
    ],
    "alias-declared": [("alias c + 0", "alias d + 0"), ("v: f32[m] state", "v: f16[m] state"), ("alias c", "alias v")],
    "symbol-in-range": [
        ("in 1..64 from", "in 9..8 from"),
        ("in 8..64 multiple 8", "in 9..15 multiple 8"),
        ("dim x 1", "dim x 2"),
        ("dim x 1", "scalar x"),
    ],
    "repeat-bindings": [
        ("f = (h, h)", "f = (h, h, h)"),
        ("f = (h, h)", "f = (h, y)"),
        ("f = (h, h)", "g = (h, h)"),
        ("f = (h, h)", "f = (h, z)"),
        ("f = (h, h)", "f = (h, h), f = (h, h)"),
        ("      store f[i, j] = a", "      store h[i, j] = a"),
    ],
    "ssa-defined": [("add e, g", "add z, g"), ("if q else", "if qq else"), ("y[i, j] = z", "y[i, j] = zz")],
    "reduce-before-use": [("    s: f32 = sum a over r\n    b: f32 = mul a, s", "    b: f32 = mul a, s\n    s: f32 = sum a over r")],
    "axis-bound": [("sum a over r", "sum a over q"), ("load x[i, r]", "load x[i, q]"), ("{r < m}", "{r < i}"), ("{r < m}", "{r < k}")],
    "rank-matches": [("load x[i, r]", "load x[i]")],
    "dtype-closed": [
        ("a: f32 = load x[i, r]", "a: f16 = load x[i, r]"),
        ("b: f32 = mul a, s", "b: f16 = mul a, s"),
        ("b: f32 = mul a, s", "b: f32 = mul a, s, s"),
        ("b: f32 = mul a, s", "b: f32 = and a, s"),
        ("b: f32 = mul a, s", "b: f32 = multiply a, s"),
        ("s: f32 = sum a", "s: f64 = sum a"),
        ("s: f32 = sum a", "s: f32 = argmax a"),
        ("s: f32 = sum a", "s: f32 = mean a"),
        ("s: f32 = sum a", "s: f32 = ordered.max a"),
        ("q: b1 = ge p, 0", "q: i64 = add p, 0"),
        ("p: i64 = index", "p: f32 = index"),
        ("store y[i, j] = z", "store y[i, j] = p"),
        ("store y[i, j] = z", "store y[e, j] = z"),
        ("s: f32 = sum a", "s: f32 = any a"),
        ("z: f32 = add e, g", "z: f32 = add e, d"),
        ("z: f32 = add e, g", "z: f32 = where e, e, g"),
        ("z: f32 = add e, g", "z: f32 = bitcast d"),
    ],
    "literal-fits": [
        ("else 0.0", "else true"),
        ("ge p, 0", "ge p, 0.5"),
        ("add u, 1.0", "add u, false"),
        ("ge p, 0", "ge p, 9223372036854775808"),
        ("ge p, 0", "ge 1, 0"),
    ],
    "reduce-axis-kind": [
        ("reduce {r < m}", "parallel {r < m}"),
        ("    s: f32 = sum a over r\n    b: f32 = mul a, s", "    b: f32 = mul a, a"),
        ("sum a over r", "sum a over "),
    ],
    "index-in-range": [
        ("load x[i, r]", "load x[i + 1, r]"),
        ("load x[i, r]", "load x[r, r]"),
        (" if q else 0.0", ""),
        ("ge p, 0", "ge p, -1"),
        ("ge p, 0", "le p, 0"),
        ("y[i + n, j]", "y[i + 2*n, j]"),
    ],
    "single-writer-per-element": [
        ("store h[i, r] = b", "store h[0, r] = b"),
        ("store y[i + n, j] = e", "store y[i, j] = e"),
        ("store y[i, j] = z", "store y[i, 0] = z"),
        ("store c[i, j] = o", "store v[j] = o"),
    ],
    "in-place-same-element": [
        ("u: f32 = load c[i, j]", "u: f32 = load c[0, j]"),
        ("u: f32 = load c[i, j]", "u: f32 = load v[j]"),
        ("    u: f32 = load c[i, j]\n    o: f32 = add u, 1.0\n    store c[i, j] = o", "    store c[i, j] = e\n    u: f32 = load c[i, j]"),
        ("u: f32 = load c[i, j]\n    o: f32 = add u, 1.0\n    store c[i, j] = o", "u: f32 = load v[j]\n    store v[j] = u"),
    ],
    "state-write-allowed": [
        ("store c[i, j] = o", "store.add one[j] = o"),
        ("store h[i, r]", "store x[i, r]"),
        ("default(c) mutates(c)", "default(w) mutates(w)"),
    ],
    "extern-dependence-complete": [
        ("mutates(c)", ""),
        ("mutates(c)", "mutates(c, x)"),
        ("e0: ()", "e0: (c)"),
        ('"state:c"', '"state"'),
        ('"state:c"', '"random"'),
    ],
    "write-before-read": [
        ("f = (h, h)", "f = (h, f)"),
        ("e: f32 = load x[d, j]", "e: f32 = load f[d, j]"),
        ("store h[i, r]", "store.add h[i, r]"),
    ],
    "output-defined": [("outputs y", "outputs f")],
    "numerics-explicit": [("eager", "quick"), ("acc=f32", "acc=bf16")],
    "schedule-fits": [
        ("lane=r", "lane=q"),
        ("tiles(r=64)", "tiles(q=64)"),
        ("r=64", "r=0"),
        ("loop()", "loop(j)"),
        ("warps=4", "warps=0"),
        ("r=64", "r=64, r=2"),
    ],
}


def test_the_good_program_passes() -> None:
    verify(parse_program(GOOD))


def test_every_rule_is_broken_here() -> None:
    assert set(BROKEN) == {r.name for r in RULES}


@pytest.mark.parametrize("module", [program_rules, kernel_rules, element_rules], ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_reason_of_a_rule_is_given_here(module: ModuleType) -> None:
    """Each sentence with which a check can refuse, read off its source, is the answer to one of the broken programs."""
    given = {why for changes in BROKEN.values() for old, new in changes for why in _reasons(GOOD.replace(old, new, 1))}
    given |= {why for program in _other_ways().values() for why in _reasons(program)}
    missing = [s for s in _sentences(module) if not any(re.fullmatch(s, why) for why in given)]
    assert not missing, "\n".join(missing)


def _reasons(program: Program | str) -> list[str]:
    with pytest.raises(IRError) as caught:
        verify(parse_program(program) if isinstance(program, str) else program)
    return [caught.value.why]


def _sentences(module: ModuleType) -> Iterator[str]:
    """Patterns of the texts that a module's functions yield or return as the reason of a refusal."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Yield | ast.Return):
            reason = node.value.elts[-1] if isinstance(node.value, ast.Tuple) else node.value
            for text in (reason.body, reason.orelse) if isinstance(reason, ast.IfExp) else (reason,):
                if isinstance(text, ast.JoinedStr):
                    yield "".join(re.escape(v.value) if isinstance(v, ast.Constant) else ".*" for v in text.values)
                elif isinstance(text, ast.Constant) and isinstance(text.value, str):
                    yield re.escape(text.value)


@pytest.mark.parametrize(("rule", "old", "new"), [(rule, *change) for rule, changes in BROKEN.items() for change in changes])
def test_a_broken_rule_is_named(rule: str, old: str, new: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    with pytest.raises(IRError) as caught:
        verify(parse_program(text))
    assert f"rule {rule} " in caught.value.what, str(caught.value)
    assert caught.value.where.startswith("program p, ")
    assert caught.value.why


@pytest.mark.parametrize(
    ("axes", "shape", "index"),
    [
        ("i < s, j < m", "s*m", "m*i + j"),  # mixed radix with a symbolic factor
        ("f < s*m", "s, m", "f // m, f % m"),
        ("f < 24*s", "s, 4, 6", "f // 24, f // 6 % 4, f % 6"),
        ("i < 4, j < 8", "32, 32", "i + 4*j, 8*i + j"),
        ("i < s", "2*s", "2*s - 1 - i"),
        ("i < s, j < 1", "s", "i"),
        ("i < s, j < 64", "s, 64", "i, (j + 32) % 64"),
    ],
)
def test_injective_stores(axes: str, shape: str, index: str) -> None:
    text = f"""program p
  symbol s in 1..64 from argument
  symbol m in 1..64 from argument
  buffer x: f32[64] input
  buffer y: f32[{shape}] temp
  kernel k {{{axes}}} numerics(eager, contract=off, acc=f32)
    p: i64 = index {" + ".join(a.split(" <")[0] for a in axes.split(", "))}
    a: f32 = cast p
    store y[{index}] = a
  outputs y
"""
    if "% 64" in index:
        with pytest.raises(IRError, match="single-writer"):  # a rotation is injective, but not proved: refused, not guessed
            verify(parse_program(text))
    else:
        verify(parse_program(text))


@pytest.mark.parametrize(
    ("mask", "index", "good"),
    [
        ("q: b1 = lt p, 5", "i", False),
        ("q: b1 = lt p, 4", "i", True),
        ("q0: b1 = lt p, 6\n    q1: b1 = ge p, 2\n    q: b1 = and q0, q1", "i - 2", True),
        ("q0: b1 = lt p, 6\n    q1: b1 = ge p, 2\n    q: b1 = or q0, q1", "i - 2", False),
        ("q0: b1 = ge p, 4\n    q: b1 = not q0", "i", True),
        ("p1: i64 = add p, 3\n    q: b1 = lt p1, 7", "i", True),
        ("p1: i64 = mul p, p\n    q: b1 = lt p1, 7", "i", False),
        ("q: b1 = eq p, 3", "i", True),
        ("q: b1 = ne p, 3", "i", False),
        ("q: b1 = gt 4, p", "i", True),
    ],
)
def test_masks_prove_ranges(mask: str, index: str, good: bool) -> None:
    text = f"""program p
  symbol n in 1..64 from argument
  buffer x: f32[4] input
  buffer y: f32[n] temp
  kernel k {{i < n}} numerics(eager, contract=off, acc=f32)
    p: i64 = index i
    {mask}
    a: f32 = load x[{index}] if q else 0.0
    store y[i] = a
  outputs y
"""
    if good:
        verify(parse_program(text))
    else:
        with pytest.raises(IRError, match="index-in-range"):
            verify(parse_program(text))


def test_two_stores_with_contradicting_masks() -> None:
    text = """program p
  buffer x: f32[8] input
  buffer y: f32[8] temp
  kernel k {i < 8} numerics(eager, contract=off, acc=f32)
    a: f32 = load x[i]
    p: i64 = index i
    q: b1 = lt p, 4
    r: b1 = RIGHT
    store y[i] = a if q
    store y[i] = a if r
  outputs y
"""
    for right in ("ge p, 4", "not q", "ge p, 5", "gt p, 7"):
        verify(parse_program(text.replace("RIGHT", right)))
    for right in ("ge p, 3", "lt p, 9"):
        with pytest.raises(IRError, match="single-writer"):
            verify(parse_program(text.replace("RIGHT", right)))


def test_a_race_of_reduced_points_in_place_is_refused() -> None:
    """Inside the sweep over both reduce axes, at an element that only one of them decides, the other one's points race."""
    text = """program p
  buffer x: f32[8] state
  buffer z: f32[8, 4] input
  kernel k reduce {i < 8, j < 4} numerics(eager, contract=off, acc=f32)
    a: f32 = load x[i]
    b: f32 = load z[i, j]
    s: f32 = sum b over i, j
    t: f32 = mul a, s
    store x[i] = t
  outputs x
"""
    with pytest.raises(IRError, match="rule in-place-same-element .*\n.*\n.*points of axis 'j' load"):
        verify(parse_program(text))
    verify(parse_program(text.replace("f32[8] state", "f32[8, 4] state").replace("x[i]", "x[i, j]")))


def _other_ways() -> dict[str, Program]:
    """What the text form cannot say, or the parser refuses before the verifier sees it."""
    good = parse_program(GOOD)
    kernel, layers = good.steps[0], good.steps[2]
    assert isinstance(kernel, Kernel) and isinstance(layers, Repeat)
    symbol, buffer, axis = good.symbols[0], good.buffers[0], kernel.axes[0]
    return {
        "not a name": good.with_(symbols=(replace(symbol, name="1n"), *good.symbols[1:])),
        "'pool' is no role": good.with_(buffers=(replace(buffer, role="pool"), *good.buffers[1:])),
        "'guess' is no source": good.with_(symbols=(replace(symbol, source=("guess", "x", 0)), *good.symbols[1:])),
        "count -1": good.with_(steps=(*good.steps[:2], replace(layers, count=-1))),
        "'min' is no store mode": _with_first(good, replace(kernel, body=(*kernel.body[:-1], replace(kernel.stores[0], mode="min")))),
        "axis 'i' is 'serial'": _with_first(good, replace(kernel, axes=(replace(axis, kind="serial"), *kernel.axes[1:]))),
    }


def _with_first(program: Program, step: Kernel) -> Program:
    return program.with_(steps=(step, *program.steps[1:]))


@pytest.mark.parametrize("reason", _other_ways())
def test_what_no_text_says_is_refused_too(reason: str) -> None:
    assert _reasons(_other_ways()[reason])[0].startswith(reason)


def test_a_race_of_parallel_points_in_place_is_refused() -> None:
    text = """program p
  buffer x: f32[8] state
  buffer z: f32[8, 4] temp
  kernel k {i < 8, j < 4} numerics(eager, contract=off, acc=f32)
    a: f32 = load x[i]
    store z[i, j] = a
    b: f32 = neg a
    store x[i] = b
  outputs z
"""
    with pytest.raises(IRError, match="points of axis 'j' load"):
        verify(parse_program(text))


def test_a_repeat_hides_no_alias() -> None:
    text = """program p
  buffer x: f32[8] state
  buffer y: f32[8] state
  buffer a: f32[8] temp
  buffer b: f32[8] temp
  repeat r 2 bind a = (x, y), b = (y, x)
    kernel k {i < 8} numerics(eager, contract=off, acc=f32)
      v: f32 = load a[i]
      store b[i] = v
  outputs x
"""
    verify(parse_program(text))
    for change in (("b = (y, x)", "b = (y, y)"), ("load a[i]", "load y[i]")):
        with pytest.raises(IRError, match="repeat-bindings"):
            verify(parse_program(text.replace(*change)))
    # what is only read may be bound twice
    verify(parse_program(text.replace("b = (y, x)", "b = (x, y)").replace("store b[i] = v", "w: f32 = load b[i]")))


def test_a_gemm_epilogue_is_checked() -> None:
    text = """program p
  buffer a: f16[8, 4] input
  buffer b: f16[6, 4] weight
  buffer y: f16[8, 6] temp
  template t: (y) = gemm(a, b) numerics(eager, contract=off, acc=f32)
    epilogue
      v: f16 = neg acc
      store y[i0, i1] = v
  outputs y
"""
    verify(parse_program(text))
    with pytest.raises(IRError, match="dtype-closed"):
        verify(parse_program(text.replace("v: f16 = neg", "v: f32 = neg")))


def test_work_is_linear_in_the_number_of_kernels() -> None:
    program = parse_program(GOOD)
    kernel = program.steps[1]
    assert isinstance(kernel, Kernel)
    work = []
    for count in (100, 400):  # 1000 take 0.5 to 0.7 s
        many = tuple(Kernel(f"m{i}", kernel.axes, kernel.body, kernel.numerics) for i in range(count))
        big = Program("big", program.symbols, program.buffers, (*program.steps, *many), program.outputs)
        verify(big)  # fills the caches of index arithmetic
        work.append(calls(lambda big=big: verify(big)))  # type: ignore[misc]
    assert work[1] < 4.2 * work[0]
