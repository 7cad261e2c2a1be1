"""A launch list, validated and unrolled: every repeat executed on paper, every name an actual buffer.

Each iteration gets its own copies of the buffers that live inside it, so lifetimes are exact.  Pure data, no torch;
`prepare.py` makes it executable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flagtree.errors import BundleError

FORMAT = 1
MAX_STEPS = 100_000  # after unrolling; 144 layers of 16 launches are 2304
GIVEN = ("input", "weight", "state", "constant", "scalar", "opaque")
ROLES = (*GIVEN, "temp", "formal")


@dataclass(frozen=True, slots=True)
class Declared:
    """A buffer: shape, strides and offset are index expressions (JSON), strides None for row-major.  A view has a
    `base` and an `offset` in elements from the base's element 0."""

    name: str
    dtype: str
    shape: list
    strides: list | None
    role: str
    base: str | None = None
    offset: object = 0


@dataclass(frozen=True, slots=True)
class KernelCall:
    digest: str
    name: str
    buffers: tuple[str, ...]
    writes: tuple[str, ...]
    symbols: tuple
    above: Above | None = None


@dataclass(frozen=True, slots=True)
class Above:
    """The call that computes the same as a kernel, and takes its place where `rows` (an index expression) is more than `at_most`."""

    rows: object
    at_most: int
    call: ExternCall


@dataclass(frozen=True, slots=True)
class ExternCall:
    """`args` and `kwargs` are operands in JSON, with actual buffer names; `operands` are the buffers among them."""

    callee: str
    name: str
    args: list
    kwargs: dict[str, object]
    outputs: tuple[str | None, ...]
    mutates: tuple[str, ...]
    reason: str
    operands: tuple[str, ...]


@dataclass(slots=True)
class Unrolled:
    """The whole launch list over actual buffers.  `symbols` as in the JSON."""

    name: str
    symbols: list[dict[str, Any]]
    buffers: dict[str, Declared]
    outputs: list
    steps: list[KernelCall | ExternCall] = field(default_factory=list)
    given: list[Declared] = field(default_factory=list)  # what a caller passes, in order of declaration

    def root(self, name: str) -> str:
        """The buffer whose memory `name` is."""
        while (base := self.buffers[name].base) is not None:
            name = base
        return name

    def offset(self, name: str) -> object:
        """Elements from the root's element 0 to the view's, as an index expression."""
        parts: list[object] = []
        while (buffer := self.buffers[name]).base is not None:
            parts.append(buffer.offset)
            name = buffer.base
        return parts[0] if len(parts) == 1 else ["+", *parts] if parts else 0


def expand(launch: Mapping[str, Any]) -> Unrolled:
    """Validate and unroll.  BundleError for another format, a missing field or an undeclared name."""
    try:
        if launch["format"] != FORMAT:
            why = f"format {launch['format']!r}, this flagtree reads {FORMAT}"
            raise BundleError("the launch list has another format", why=why, hint="compile the bundle again with this flagtree")
        out = Unrolled(launch["name"], list(launch["symbols"]), {}, list(launch["outputs"]))
        for record in launch["buffers"]:
            buffer = _declared(record)
            out.buffers[buffer.name] = buffer
        _check_aliases(out)
        unknown = next((o for o in out.outputs if isinstance(o, str) and o not in out.buffers), None)
        if unknown is not None:
            raise ValueError(f"the output '{unknown}' is not declared")
        private = {id(s): _private(s, launch, out) for s in launch["steps"] if "repeat" in s}
        _unroll(launch["steps"], _Renaming({}, "", out), private)
        made = {o for s in out.steps if isinstance(s, ExternCall) for o in s.outputs}  # a number may be an extern's result
        out.given = [b for b in out.buffers.values() if b.role in GIVEN and b.base is None and b.name not in made]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise BundleError("the launch list is not valid", why=f"{type(e).__name__}: {e}", hint="build the bundle again") from None
    return out


def _declared(record: Mapping[str, Any]) -> Declared:
    alias = record["alias"]
    if record["role"] not in ROLES:
        raise ValueError(f"unknown role {record['role']!r}")
    base, offset = (None, 0) if alias is None else (alias["base"], alias["offset"])
    return Declared(record["name"], record["dtype"], list(record["shape"]), record["strides"], record["role"], base, offset)


def _check_aliases(out: Unrolled) -> None:
    for name in out.buffers:
        seen = {name}
        while (base := out.buffers[name].base) is not None:
            if base in seen:
                raise ValueError(f"the alias '{base}' is its own base")
            seen.add(name := base)


# -- names -----------------------------------------------------------------------------------------------------------
def _buffers(operand: object) -> Iterator[str]:
    if isinstance(operand, list):
        for item in operand:
            yield from _buffers(item)
    elif isinstance(operand, dict):
        if "buffer" in operand:
            yield operand["buffer"]
        elif "list" in operand:
            yield from _buffers(operand["list"])


def _used(steps: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for step in steps:
        if "repeat" in step:
            yield from _used(step["steps"])
            for bound in step["bindings"].values():
                yield from bound
        elif "kernel" in step:
            yield from step["buffers"]
        else:
            yield from _buffers([step["args"], list(step["kwargs"].values())])
            yield from (o for o in step["outputs"] if o)
            yield from step["mutates"]


def _private(repeat: Mapping[str, Any], launch: Mapping[str, Any], out: Unrolled) -> set[str]:
    """Buffers that live within one iteration: temps used in this repeat alone and bound by none.  Their first use is a
    write in every iteration, since it is one in the first."""
    inside = {out.root(n) for n in _used(repeat["steps"])}
    outside = {out.root(o) for o in launch["outputs"] if isinstance(o, str)}
    outside |= {out.root(n) for n in _used(s for s in launch["steps"] if s is not repeat)}
    outside |= {out.root(s["source"][1]) for s in launch["symbols"]}
    bound: set[str] = set()
    work = [repeat]
    while work:
        step = work.pop()
        bound |= {*step["bindings"], *(a for names in step["bindings"].values() for a in names)}
        work += [s for s in step["steps"] if "repeat" in s]
    return {n for n in inside - outside - bound if out.buffers[n].role == "temp"}


class _Renaming:
    """Formal and private names of one iteration to actual ones; views of renamed buffers are declared anew."""

    def __init__(self, names: Mapping[str, str], mark: str, out: Unrolled) -> None:
        self.names, self.mark, self.out = dict(names), mark, out

    def __call__(self, name: str) -> str:
        if name in self.names:
            return self.names[name]
        buffer = self.out.buffers[name]
        if buffer.base is not None:
            base = self(buffer.base)
            return name if base == buffer.base else self.copy(name, base)
        if buffer.role == "formal":
            raise ValueError(f"'{name}' is used outside the repeat that binds it")
        return name

    def copy(self, name: str, base: str | None = None) -> str:
        actual = f"{name}@{self.mark}"
        self.out.buffers[actual] = replace(self.out.buffers[name], name=actual, base=base)
        self.names[name] = actual
        return actual

    def operand(self, value: object) -> object:
        if isinstance(value, dict):
            if "buffer" in value:
                return {"buffer": self(value["buffer"])}
            if "list" in value:
                return {"list": [self.operand(v) for v in value["list"]]}
        return value


# -- steps -----------------------------------------------------------------------------------------------------------
def _unroll(steps: Iterable[Mapping[str, Any]], rename: _Renaming, private: Mapping[int, set[str]]) -> None:
    done = rename.out.steps
    for step in steps:
        if len(done) > MAX_STEPS:
            raise ValueError(f"more than {MAX_STEPS} steps")
        if "repeat" in step:
            _repeat(step, rename, private)
        elif "kernel" in step:
            buffers = tuple(rename(n) for n in step["buffers"])
            writes = tuple(buffers[i] for i in step["writes"])
            done.append(KernelCall(step["kernel"], step["name"], buffers, writes, tuple(step["symbols"]), _above(step, rename, buffers)))
        else:
            done.append(_extern(step, rename))


def _extern(step: Mapping[str, Any], rename: _Renaming) -> ExternCall:
    outputs = tuple(None if o is None else rename(o) for o in step["outputs"])
    args = [rename.operand(a) for a in step["args"]]
    kwargs = {k: rename.operand(v) for k, v in step["kwargs"].items()}
    mutates = tuple(rename(n) for n in step["mutates"])
    operands = tuple(dict.fromkeys(_buffers([args, list(kwargs.values())])))
    return ExternCall(step["extern"], step["name"], args, kwargs, outputs, mutates, step["reason"], operands)


def _above(step: Mapping[str, Any], rename: _Renaming, buffers: tuple[str, ...]) -> Above | None:
    if (above := step.get("above")) is None:
        return None
    call = _extern(above["extern"], rename)
    if not {*call.operands, *call.outputs} <= set(buffers):
        raise ValueError(f"the call above '{step['name']}' touches other buffers than its kernel")
    return Above(above["rows"], int(above["at_most"]), call)


def _repeat(step: Mapping[str, Any], rename: _Renaming, private: Mapping[int, set[str]]) -> None:
    out = rename.out
    for i in range(step["repeat"]):
        bound = {formal: rename(names[i]) for formal, names in step["bindings"].items()}
        # the number of steps so far marks an iteration: two repeats may hold views of the same formal
        inner = _Renaming({**rename.names, **bound}, f"{rename.mark}.{len(out.steps)}".lstrip("."), out)
        for name in sorted(private.get(id(step), ())):
            inner.copy(name)
        _unroll(step["steps"], inner, private)
