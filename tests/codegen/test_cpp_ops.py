"""Every operation of ir/ops.py in every dtype that it accepts, in C++ at every level, against the interpreter."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from flagtree.codegen.cpp import generate
from flagtree.ir.dtypes import DTYPES
from flagtree.ir.evaluate import torch_dtype
from flagtree.ir.ops import OPS
from flagtree.ir.text import parse_program
from tests.codegen.cpp_runner import check_exact, reference, run, same_bits

DT = ("b1", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")
KIND = {"float": "f", "int": "i", "uint": "i", "bool": "b"}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 1e-38, 3e38, -3e38, 7e4, 1e-6,
           6e-8, 3e-5, 65504.0, 65520.0, 8388607.5, -8388609.0, 2147483647.0, 0.3, 1e9]  # fmt: skip


def values(dtype: str, count: int, seed: int) -> torch.Tensor:
    """Ordinary, special and extreme values of a dtype."""
    g = torch.Generator().manual_seed(seed)
    d = DTYPES[dtype]
    if d.kind == "bool":
        return torch.randint(0, 2, (count,), generator=g).bool()
    if d.is_float:
        x = torch.randn(count, generator=g, dtype=torch.float64) * torch.exp(4 * torch.randn(count, generator=g, dtype=torch.float64))
        special = torch.tensor(SPECIAL, dtype=torch.float64)
        x[torch.randint(0, count, (count // 3,), generator=g)] = special[torch.randint(0, len(SPECIAL), (count // 3,), generator=g)]
        return x.to(torch_dtype(dtype))
    info = torch.iinfo(torch_dtype(dtype))
    x = torch.randint(max(info.min, -(2**62)), min(info.max, 2**62), (count,), generator=g).to(torch_dtype(dtype))
    few = torch.tensor([info.min, info.max, 0, 1, 2, 3, 7, info.max - 1, -1 if info.min else 5], dtype=torch.int64).to(torch_dtype(dtype))
    x[::3] = few[torch.randint(0, len(few), (len(x[::3]),), generator=g)]
    return x


def elementwise(op: str, dtype: str, arity: int, result: str) -> str:
    names = ["a", "b", "c"][:arity]
    types = ["b1", dtype, dtype] if op == "where" else [dtype] * arity
    buffers = "".join(f"  buffer {n}: {t}[n0] input\n" for n, t in zip(names, types, strict=True))
    loads = "".join(f"    v{n}: {t} = load {n}[i0]\n" for n, t in zip(names, types, strict=True))
    return f"""program p
  symbol n0 in 0..10000000 from dim a 0
{buffers}  buffer y: {result}[n0] temp
  kernel k {{i0 < n0}} numerics(eager, contract=off, acc=f32)
{loads}    r: {result} = {op} {", ".join("v" + n for n in names)}
    store y[i0] = r
  outputs y
"""


# torch's own are not exact here: fmod of a large quotient is NaN in its vector code, sqrt of f64 is MKL's
NUMPY = {"fmod": numpy.fmod, "sqrt": numpy.sqrt, "rsqrt": lambda x: 1 / numpy.sqrt(x)}
CASES = [
    (op.name, d) for op in OPS.values() for d in DT
    if KIND[DTYPES[d].kind] in op.kinds and op.name not in ("cast", "bitcast")
]  # fmt: skip


def operand_tensors(op: str, dtype: str, count: int) -> dict[str, torch.Tensor]:
    out = {n: values(dtype, count, seed) for n, seed in zip("abc"[: OPS[op].arity], (1, 2, 3), strict=False)}
    if op == "where":
        out["a"] = values("b1", count, 4)
    if op in ("floordiv", "mod", "truncdiv") or (op == "fmod" and not DTYPES[dtype].is_float):
        out["b"][out["b"] == 0] = 3
    if op in ("shl", "shr"):
        out["b"] = torch.randint(0, DTYPES[dtype].bits, (count,)).to(torch_dtype(dtype))
    return out


def ulps(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest distance in units of b's last place, NaN and inf demanded at the same places."""
    finite = b.isfinite() & a.isfinite()
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a[~finite], b[~finite]) or torch.equal(a[~finite].nan_to_num(7), b[~finite].nan_to_num(7))
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    place = (torch.nextafter(b.abs().float(), torch.tensor(math.inf)) - b.abs().float()).double() if b.dtype == torch.float32 else None
    if b.dtype == torch.float64:
        place = torch.nextafter(b.abs(), torch.tensor(math.inf, dtype=torch.float64)) - b.abs()
    if place is None:
        bits = 11 if b.dtype == torch.float16 else 8
        tiny = 2.0 ** (-14 if b.dtype == torch.float16 else -126)
        place = torch.exp2(torch.floor(torch.log2(b.abs().double().clamp_min(tiny))) - (bits - 1))
    return float(((a.double() - b.double()).abs() / place).max())


# the plain run: every op in one or two dtypes, over all ops each dtype; the whole table in the full campaign
SAMPLE = [
    case if case[1] == "f32" or k % 5 == 0 or case[0] == "where" else pytest.param(*case, marks=pytest.mark.full)
    for k, case in enumerate(CASES)
]  # fmt: skip


@pytest.mark.parametrize(("op", "dtype"), SAMPLE, ids=str)
def test_elementwise(op: str, dtype: str) -> None:
    result = "b1" if OPS[op].result == "b1" else dtype
    text = elementwise(op, dtype, OPS[op].arity, result)
    inputs = operand_tensors(op, dtype, 517)
    if op in NUMPY and DTYPES[dtype].is_float:
        wide = [t.double().numpy() if dtype == "f64" else t.float().numpy() for t in inputs.values()]
        with numpy.errstate(all="ignore"):
            truth = torch.from_numpy(NUMPY[op](*wide)).to(torch_dtype(dtype))
        assert same_bits(run(text, inputs, {"n0": 517}, shift=1)["y"], truth)
    elif OPS[op].exact:
        check_exact(text, inputs, {"n0": 517}, shift=1)
    else:
        ours, theirs = run(text, inputs, {"n0": 517}, shift=1)["y"], reference(text, inputs, {"n0": 517})["y"]
        assert ulps(ours, theirs) <= (5 if dtype in ("f32", "f64") else 1)


CASTS = [(a, b) for a, b in itertools.product(DT, DT) if a != b]


@pytest.mark.parametrize("source", DT)
def test_cast(source: str) -> None:
    for target in DT:
        x = values(source, 517, 5)
        if DTYPES[source].is_float and not DTYPES[target].is_float and target != "b1":
            top = float(torch.iinfo(torch_dtype(target)).max) / 2  # beyond the range the result is undefined
            x = x.double().nan_to_num(0, 0, 0).clamp(-top if target != "u8" else 0, top).to(x.dtype).nan_to_num(0, 0, 0)
        check_exact(elementwise("cast", source, 1, target), {"a": x}, {"n0": 517})


@pytest.mark.parametrize(("source", "target"), [("f32", "i32"), ("i32", "f32"), ("f64", "i64"), ("i64", "f64"), ("bf16", "i16"),
                                                ("i16", "bf16"), ("f16", "i16"), ("i16", "f16"), ("i8", "u8"), ("u8", "i8")])  # fmt: skip
def test_bitcast(source: str, target: str) -> None:
    check_exact(elementwise("bitcast", source, 1, target), {"a": values(source, 517, 6)}, {"n0": 517})


def test_every_bf16_stays_a_nan_or_rounds_as_it_should() -> None:
    """Where all floats come from bf16 memory, rounding does not look for NaN (`cpp.py`): every pattern, through arithmetic and without."""
    text = """program p
  buffer a: bf16[65536] input
  buffer y: bf16[65536] temp
  buffer z: bf16[65536] temp
  kernel k {i0 < 65536} numerics(eager, contract=off, acc=f32)
    v0: bf16 = load a[i0]
    v1: f32 = cast v0
    v2: f32 = mul v1, 1.1
    v3: bf16 = cast v2
    store y[i0] = v3
    v4: bf16 = cast v1
    store z[i0] = v4
  outputs y, z
"""
    a = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert "#define CLEAN_NANS 1" in generate(parse_program(text), "0" * 64)
    check_exact(text, {"a": a})
    assert "#define CLEAN_NANS 0" in generate(parse_program(text.replace("a: bf16", "a: f32").replace("v0: bf16", "v0: f32")), "0" * 64)
