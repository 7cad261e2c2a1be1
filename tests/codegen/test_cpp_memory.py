"""How C++ kernels touch memory: strides, offsets, broadcasts, masks, gathers, scatters, tails, zero extents, guard pages."""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch

from flagtree.codegen.cpp import generate
from flagtree.errors import CodegenError
from flagtree.ir.canonical import digest, isolate
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.program import Kernel
from flagtree.ir.text import parse_program, print_program
from flagtree.runtime.cpu import levels
from tests.codegen.cpp_runner import check_close, check_exact, function, reference, run, same_bits

SIZES = (0, 1, 15, 16, 17, 33, 4095, 4096, 4097)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pointwise(dtype: str) -> str:
    return f"""program p
  symbol n0 in 0..100000 from dim a 0
  buffer a: {dtype}[n0] input
  buffer b: {dtype}[n0] input
  buffer y: {dtype}[n0] temp
  kernel k {{i0 < n0}} numerics(eager, contract=off, acc=f32)
    v0: {dtype} = load a[i0]
    v1: {dtype} = load b[i0]
    v2: {dtype} = add v0, v1
    store y[i0] = v2
  outputs y
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_large_outputs_go_past_the_caches(dtype: torch.dtype, shift: int) -> None:
    """Whole lines where the address lets it, by ordinary stores elsewhere; a small launch of the same kernel does not."""
    name = "f32" if dtype == torch.float32 else "bf16"
    text = pointwise(name).replace("100000", "100000000")
    program = parse_program(text)
    source = generate(isolate(program, program.steps[0]).program, "0" * 64)
    assert "store_past" in source
    assert "settle_stores(b2_large)" in source
    for size in ((16 << 20) // dtype.itemsize + 37, 1003):
        a, b = randn(size).to(dtype), randn(size, seed=1).to(dtype)
        check_exact(text, {"a": a, "b": b}, {"n0": size}, shift)


def test_an_output_that_is_read_again_stays_in_the_caches() -> None:
    text = pointwise("f32").replace("100000", "100000000").replace("load b[i0]", "load y[i0]")
    text = text.replace("y: f32[n0] temp", "y: f32[n0] state").replace("  buffer b: f32[n0] input\n", "")
    program = parse_program(text)
    assert "store_past" not in generate(isolate(program, program.steps[0]).program, "0" * 64)


RESIDUAL = """program p
  symbol n0 in 0..{rows} from dim a 0
  buffer a: {dtype}[n0, {width}] input
  buffer b: {dtype}[n0, {width}] input
  buffer s: {dtype}[n0, {width}] temp
  buffer y: f32[n0, {width}] temp
  kernel k {{i0 < n0}} reduce {{r0 < {width}}} numerics(eager, contract=off, acc=f32)
    v0: {dtype} = load a[i0, r0]
    v1: {dtype} = load b[i0, r0]
    v2: {dtype} = add v0, v1
    store s[i0, r0] = v2
    v3: f32 = cast v2
    v4: f32 = max v3 over r0
    v5: f32 = sub v3, v4
    store y[i0, r0] = v5
  outputs s, y
"""


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("width", [1, 70, 4096])
def test_a_later_sweep_reads_what_an_earlier_one_stored(dtype: str, width: int) -> None:
    """Instead of both addends again; not where the store may go past the caches."""
    text = RESIDUAL.format(dtype=dtype, width=width, rows=100)
    program = parse_program(text)
    source = generate(isolate(program, program.steps[0]).program, "0" * 64)
    assert "(b2 + " in source.split("v4_all")[-1]
    assert source.count("v4_row") == source.count("v2_row") == 0
    for shift in (0, 1):
        a, b = (randn(5, width, seed=k).to(torch_dtype(dtype)) for k in (1, 2))
        a[0, 0], b[1, 0] = math.nan, math.inf
        check_exact(text, {"a": a, "b": b}, {"n0": 5}, shift)
    program = parse_program(RESIDUAL.format(dtype=dtype, width=4096, rows=1000000))
    assert "(b2 + " not in generate(isolate(program, program.steps[0]).program, "0" * 64).split("v4_all")[-1]


def test_what_is_stored_along_lanes_but_equal_in_them_is_computed_again() -> None:
    text = RESIDUAL.format(dtype="f32", width=70, rows=100).replace("{i0 < n0} reduce {r0 < 70}", "{i0 < n0} reduce {r1 < 3, r0 < 70}")
    text = text.replace("[n0, 70]", "[n0, 3, 70]").replace("[i0, r0]", "[i0, r1, r0]").replace("over r0", "over r1, r0")
    text = text.replace("load a[i0, r1, r0]", "load a[i0, r1, 0]").replace("load b[i0, r1, r0]", "load b[i0, r1, 1]")
    a, b = randn(5, 3, 70), randn(5, 3, 70, seed=1)
    check_exact(text, {"a": a, "b": b}, {"n0": 5})


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_misaligned_pointers(size: int) -> None:
    for dtype in ("f32", "bf16", "i64"):
        kind = {"f32": torch.float32, "bf16": torch.bfloat16, "i64": torch.int64}[dtype]
        inputs = {"a": (10 * randn(size, seed=1)).to(kind), "b": (10 * randn(size, seed=2)).to(kind)}
        for shift in (0, 1, 3):
            check_exact(pointwise(dtype), inputs, {"n0": size}, shift)


@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_is_touched_beyond_a_page(at_end: bool) -> None:
    """Buffers that end (or start) exactly at a page that may not be touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE

    def guarded(source: torch.Tensor) -> tuple[mmap.mmap, int]:
        size = source.numel() * source.element_size()
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        address = base + page + (pages * page - size if at_end else 0)
        ctypes.memmove(address, source.data_ptr(), size)
        for guard in (base, base + (pages + 1) * page):
            assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
        return memory, address

    cases = ((pointwise("f32"), "ab", torch.float32), (pointwise("bf16"), "ab", torch.bfloat16), (ROTARY, "xcs", torch.float32))
    for text, names, kind in cases:
        program = parse_program(text)
        kernel = program.steps[0]
        assert isinstance(kernel, Kernel)
        alone = isolate(program, kernel)
        for size in (1, 7, 16, 19, 35):
            shapes = {"x": (size, 2, 128), "c": (size, 128), "s": (size, 128)}
            inputs = {n: randn(*shapes.get(n, (size,)), seed=3).to(kind) for n in names}
            want = reference(text, inputs, {"n0": size})["y"]
            for level in levels():
                held = {n: guarded(inputs.get(n, torch.zeros_like(want))) for n in alone.buffers}
                pointers = (ctypes.c_void_p * len(held))(*(address for _, address in held.values()))
                function(print_program(alone.program), level)(pointers, (ctypes.c_int64 * 1)(size))
                got = torch.empty_like(want)
                ctypes.memmove(got.data_ptr(), held["y"][1], got.numel() * got.element_size())
                assert same_bits(got, want)


ROTARY = """program p
  symbol n0 in 0..4096 from dim x 0
  buffer x: f32[n0, 2, 128] input
  buffer c: f32[n0, 128] input
  buffer s: f32[n0, 128] input
  buffer y: f32[n0, 2, 128] temp
  kernel k {i0 < n0, i1 < 2, i2 < 128} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1, i2]
    v1: f32 = load c[i0, i2]
    v2: f32 = mul v0, v1
    v3: i64 = index i2
    v4: b1 = lt v3, 64
    v5: f32 = load x[i0, i1, (i2 + 64) % 128]
    v6: f32 = neg v5
    v7: f32 = where v4, v6, v5
    v8: f32 = load s[i0, i2]
    v9: f32 = mul v7, v8
    v10: f32 = add v2, v9
    store y[i0, i1, i2] = v10
  outputs y
"""


def test_rotary_is_two_straight_loops() -> None:
    x, c, s = randn(5, 2, 128, seed=1), randn(5, 128, seed=2), randn(5, 128, seed=3)
    got = check_exact(ROTARY, {"x": x, "c": c, "s": s}, {"n0": 5})["y"]
    turned = torch.cat((-x[..., 64:], x[..., :64]), -1)
    torch.testing.assert_close(got, x * c[:, None] + turned * s[:, None])
    source = generate(parse_program(ROTARY), "0" * 64)
    code = source[source.index("static void rows") :]
    assert code.count("const auto step") == 2
    assert "%" not in code.replace("% 2;", "").replace("rest %", "").replace("thread", "")
    assert "select" not in code


CAT = """program p
  symbol n0 in 0..4096 from dim a 0
  symbol n1 in 1..64 from dim a 1
  symbol n2 in 1..64 from dim b 1
  buffer a: f32[n0, n1] input
  buffer b: f32[n0, n2] input
  buffer y: f32[n0, n1 + n2] temp
  kernel k {i0 < n0, i1 < n1 + n2} numerics(eager, contract=off, acc=f32)
    v0: i64 = index i1
    v1: i64 = index n1
    v2: b1 = lt v0, v1
    v3: f32 = load a[i0, i1] if v2 else 0.0
    v4: b1 = not v2
    v5: f32 = load b[i0, i1 - n1] if v4 else 0.0
    v6: f32 = where v2, v3, v5
    store y[i0, i1] = v6
  outputs y
"""


def test_masked_concatenation_at_a_symbolic_place() -> None:
    for n1, n2 in ((1, 1), (5, 20), (16, 16), (33, 3)):
        a, b = randn(4, n1), randn(4, n2, seed=1)
        got = check_exact(CAT, {"a": a, "b": b}, {"n0": 4, "n1": n1, "n2": n2})["y"]
        assert torch.equal(got, torch.cat((a, b), 1))
    source = generate(parse_program(CAT), "0" * 64)
    assert "load_where" not in source[source.index("static void rows") :]


MASKED = """program p
  symbol n0 in 0..4096 from dim a 0
  buffer a: f32[n0] input
  buffer m: b1[n0] input
  buffer y: f32[n0] state
  kernel k {i0 < n0} numerics(eager, contract=off, acc=f32)
    v0: b1 = load m[i0]
    v1: f32 = load a[i0] if v0 else -7.5
    v2: f32 = load y[i0]
    v3: f32 = add v1, v2
    store y[i0] = v3 if v0
  outputs y
"""


def test_masks_that_are_data() -> None:
    for size in (1, 16, 50):
        for share in (0.0, 0.5, 1.0):
            mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < share
            check_exact(MASKED, {"a": randn(size), "m": mask, "y": randn(size, seed=5)}, {"n0": size})


def test_strided_transposed_and_broadcast_views() -> None:
    text = """program p
  symbol n0 in 0..512 from dim a 0
  symbol n1 in 0..512 from dim a 1
  buffer a: f32[n0, n1] input strides(1, n0)
  buffer b: f32[n1] input strides(3)
  buffer c: f32[n0, 1] input
  buffer y: f32[n0, n1] temp
  kernel k {i0 < n0, i1 < n1} numerics(eager, contract=off, acc=f32)
    v0: f32 = load a[i0, i1]
    v1: f32 = load b[i1]
    v2: f32 = load c[i0, 0]
    v3: f32 = mul v0, v1
    v4: f32 = sub v3, v2
    store y[i0, i1] = v4
  outputs y
"""
    for n0, n1 in ((1, 1), (3, 20), (40, 17), (64, 64)):
        inputs = {"a": randn(n1, n0).t(), "b": randn(3 * n1)[::3], "c": randn(n0, 1)}
        check_exact(text, inputs, {"n0": n0, "n1": n1})


GATHER = """program p
  symbol n0 in 0..4096 from dim ids 0
  symbol n1 in 1..1000 from dim w 0
  symbol n2 in 1..300 from dim w 1
  buffer ids: i64[n0] input
  buffer w: bf16[n1, n2] weight
  buffer y: bf16[n0, n2] temp
  kernel k {i0 < n0, i1 < n2} numerics(eager, contract=off, acc=f32)
    v0: i64 = load ids[i0]
    v1: bf16 = load w[v0, i1]
    store y[i0, i1] = v1
  outputs y
"""


def test_embedding_gathers_rows() -> None:
    for tokens, width in ((1, 1), (5, 64), (7, 33)):
        ids = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(width))
        check_exact(GATHER, {"ids": ids, "w": randn(50, width).bfloat16()}, {"n0": tokens, "n1": 50, "n2": width})


def test_gather_within_lanes_under_a_mask() -> None:
    text = """program p
  symbol n0 in 0..4096 from dim t 0
  symbol n1 in 1..1000 from dim x 1
  buffer t: i64[n0] input
  buffer x: f32[n0, n1] input
  buffer y: f32[n0] temp
  kernel k {i0 < n0} numerics(eager, contract=off, acc=f32)
    v0: i64 = load t[i0]
    v1: b1 = ne v0, -100
    v2: f32 = load x[i0, v0] if v1 else 0.0
    v3: f32 = neg v2
    store y[i0] = v3
  outputs y
"""
    for size in (1, 16, 45):
        t = torch.randint(0, 30, (size,), generator=torch.Generator().manual_seed(size))
        t[::3] = -100
        check_exact(text, {"t": t, "x": randn(size, 30)}, {"n0": size, "n1": 30})


def scatter(mode: str, dtype: str) -> str:
    return f"""program p
  symbol n0 in 0..4096 from dim ids 0
  symbol n1 in 1..1000 from dim y 0
  buffer ids: i64[n0] input
  buffer x: {dtype}[n0, 5] input
  buffer y: {dtype}[n1, 5] state
  kernel k {{i0 < n0, i1 < 5}} numerics(eager, contract=off, acc=f32)
    v0: i64 = load ids[i0]
    v1: {dtype} = load x[i0, i1]
    v2: b1 = ge v0, 0
    store{mode} y[v0, i1] = v1 if v2
  outputs y
"""


@pytest.mark.parametrize(("mode", "dtype"), [("", "f32"), (".add", "f32"), (".add", "i64"), (".max", "f32"), (".add", "bf16")])
def test_scatter_with_repeated_targets(mode: str, dtype: str) -> None:
    kind = {"f32": torch.float32, "i64": torch.int64, "bf16": torch.bfloat16}[dtype]
    ids = torch.tensor([3, 0, -1, 3, 3, 7, 0, 9] * 6)
    if not mode:
        ids = torch.randperm(48, generator=torch.Generator().manual_seed(0))
        ids[5] = -1
    x, y = torch.randint(-4, 5, (48, 5), generator=torch.Generator().manual_seed(1)).to(kind), torch.zeros(48, 5, dtype=kind)
    check_exact(scatter(mode, dtype), {"ids": ids, "x": x, "y": y}, {"n0": 48, "n1": 48})


def test_update_repeats_only_over_axes_it_depends_on() -> None:
    text = """program p
  symbol n0 in 0..512 from dim x 0
  symbol n1 in 0..512 from dim x 1
  buffer x: f32[n0, n1] input
  buffer c: f32[n0] input
  buffer y: f32[n0, n1] temp
  buffer z: f32[n0] state
  kernel k {i0 < n0, i1 < n1} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, i1]
    v1: f32 = load c[i0]
    v2: f32 = mul v0, v1
    store y[i0, i1] = v2
    store.add z[i0] = v1
  outputs y, z
"""
    check_exact(text, {"x": randn(5, 40), "c": randn(5), "z": randn(5, seed=2)}, {"n0": 5, "n1": 40})


@pytest.mark.parametrize("mode", ["add", "max"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "i64", "f64"])
def test_rows_of_neighbours_are_updated_in_order(mode: str, dtype: str) -> None:
    text = f"""program p
  buffer ids: i64[9] input
  buffer x: {dtype}[9, 77] input
  buffer y: {dtype}[4, 77] state
  kernel k {{i0 < 9, i1 < 77}} numerics(eager, contract=off, acc=f32)
    v0: i64 = load ids[i0]
    v1: b1 = ge v0, 0
    v2: b1 = lt v0, 4
    v3: b1 = and v1, v2
    v4: {dtype} = load x[i0, i1]
    store.{mode} y[v0, i1] = v4 if v3
  outputs y
"""
    ids = torch.tensor([3, 0, -1, 3, 3, 7, 0, 2, 3])
    check_exact(text, {"ids": ids, "x": (randn(9, 77) * 9).to(torch_dtype(dtype)), "y": randn(4, 77, seed=2).to(torch_dtype(dtype))})


def test_kernel_of_one_point() -> None:
    text = """program p
  symbol n0 in -50..1000 from scalar s
  buffer s: i64[] scalar
  buffer a: f32[1, 1] input
  buffer y: f32[] temp
  kernel k {} numerics(eager, contract=off, acc=f32)
    v0: f32 = load a[0, 0]
    v1: i64 = index 3*n0 - 1
    v2: f32 = cast v1
    v3: f32 = mul v0, v2
    store y[] = v3
  outputs y
"""
    assert run(text, {"a": torch.tensor([[2.0]])}, {"n0": 7})["y"].item() == 40.0


def test_index_values_with_division_on_lanes() -> None:
    text = """program p
  symbol n0 in 0..8192 from dim y 0
  buffer y: i64[n0] temp
  buffer z: f32[n0] temp
  kernel k {i0 < n0} numerics(eager, contract=off, acc=f32)
    v0: i64 = index 5*(i0 // 7) + (3*i0 + 1) % 11 - 2
    store y[i0] = v0
    v1: i64 = index i0
    v2: i64 = mul v1, 3
    v3: f32 = cast v2
    store z[i0] = v3
  outputs y, z
"""
    for size in (1, 40, 4097):
        check_exact(text, {}, {"n0": size})


def test_causal_mask_from_positions() -> None:
    text = """program p
  symbol n0 in 1..512 from dim x 0
  buffer x: f32[n0, n0] input
  buffer y: f32[n0, n0] temp
  kernel k {i0 < n0} reduce {r0 < n0} numerics(eager, contract=off, acc=f32)
    v0: f32 = load x[i0, r0]
    v1: i64 = index r0
    v2: i64 = index i0
    v3: b1 = le v1, v2
    v4: f32 = where v3, v0, -inf
    v5: f32 = max v4 over r0
    v6: f32 = sub v4, v5
    v7: f32 = exp v6
    v8: f32 = sum v7 over r0
    v9: f32 = div v7, v8
    store y[i0, r0] = v9
  outputs y
"""
    for size in (1, 16, 37, 130):
        x = randn(size, size)
        got = check_close(text, {"x": x}, {"n0": size})["y"]
        truth = torch.softmax(x.masked_fill(torch.ones(size, size).triu(1).bool(), -math.inf), -1)
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-6)


def test_threads_give_the_same_bits() -> None:
    text = ROTARY
    inputs = {"x": randn(300, 2, 128), "c": randn(300, 128), "s": randn(300, 128)}
    one = run(text, inputs, {"n0": 300})["y"]
    torch.set_num_threads(2)
    try:
        two = run(text, inputs, {"n0": 300})["y"]
        flat = run(pointwise("f32"), {"a": randn(100000), "b": randn(100000, seed=1)}, {"n0": 100000})["y"]
    finally:
        torch.set_num_threads(1)
    assert same_bits(one, two)
    assert torch.equal(flat, randn(100000) + randn(100000, seed=1))


def test_half_floats_walked_in_pairs_give_every_element() -> None:
    """bf16 only: even and odd elements in two vectors; with an f32 operand: plain."""
    paired = pointwise("bf16")
    plain = paired.replace("buffer b: bf16", "buffer b: f32").replace("v1: bf16 = load b[i0]", "w: f32 = load b[i0]\n    v1: bf16 = cast w")
    assert "load_pair" in generate(parse_program(paired), "0" * 64)
    assert "load_pair" not in generate(parse_program(plain), "0" * 64)
    for size in (*range(66), 127, 128, 129):
        a, b = randn(size, seed=1).bfloat16(), randn(size, seed=2).bfloat16()
        got = check_exact(paired, {"a": a, "b": b}, {"n0": size}, shift=1)["y"]
        assert same_bits(got, check_exact(plain, {"a": a, "b": b.float()}, {"n0": size})["y"])


def test_source_is_header_free_and_names_its_digest() -> None:
    program = parse_program(ROTARY)
    source = generate(program, digest(program))
    assert "#include" not in source
    assert digest(program) in source.split("\n")[0]
    assert "//     v10: f32 = add v2, v9" in source
    assert generate(program, digest(program)) == source


def test_float8_is_refused() -> None:
    text = pointwise("f32").replace("buffer a: f32", "buffer a: f8e5m2")
    with pytest.raises(CodegenError, match="f8e5m2"):
        generate(parse_program(text), "0" * 64)
