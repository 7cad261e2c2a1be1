"""Partial states of a reduction: their types and starts, the loops that feed those of a row, and how they are joined.

A row keeps `partials` of them, element e of a piece in state e % partials, whatever the vector width.  They are joined in one fixed
tree, sums of f32 in eager's order (cpp_order): the same bits at every level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flagtree.codegen import cpp_ops as ops
from flagtree.codegen import cpp_order
from flagtree.errors import CodegenError
from flagtree.ir.program import Reduce

ROW_BLOCK = 4096  # elements of a long row after which its partial states are joined; a multiple of all PARTIALS

# combiner -> (fields of its state, start of each: a number, or "low"/"high" for the type's ends)
STATES: dict[str, tuple[tuple[str, ...], tuple[object, ...]]] = {
    "sum": (("value",), (0,)), "prod": (("value",), (1,)), "min": (("value",), ("high",)), "max": (("value",), ("low",)),
    "any": (("value",), (False,)), "all": (("value",), (True,)),
    "argmin": (("value", "index"), ("high", "high")), "argmax": (("value", "index"), ("low", "high")),
    "welford": (("mean", "m2", "count"), (0, 0, 0)), "online_softmax": (("peak", "total"), ("low", 0)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowStates:
    """Those of the reductions of one sweep over rows.  `paired`: two elements a lane (cpp_pair); `tailed`: a row may end behind the last
    whole set of states; `single`: a row is one walk along the lanes, so that its end can be told from its beginning.

    C++ variables: `part<sweep>`, and where the elements behind the last whole set are kept apart `rest<sweep>` and `length<sweep>`, how
    many elements the row has.
    """

    sweep: int
    reduces: Sequence[Reduce]
    paired: bool
    tailed: bool
    single: bool

    @property
    def name(self) -> str:
        return state_name(self.sweep)

    @property
    def ordered(self) -> bool:
        return any(cpp_order.is_ordered(op) for op in self.reduces)

    @property
    def apart(self) -> bool:
        """Eager adds what is left of a row after all else."""
        return self.ordered and self.tailed and self.single

    @property
    def width(self) -> str:
        """Elements of a step."""
        return "2 * W" if self.paired else "W"

    def declared(self) -> list[str]:
        """Type and variables, before the row is walked."""
        lines = [*struct(self.sweep, self.reduces), *self._fresh(f"part{self.sweep}")]
        return [*lines, *self._fresh(f"rest{self.sweep}"), f"i64 length{self.sweep} = 0;"] if self.apart else lines

    def _fresh(self, variable: str) -> list[str]:
        return [f"{self.name} {variable}[PARTS];", *each_part(f"{variable}[k] = {start_of_all(self.reduces)};")]

    # -- feeding them ------------------------------------------------------------------------------------------------
    def fed(self, longest: int | None) -> list[str]:
        """The loops from `at` to `end` that call `step`; `longest`: the most elements they walk, where that is known."""
        part = f"part{self.sweep}"
        if self.ordered:
            levels = cpp_order.levels(longest)
            lines = self._in_blocks(cpp_order.BLOCK, levels) if levels else self._accumulated(part, "end")
            return [f"length{self.sweep} = end - at;", *lines, self._tail(f"rest{self.sweep}", "end")] if self.apart else lines
        if longest is not None and longest <= 2 * ROW_BLOCK:
            return self._accumulated(part, "end")
        return self._in_blocks(ROW_BLOCK, 1)

    def _accumulated(self, part: str, stop: str) -> list[str]:
        """Elements from `at` to `stop` into the states `part`; what is kept apart stays."""
        call = f"step(at + k * {self.width}, {self.width}, {self._halves(part)});"
        lines = block(f"for (; at + PARTIALS <= {stop}; at += PARTIALS)", each_part(call, self.paired))
        if not self.tailed or self.apart:
            return lines
        # a copy, so that only the copy needs an address: the partial states of the loop above stay in registers
        copy = [f"{self.name} rest[PARTS];", *each_part(f"rest[k] = {part}[k];")]
        return [*lines, *block(f"if (at < {stop})", [*copy, self._tail("rest", stop), *each_part(f"{part}[k] = rest[k];")])]

    def _tail(self, part: str, stop: str) -> str:
        count = f"(int)({stop} - at < {self.width} ? {stop} - at : {self.width})"
        return f"for (int k = 0; at < {stop}; ++k, at += {self.width}) step(at, {count}, {self._halves(part)});"

    def _in_blocks(self, size: int, levels: int) -> list[str]:
        """A long row in blocks of `size` elements whose states begin anew: its sum stays as accurate as a short one's.  Finished ones go
        to the first level; a level that took `cpp_order.FAN` of the one below goes to the next.  One level is the row's states."""
        names = [f"level{k}" for k in range(levels)] if levels > 1 else [f"part{self.sweep}"]
        stop = "end - (end - at) % PARTIALS" if self.apart else "end"
        inner = [f"const i64 stop = last - at > {size} ? at + {size} : last;", *self._fresh("some"), *self._accumulated("some", "stop"),
                 *self._joined(names[0], "some")]  # fmt: skip
        for k in range(1, levels):
            moved = [*self._joined(names[k], names[k - 1]), *each_part(f"{names[k - 1]}[k] = {start_of_all(self.reduces)};")]
            inner += block(f"if ({'++blocks' if k == 1 else 'blocks'} % {cpp_order.FAN**k} == 0)", moved)
        lines = [f"const i64 last = {stop};", *block("while (at < last)", inner)]
        if levels == 1:
            return lines
        fresh = [line for name in names for line in self._fresh(name)]
        collected = [line for below in names for line in self._joined(f"part{self.sweep}", below)]
        return [*fresh, "i64 blocks = 0;", *lines, *collected]

    def _joined(self, into: str, states: str) -> list[str]:
        # every reduction of the sweep is in every piece: `_live` drops none
        joins = (f"{into}[k].{m} = combine({into}[k].{m}, {states}[k].{m});" for m in map(member, self.reduces))
        return each_part("{ " + " ".join(joins) + " }")

    def _halves(self, part: str) -> str:
        """The partial states of vector k: in pairs, even elements have the first half of them."""
        return f"{part}[k], {part}[k + PARTS / 2]" if self.paired else f"{part}[k]"

    # -- joining them ------------------------------------------------------------------------------------------------
    def joined(self, op: Reduce) -> list[str]:
        """`<name>_all`: what the states of a reduction come to, in every lane."""
        name, kind = member(op), type_of(op)
        lines = [f"{kind} {name}_parts[PARTS];", *each_part(f"{name}_parts[k] = part{self.sweep}[k].{name};")]
        if not cpp_order.is_ordered(op):
            rest = each_part(f"{name}_parts[k] = combine({name}_parts[k], rest{self.sweep}[k].{name});") if self.apart else []
            return [*lines, *rest, f"const {kind} {name}_all = tree({name}_parts);"]
        given = f"{name}_parts"
        if self.apart:
            lines += [f"{kind} {name}_rest[PARTS];", *each_part(f"{name}_rest[k] = rest{self.sweep}[k].{name};")]
            given += f", {name}_rest, length{self.sweep}"
        return [*lines, f"const {kind} {name}_all = {{in_order<{str(self.paired).lower()}>({given})}};"]


def state_name(sweep: int) -> str:
    """The C++ type that holds one partial state of each reduction of a sweep."""
    return f"sweep{sweep}_state"


def struct(sweep: int, reduces: Iterable[Reduce]) -> list[str]:
    """Its declaration."""
    return block(f"struct {state_name(sweep)}", [f"{type_of(op)} {member(op)};" for op in reduces], ";")


def start_of_all(reduces: Iterable[Reduce]) -> str:
    """What it holds before the first element."""
    return "{" + ", ".join(start_of(op) for op in reduces) + "}"


def block(head: str, lines: list[str], tail: str = "") -> list[str]:
    """`head { lines }`, the lines indented."""
    return [f"{head} {{".lstrip(), *("  " + line for line in lines), "}" + tail]


def each_part(statement: str, paired: bool = False) -> list[str]:
    return each("PARTS / 2" if paired else "PARTS", statement)


def each(count: str, statement: str) -> list[str]:
    return ["#pragma GCC unroll 16", f"for (int k = 0; k < {count}; ++k) {statement}"]


def member(op: Reduce) -> str:
    return op.names[0]


def accumulators(op: Reduce) -> tuple[str, ...]:
    """The dtype in which each part of a state is carried: half floats in f32, a welford count like the mean."""
    wide = tuple("f32" if ops.register(d) == "f32" else d for d in op.dtypes)
    return (wide[0],) * 3 if op.combiner == "welford" else wide


def type_of(op: Reduce) -> str:
    if op.combiner not in STATES:
        raise CodegenError(f"cannot generate C++ for the combiner '{op.combiner}'")
    kinds = dict.fromkeys((f"{ops.register(d)}v" for d in accumulators(op)), None) if not op.combiner.startswith("arg") else \
        [f"{ops.register(d)}v" for d in accumulators(op)]  # fmt: skip
    combiner = op.combiner if op.dtypes[0] != "b1" else {"min": "all", "max": "any"}.get(op.combiner, op.combiner)  # a true mask is -1
    return f"{combiner}_state<{', '.join(kinds)}>"


def start_of(op: Reduce) -> str:
    starts = STATES[op.combiner][1]
    return "{" + ", ".join(f"splat({start_number(ops.register(d), s, d)})" for d, s in zip(accumulators(op), starts, strict=True)) + "}"


def start_number(register: str, start: object, dtype: str) -> str:
    """A start value as a scalar of the register type."""
    if register in ("f32", "f64"):
        number = {"low": -float("inf"), "high": float("inf")}.get(str(start), start)
        return ops.literal(float(number), register)  # type: ignore[arg-type]
    if isinstance(start, bool):
        return f"i32({-1 if start else 0})"
    bits = 64 if register == "i64" else 32
    number = {"low": -(2 ** (bits - 1)), "high": 2 ** (bits - 1) - 1}.get(str(start), start)
    if dtype == "b1" and start in ("low", "high"):  # true is -1: the larger b1 is the smaller mask
        number = 0 if start == "low" else -1
    return f"{register}({ops.literal(int(number), register)})"
