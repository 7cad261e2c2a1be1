"""Random kernel bodies (hypothesis, derandomised): C++ at every level against the interpreter."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagtree.ir.evaluate import torch_dtype
from tests.codegen.cpp_runner import check_close, check_exact
from tests.codegen.test_cpp_ops import values

FLOAT_OPS = ("add", "sub", "mul", "min", "max", "neg", "abs", "floor", "round", "copysign", "div")
INT_OPS = ("add", "sub", "mul", "min", "max", "and", "or", "xor", "neg", "not", "abs")
UNARY = ("neg", "abs", "floor", "round", "not")
COMPARISONS = ("lt", "le", "eq", "ne")
INDICES = {"a": ("i0", "i1"), "b": ("i1",), "c": ("i0",), "d": ("i1", "i0"), "e": ("i0", "i1")}
SHAPES = {"a": "n0, n1", "b": "n1", "c": "n0", "d": "n1, n0", "e": "n0, n1 + 5"}


class Body:
    """Grows a straight-line body; `names` by dtype."""

    def __init__(self, draw: st.DrawFn, second: str) -> None:
        self.draw, self.second, self.lines = draw, second, []
        self.names: dict[str, list[str]] = {}

    def define(self, dtype: str, text: str) -> str:
        name = f"v{sum(map(len, self.names.values()))}"
        self.lines.append(f"{name}: {dtype} = {text}")
        self.names.setdefault(dtype, []).append(name)
        return name

    def pick(self, dtype: str) -> str:
        return self.draw(st.sampled_from(self.names[dtype]))

    def load(self, buffer: str, dtype: str) -> None:
        index = [i.replace("i1", self.second) for i in INDICES[buffer]]
        if buffer == "e":
            index[-1] += f" + {self.draw(st.integers(0, 5))}"
        mask = ""
        if "b1" in self.names and self.draw(st.booleans()):
            mask = f" if {self.pick('b1')} else {self.draw(st.sampled_from(['0', '3']))}"
        if dtype.startswith(("f", "bf")) and mask:
            mask += ".0"
        self.define(dtype, f"load {buffer}[{', '.join(index)}]{mask}")

    def grow(self, dtype: str) -> None:
        kind = self.draw(st.sampled_from(("op", "op", "op", "compare", "where", "position", "load")))
        if kind == "load":
            self.load(self.draw(st.sampled_from(list(INDICES))), dtype)
        elif kind == "position":
            k = self.draw(st.integers(-3, 40))
            axis = self.draw(st.sampled_from(["i0", self.second]))
            position = self.define("i64", f"index {axis}" + (f" + {k}" if k >= 0 else f" - {-k}"))
            self.define("b1", f"lt {position}, {self.draw(st.integers(0, 60))}")
        elif kind == "compare":
            self.define("b1", f"{self.draw(st.sampled_from(COMPARISONS))} {self.pick(dtype)}, {self.pick(dtype)}")
        elif kind == "where" and "b1" in self.names:
            self.define(dtype, f"where {self.pick('b1')}, {self.pick(dtype)}, {self.pick(dtype)}")
        else:
            op = self.draw(st.sampled_from(FLOAT_OPS if dtype.startswith(("f", "bf")) else INT_OPS))
            self.define(dtype, f"{op} {self.pick(dtype)}" + ("" if op in UNARY else f", {self.pick(dtype)}"))


def program(body: Body, dtype: str, out: str, reduced: bool) -> str:
    buffers = "".join(f"  buffer {n}: {dtype}[{s}] input\n" for n, s in SHAPES.items() if any(f"load {n}[" in x for x in body.lines))
    head = "{i0 < n0} reduce {r0 < n1}" if reduced else "{i0 < n0, i1 < n1}"
    lines = "".join(f"    {x}\n" for x in body.lines)
    shape = "n0, n1" if f", {body.second}]" in out or not reduced else "n0"
    y = f"  buffer y: {dtype}[{shape}] temp\n"
    return f"""program p
  symbol n0 in 0..8192 from argument
  symbol n1 in 0..8192 from argument
{buffers}{y}  kernel k {head} numerics(eager, contract=off, acc=f32)
{lines}    {out}
  outputs y
"""


def inputs(text: str, dtype: str, n0: int, n1: int, seed: int) -> dict[str, torch.Tensor]:
    shapes = {"a": (n0, n1), "b": (n1,), "c": (n0,), "d": (n1, n0), "e": (n0, n1 + 5)}
    out = {}
    for k, (name, shape) in enumerate(shapes.items()):
        if f"buffer {name}:" in text:
            count = torch.Size(shape).numel()
            out[name] = values(dtype, max(3, count), seed + k)[:count].view(shape)
    return out


OPTIONS = settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@OPTIONS
@given(st.data())
def test_pointwise_bodies_are_exact(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["f32", "bf16", "f16", "i32", "i8", "i64", "u8"]))
    body = Body(data.draw, "i1")
    body.load(data.draw(st.sampled_from(list(INDICES))), dtype)
    for _ in range(data.draw(st.integers(1, 12))):
        body.grow(dtype)
    masked = f" if {body.pick('b1')}" if "b1" in body.names and data.draw(st.booleans()) else ""
    text = program(body, dtype, f"store y[i0, i1] = {body.names[dtype][-1]}{masked}", False)
    n0, n1 = data.draw(st.sampled_from([(1, 1), (3, 17), (20, 5), (2, 64), (0, 4), (33, 16)]))
    check_exact(text, inputs(text, dtype, n0, n1, n0), {"n0": n0, "n1": n1})


@OPTIONS
@given(st.data())
def test_rows_with_a_reduction(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["f32", "bf16", "i32", "i64"]))
    body = Body(data.draw, "r0")
    body.load(data.draw(st.sampled_from(list(INDICES))), dtype)
    for _ in range(data.draw(st.integers(1, 6))):
        body.grow(dtype)
    combiner = data.draw(st.sampled_from(["min", "max"] if dtype in ("f32", "bf16") else ["sum", "min", "max", "prod"]))
    body.define(dtype, f"{combiner} {body.names[dtype][-1]} over r0")
    for _ in range(data.draw(st.integers(0, 5))):
        body.grow(dtype)
    value = body.names[dtype][-1]
    text = program(body, dtype, f"store y[i0, r0] = {value}", True)
    n0, n1 = data.draw(st.sampled_from([(1, 1), (3, 17), (20, 5), (2, 64), (5, 130)]))
    check_exact(text, inputs(text, dtype, n0, n1, n1), {"n0": n0, "n1": n1})


@OPTIONS
@given(st.data())
def test_sums_of_random_bodies(data: st.DataObject) -> None:
    body = Body(data.draw, "r0")
    body.load(data.draw(st.sampled_from(list(INDICES))), "f32")
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["mul", "add", "max", "abs"]))
        body.define("f32", f"{kind} {body.pick('f32')}" + ("" if kind == "abs" else f", {body.pick('f32')}"))
    total = body.define("f32", f"sum {body.names['f32'][-1]} over r0")
    text = program(body, "f32", f"store y[i0] = {total}", True)
    n0, n1 = data.draw(st.sampled_from([(40, 17), (20, 128), (64, 33), (33, 1000)]))
    g = torch.Generator().manual_seed(n0)
    shapes = {"a": (n0, n1), "b": (n1,), "c": (n0,), "d": (n1, n0), "e": (n0, n1 + 5)}
    tensors = {n: torch.randn(s, generator=g).to(torch_dtype("f32")) for n, s in shapes.items() if f"buffer {n}:" in text}
    check_close(text, tensors, {"n0": n0, "n1": n1})
