"""Random programs for the passes: small kernels and externs over a few buffers, in place, through views, in parts, at moved points.

A step that the verifier does not accept behind the steps before it is dropped, so what comes out is always legal; the grammar is
wide on purpose, since a pass is wrong where its author did not look.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from flagtree.errors import IRError
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Program
from flagtree.ir.verify import verify

UNARY = ("neg", "abs", "tanh", "exp")
BINARY = ("add", "sub", "mul", "max", "min")
STEPS = (
    "pointwise",
    "pointwise",
    "pointwise",
    "inplace",
    "inplace",
    "reduce",
    "reduce",
    "normalise",
    "scan",
    "copy",
    "halves",
    "gather",
    "extern",
)


@dataclass
class _Source:
    """What a random program is made of so far; `shapes` holds each buffer's dimensions and type."""

    rng: random.Random
    sizes: list[str]
    head: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)
    temps: list[str] = field(default_factory=list)
    count: int = 0

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def declare(self, name: str, shape: tuple[str, ...], dtype: str, role: str, tail: str = "") -> None:
        self.head.append(f"buffer {name}: {dtype}[{', '.join(shape)}] {role}{tail}")
        self.shapes[name] = shape, dtype

    def text(self, outputs: list[str]) -> str:
        lines = [*self.head, *self.steps, f"outputs {', '.join(outputs)}"]
        return "program p\n" + "\n".join("  " + part for line in lines for part in line.split("\n")) + "\n"


def random_pipeline_program(seed: int) -> Program:
    """A verified program of 3 to 9 steps; the same one for a seed."""
    source = _start(random.Random(seed))
    rng = source.rng
    for _ in range(rng.randint(3, 9)):
        kept = len(source.head), len(source.steps), dict(source.shapes), list(source.temps)
        _Step(source).write(rng.choice(STEPS))
        try:
            verify(parse_program(source.text(source.temps or ["a"])))
        except IRError:
            del source.head[kept[0] :], source.steps[kept[1] :]
            source.shapes, source.temps = kept[2], kept[3]
    outputs = rng.sample(source.temps, min(len(source.temps), rng.randint(1, 3))) or ["a"]
    program = parse_program(source.text(outputs))
    verify(program)
    return program


def _start(rng: random.Random) -> _Source:
    """Two sizes, inputs, states and views of them."""
    sizes = [rng.choice(["1", "2", "3", "4", "4", "s0", "s0", "0"]), rng.choice(["1", "2", "4", "4", "5", "s1", "s0"])]
    source = _Source(rng, sizes)
    n, m = sizes
    declared = [s for s in ("s0", "s1") if s in sizes]
    source.declare("a", (n, m), rng.choice(["f32", "f32", "bf16"]), "input")
    source.declare("g", (n,), "i64", "input")
    for s in declared:
        source.head.insert(0, f"symbol {s} in {rng.choice([0, 1, 2])}..6 from dim a {sizes.index(s)}")
    for name, shape in (("x", (n, m)), ("y", rng.choice([(n, m), (m, n), (n,), (m,)]))):
        source.declare(name, shape, rng.choice(["f32", "f32", "f32", "bf16"]), "state")
        source.states.append(name)
    x = source.shapes["x"][1]
    views = [("xt", (m, n), f" strides(1, {m}) alias x + 0"), ("xf", (f"{n}*{m}",), " alias x + 0")]
    if n in ("2", "3", "4"):
        views += [("xr", (str(int(n) - 1), m), f" strides({m}, 1) alias x + {m}"), ("x0", (m,), " alias x + 0")]
    if m in ("4", "5"):
        views += [("xc", (n, "2"), f" strides({m}, 2) alias x + 1"), ("xh", (n, "2"), f" strides({m}, 1) alias x + 2")]
    for name, shape, tail in rng.sample(views, 2):
        source.declare(name, shape, x, "state", tail)
        source.states.append(name)
    return source


class _Step:
    """One step being written: its axes, its values by type, its lines."""

    def __init__(self, source: _Source) -> None:
        self.source, self.rng = source, source.rng
        self.lines: list[str] = []
        self.axes: dict[str, str] = {}
        self.over: list[str] = []
        self.values: list[str] = []
        self.named = 0

    def write(self, kind: str) -> None:
        if kind == "extern":
            self.extern()
            return
        shape = self.rng.choice([s for s, t in self.source.shapes.values() if t != "i64"])
        if self.rng.random() < 0.3:
            shape = tuple(self.source.sizes)
        reduced = shape[-1:] if self.rng.random() < 0.7 or len(shape) == 1 else self.rng.choice([shape[:1], shape])
        if kind in ("reduce", "normalise", "scan"):
            left = shape[: -len(reduced)] if shape[-len(reduced) :] == reduced else shape[1:]
            self.axes = {f"i{k}": n for k, n in enumerate(left)} | {f"r{k}": n for k, n in enumerate(reduced)}
            self.over = [a for a in self.axes if a[0] == "r"]
        else:
            self.axes = {f"i{k}": n for k, n in enumerate(shape)}
        if not self.axes or (kind == "scan" and not self.over):
            kind = "copy"
        getattr(self, kind)()
        group = ", ".join(f"{a} < {n}" for a, n in self.axes.items() if a not in self.over)
        name = self.source.fresh("k")
        head = f"kernel {name}" + (f" {{{group}}}" if group else "")
        if self.over:
            head += " reduce {" + ", ".join(f"{a} < {self.axes[a]}" for a in self.over) + "}"
        body = "".join(f"\n  {line}" for line in self.lines)
        self.source.steps.append(f"{head} numerics(eager, contract=off, acc=f32){body}")

    # -- kinds -------------------------------------------------------------------------------------------------------
    def pointwise(self) -> None:
        self.loads(self.rng.randint(1, 3))
        self.compute(self.rng.randint(0, 3))
        self.stores(self.rng.choice([1, 1, 1, 2]))

    def inplace(self) -> None:
        fitting = [n for n in (*self.source.states, *self.source.temps) if len(self.source.shapes[n][0]) == len(self.axes)]
        name = self.rng.choice(fitting or self.source.states)
        index = self.target_index(name)
        self.values.append(self.load(name, index))
        self.loads(self.rng.randint(0, 2))
        self.compute(self.rng.randint(1, 2))
        self.store(name, index)
        if self.rng.random() < 0.3:
            self.stores(1)

    def reduction(self) -> str:
        combiner = self.rng.choice(["sum", "sum", "max", "min"])
        return self.line(f"{combiner} {self.values[-1]} over {', '.join(self.over)}")

    def reduce(self, again: bool = False) -> None:
        self.loads(self.rng.randint(1, 2))
        self.compute(self.rng.randint(0, 2))
        total = self.reduction()
        if not again:
            self.values = [total]
            kept, self.axes = self.axes, {a: n for a, n in self.axes.items() if a not in self.over}
            self.compute(self.rng.randint(0, 1))
            self.stores(1)
            self.axes = kept
            return
        self.values.append(self.line(f"sub {self.values[-1]}, {total}"))
        self.stores(self.rng.choice([1, 1, 2]))

    def normalise(self) -> None:
        self.reduce(True)

    def scan(self) -> None:
        self.over = self.over[-1:]
        self.axes = {("i9" if a[0] == "r" and a not in self.over else a): n for a, n in self.axes.items()}
        self.loads(1)
        self.compute(self.rng.randint(0, 1))
        self.values.append(self.line(f"scan.sum {self.values[-1]} over {self.over[0]}"))
        self.stores(1)

    def copy(self) -> None:
        if self.rng.random() < 0.5 and len(self.source.temps) > 0:
            a, b = self.rng.choice(self.source.states), self.rng.choice(self.source.temps)
            if self.source.shapes[a] == self.source.shapes[b]:
                self.axes = {f"i{k}": n for k, n in enumerate(self.source.shapes[a][0])}
                if self.rng.random() < 0.3:
                    self.axes = {x: (str(int(n) - 1) if n in ("2", "3", "4") else n) for x, n in self.axes.items()}
                self.lines += [
                    f"w: {self.source.shapes[b][1]} = load {b}[{', '.join(self.axes)}]",
                    f"store {a}[{', '.join(self.axes)}] = w",
                ]
                return
        name = self.rng.choice(self.source.states)
        self.axes = {f"i{k}": n for k, n in enumerate(self.source.shapes[name][0])}
        temp = self.new_temp(list(self.axes), self.source.shapes[name][1])
        self.lines += [
            f"w: {self.source.shapes[name][1]} = load {name}[{', '.join(self.axes)}]",
            f"store {temp}[{', '.join(self.axes)}] = w",
        ]

    def halves(self) -> None:
        """Two complementary masked loads, joined by a select or by arithmetic."""
        axis, size = list(self.axes.items())[-1]
        cut = self.rng.randint(0, 3)
        source = [n for n, (s, t) in self.source.shapes.items() if t == "f32" and len(s) == len(self.axes)]
        first = self.rng.choice(source or ["x"])
        second = first if self.rng.random() < 0.7 else self.rng.choice(source or ["x"])
        position = self.line(f"index {axis}", "i64")
        below, above = self.line(f"lt {position}, {cut}", "b1"), self.line(f"ge {position}, {cut}", "b1")
        lead, dtype = list(self.axes)[:-1], self.source.shapes[first][1]
        shift = f"{axis} + {size} - {cut}" if self.rng.random() < 0.6 else axis
        low = self.line(f"load {first}[{', '.join([*lead, shift])}] if {below} else 0.0", dtype)
        high = self.line(f"load {second}[{', '.join([*lead, f'{axis} - {cut}'])}] if {above} else 0.0", self.source.shapes[second][1])
        if self.rng.random() < 0.5:
            low = self.line(f"neg {low}", dtype)
        form = self.rng.choice(
            [f"where {above}, {high}, {low}", f"where {below}, {low}, {high}", f"add {low}, {high}", f"sub {high}, {low}"]
        )
        self.values.append(self.line(form, dtype))
        self.stores(self.rng.choice([1, 1, 2]))

    def gather(self) -> None:
        axis = self.rng.choice(list(self.axes))
        if self.axes[axis] != self.source.sizes[0]:
            axis = next(iter(self.axes))
        row = self.line(f"load g[{axis}]", "i64")
        name = self.rng.choice(["a", "x", *self.source.temps])
        index = [row if n == self.source.sizes[0] else self.read_index(n)[0] for n in self.source.shapes[name][0]]
        self.values.append(self.load(name, index))
        self.compute(self.rng.randint(0, 1))
        self.stores(1)

    def extern(self) -> None:
        floats = [n for n, (_, t) in self.source.shapes.items() if t == "f32"]
        name, rng = self.source.fresh("e"), self.rng
        a = rng.choice(floats or ["a"])
        if rng.random() < 0.4:
            state = rng.choice([*self.source.states, *self.source.temps])
            self.source.steps.append(f'extern {name}: (_) = aten.mul_.Tensor({state}, 0.5) mutates({state}) reason "t"')
        elif rng.random() < 0.5 and self.source.sizes[0] != "0":
            state = rng.choice(["x", "y"])
            shape, dtype = self.source.shapes[state]
            temp, source = self.source.fresh("t"), rng.choice([n for n, s in self.source.shapes.items() if s == (shape, dtype)])
            self.source.declare(temp, shape, dtype, "temp")
            self.source.temps.append(temp)
            self.source.steps.append(f'extern {name}: ({temp}) = aten.index_copy.default({state}, 0, g, {source}) reason "t"')
        else:
            temp = self.source.fresh("t")
            shape, dtype = self.source.shapes[a]
            self.source.declare(temp, shape, dtype, "temp")
            self.source.temps.append(temp)
            attributes = '{memory_format = type("memory_format", "torch.contiguous_format")}'
            self.source.steps.append(f'extern {name}: ({temp}) = aten.clone.default({a}) {attributes} reason "t"')

    # -- parts -------------------------------------------------------------------------------------------------------
    def line(self, text: str, dtype: str = "f32") -> str:
        self.named += 1
        self.lines.append(f"v{self.named}: {dtype} = {text}")
        return f"v{self.named}"

    def read_index(self, size: str) -> tuple[str, str | None]:
        """An index below `size` over the axes, and the condition under which it is in range."""
        rng, same = self.rng, [a for a, n in self.axes.items() if n == size]
        longer = [a for a, n in self.axes.items() if n.isdigit() and size.isdigit() and int(n) < int(size)]
        if same and rng.random() < 0.9:
            axis = same[0] if len(same) == 1 or rng.random() < 0.5 else rng.choice(same)
            form = rng.random()
            if form < 0.7:
                return axis, None
            if form < 0.8:
                return f"{size} - 1 - {axis}", None
            if form < 0.9:
                return f"({axis} + 1) % {size}", None
            return f"{axis} - 1", f"{axis}"
        if longer and rng.random() < 0.7:
            return f"{rng.choice(longer)} + {rng.randint(0, 1)}", None
        return "0", None

    def load(self, name: str, index: list[str], mask: str | None = None) -> str:
        dtype = self.source.shapes[name][1]
        guard = f" if {mask} else 0.0" if mask else ""
        value = self.line(f"load {name}[{', '.join(index)}]{guard}", dtype)
        return value if dtype == "f32" else self.line(f"cast {value}")

    def loads(self, count: int) -> None:
        names = [n for n, (_, t) in self.source.shapes.items() if t != "i64"]
        for _ in range(count):
            name = self.rng.choice(names) if self.rng.random() < 0.5 else self.rng.choice(self.source.temps[-2:] or names)
            aligned = list(self.axes) if tuple(self.axes.values()) == self.source.shapes[name][0] and self.rng.random() < 0.6 else None
            found = [(a, None) for a in aligned] if aligned else [self.read_index(n) for n in self.source.shapes[name][0]]
            masks = [m for _, m in found if m]
            mask = self.line(f"ge {self.line(f'index {masks[0]}', 'i64')}, 1", "b1") if masks else None
            self.values.append(self.load(name, [i for i, _ in found], mask))

    def compute(self, count: int) -> None:
        for _ in range(count):
            pick = self.rng.random()
            value = self.values[-1]
            if pick < 0.4:
                op = self.rng.choice(UNARY)
                self.values.append(self.line(f"tanh {self.line(f'exp {value}')}" if op == "exp" else f"{op} {value}"))
            elif pick < 0.85:
                other = self.rng.choice([*self.values, "0.5", "2.0"])
                self.values.append(self.line(f"{self.rng.choice(BINARY)} {value}, {other}"))
            else:
                half = self.line(f"cast {value}", "bf16")
                self.values.append(self.line(f"cast {half}"))

    def new_temp(self, axes: list[str], dtype: str) -> str:
        name = self.source.fresh("t")
        self.source.declare(name, tuple(self.axes[a] for a in axes), dtype, "temp")
        self.source.temps.append(name)
        return name

    def target_index(self, name: str) -> list[str]:
        """One axis a dimension, each once, where the sizes allow; a shifted one now and then."""
        free, out = list(self.axes), []
        for size in self.source.shapes[name][0]:
            same = [a for a in free if self.axes[a] == size]
            shorter = [a for a in free if self.axes[a].isdigit() and size.isdigit() and int(self.axes[a]) < int(size)]
            pick = self.rng.choice(same if same and self.rng.random() < 0.9 else shorter or ["0"])
            if pick in free:
                free.remove(pick)
            out.append(f"{pick} + 1" if pick in shorter and self.rng.random() < 0.5 else pick)
        return out

    def store(self, name: str, index: list[str]) -> None:
        dtype, value = self.source.shapes[name][1], self.values[-1]
        value = value if dtype == "f32" else self.line(f"cast {value}", dtype)
        guard = ""
        if self.rng.random() < 0.12 and self.axes:
            axis = self.rng.choice(list(self.axes))
            guard = " if " + self.line(f"{self.rng.choice(['ge', 'lt'])} {self.line(f'index {axis}', 'i64')}, 1", "b1")
        mode = ".add" if self.rng.random() < 0.05 else ""
        self.lines.append(f"store{mode} {name}[{', '.join(index)}] = {value}{guard}")

    def stores(self, count: int) -> None:
        for _ in range(count):
            if self.rng.random() < 0.72:
                axes = list(self.axes)
                if self.rng.random() < 0.15:
                    self.rng.shuffle(axes)
                self.store(self.new_temp(axes, self.rng.choice(["f32", "f32", "f32", "bf16"])), axes)
            else:
                name = self.rng.choice([*self.source.states, *self.source.temps])
                self.store(name, self.target_index(name))
