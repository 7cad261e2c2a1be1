"""The IR: a Program of steps over named buffers.  Everything is frozen; a pass returns a new Program.

A kernel is one domain (its axes) and a straight-line SSA body.  A value depends on the axes that its operands depend on;
`Reduce` takes axes away, and a reduced value used together with them again broadcasts, so that a norm is one
kernel with no nested loops.  A store is executed for every point of the axes that its index and value depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Union

from flagtree.ir.index import Index, contiguous_strides

Scalar = Union[bool, int, float]
Arg = Union[str, bool, int, float]  # a value's name, or a literal of the op's operand type

UNBOUNDED = 2**48  # what a run-time integer without an upper bound counts as


@dataclass(frozen=True, slots=True)
class Symbol:
    """A run-time integer.  `source`: ("dim", buffer, k) size of a dimension, ("stride", buffer, k), or
    ("scalar", buffer) the value of an integer argument.  Range is inclusive and promised by the caller."""

    name: str
    lo: int
    hi: int
    source: tuple
    multiple: int = 1


ROLES = ("input", "weight", "state", "constant", "temp", "scalar", "opaque")


@dataclass(frozen=True, slots=True)
class Alias:
    """A buffer that is a strided view of `base`: offset in elements of the base."""

    base: str
    offset: Index


@dataclass(frozen=True, slots=True)
class Buffer:
    """`strides` in elements.  Roles: input (caller's, may be written when a step says so), weight and constant (read only),
    state (caller's, written in place: a KV cache), temp (ours), scalar (0-d number argument), opaque (no tensor)."""

    name: str
    dtype: str
    shape: tuple[Index, ...]
    role: str = "temp"
    strides: tuple[Index, ...] | None = None  # None is row-major
    alias_of: Alias | None = None

    @property
    def layout(self) -> tuple[Index, ...]:
        """Strides in elements, row-major where none are given."""
        return contiguous_strides(self.shape) if self.strides is None else self.strides

    @property
    def is_contiguous(self) -> bool:
        return self.strides is None or self.strides == contiguous_strides(self.shape)


@dataclass(frozen=True, slots=True)
class Axis:
    """One loop of a kernel's domain: parallel, or reduce (some Reduce or Scan runs over it)."""

    name: str
    extent: Index
    kind: str = "parallel"


@dataclass(frozen=True, slots=True)
class Access:
    """One element of a buffer per point of the domain.  Names in `index` are axes, symbols or integer SSA values.
    `mask` names a b1 value: where it is false nothing is touched."""

    buffer: str
    index: tuple[Index, ...]
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    dtype: str
    access: Access
    other: Scalar | None = None  # the value where the mask is false


@dataclass(frozen=True, slots=True)
class Compute:
    name: str
    dtype: str
    op: str
    args: tuple[Arg, ...]


@dataclass(frozen=True, slots=True)
class Reduce:
    """`names`, `dtypes` and `args` have the combiner's arity.  Masked-out points must already carry the identity.

    `ordered`: of a sum that PyTorch's own sum takes; where a target can, it adds up in the order in which eager does there."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    combiner: str
    args: tuple[str, ...]
    axes: tuple[str, ...]
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """Inclusive running combination along one axis."""

    name: str
    dtype: str
    combiner: str
    arg: str
    axis: str


@dataclass(frozen=True, slots=True)
class IndexValue:
    """An index expression as an integer value (positions, comparisons for masks)."""

    name: str
    dtype: str
    expr: Index


@dataclass(frozen=True, slots=True)
class Store:
    """`mode`: set, add or max."""

    access: Access
    value: str
    mode: str = "set"


BodyOp = Union[Load, Compute, Reduce, Scan, IndexValue, Store]


def defined(op: BodyOp) -> tuple[str, ...]:
    """The SSA values that a body op defines."""
    return () if isinstance(op, Store) else op.names if isinstance(op, Reduce) else (op.name,)


def indices(op: BodyOp) -> tuple[Index, ...]:
    """The index expressions that a body op holds."""
    return op.access.index if isinstance(op, (Load, Store)) else (op.expr,) if isinstance(op, IndexValue) else ()


def arguments(op: BodyOp) -> tuple[str, ...]:
    """The SSA values that a body op takes by name, its mask included; those inside its indices are not."""
    if isinstance(op, (Load, Store)):
        mask = () if op.access.mask is None else (op.access.mask,)
        return (*mask, op.value) if isinstance(op, Store) else mask
    if isinstance(op, Compute):
        return tuple(a for a in op.args if isinstance(a, str))
    return op.args if isinstance(op, Reduce) else (op.arg,) if isinstance(op, Scan) else ()


def operands(op: BodyOp) -> tuple[str, ...]:
    """The names that a body op reads, each once: SSA values, and in its indices also axes and symbols."""
    return tuple(dict.fromkeys((*sorted({n for i in indices(op) for n in i.names()}), *arguments(op))))


@dataclass(frozen=True, slots=True)
class Numerics:
    """`rounding`: eager (round where eager rounds) or fused.  `fp_contract`: may a*b+c become one fma.  `accumulator`: type of sums."""

    rounding: str = "eager"
    fp_contract: bool = False
    accumulator: str = "f32"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a step comes from: FX node, module path, source line; survives fusion."""

    node: str
    module: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a target walks the domain.  `lane`: the axis across vector lanes or threads; `tiles`: elements of an axis that one
    program instance covers (unnamed axes: one per instance); `loop`: axes an instance walks in a loop of tile steps."""

    lane: str | None = None
    tiles: tuple[tuple[str, int], ...] = ()
    loop: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    axes: tuple[Axis, ...]
    body: tuple[BodyOp, ...]
    numerics: Numerics = Numerics()
    schedule: Schedule | None = None
    origins: tuple[Origin, ...] = ()
    ops: tuple[str, ...] = ()  # the ATen calls it computes, for reports; not part of its identity

    @property
    def loads(self) -> tuple[Load, ...]:
        return tuple(op for op in self.body if isinstance(op, Load))

    @property
    def stores(self) -> tuple[Store, ...]:
        return tuple(op for op in self.body if isinstance(op, Store))

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(op.access.buffer for op in self.loads))

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(op.access.buffer for op in self.stores))


@dataclass(frozen=True, slots=True)
class Ref:
    """A buffer as an operand of an extern."""

    buffer: str


@dataclass(frozen=True, slots=True)
class TypeArg:
    """A dtype, device, layout or memory format as an operand: `kind` names which, `value` its spelling."""

    kind: str
    value: str


Operand = Union[Ref, Index, TypeArg, None, bool, int, float, str, "tuple[Operand, ...]"]


@dataclass(frozen=True, slots=True)
class Extern:
    """A call to the platform's own library.  `outputs`: buffers that the call returns (None: an output nobody uses);
    `mutates`: operands that it writes in place.  `effect`: "" (none), "rng", "collective:<group>" or "state:<name>"."""

    name: str
    callee: str
    args: tuple[Operand, ...]
    outputs: tuple[str | None, ...]
    kwargs: tuple[tuple[str, Operand], ...] = ()
    mutates: tuple[str, ...] = ()
    reason: str = ""
    effect: str = ""
    origins: tuple[Origin, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_refs((*self.args, *(v for _, v in self.kwargs)))))

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(o for o in self.outputs if o), *self.mutates)))


def _refs(operands: tuple) -> Iterator[str]:
    for x in operands:
        if isinstance(x, Ref):
            yield x.buffer
        elif isinstance(x, tuple):
            yield from _refs(x)


@dataclass(frozen=True, slots=True)
class Template:
    """A hand-shaped kernel (gemm, attention) with generated bodies around it: operands in the kind's own order,
    `prologue` computes operands, `epilogue` consumes the rounded accumulator as value `acc`."""

    name: str
    kind: str
    operands: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: tuple[tuple[str, Operand], ...] = ()
    prologue: tuple[BodyOp, ...] = ()
    epilogue: tuple[BodyOp, ...] = ()
    numerics: Numerics = Numerics()
    origins: tuple[Origin, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        loads = (op.access.buffer for op in (*self.prologue, *self.epilogue) if isinstance(op, Load))
        return tuple(dict.fromkeys((*self.operands, *loads)))

    @property
    def writes(self) -> tuple[str, ...]:
        return self.outputs


@dataclass(frozen=True, slots=True)
class Repeat:
    """`body` executed `count` times; `bindings` gives, for each formal buffer of the body, the buffer bound in each iteration."""

    name: str
    count: int
    body: tuple[Step, ...]
    bindings: tuple[tuple[str, tuple[str, ...]], ...]

    def _actual(self, names: Iterator[str]) -> tuple[str, ...]:
        bound = dict(self.bindings)
        return tuple(dict.fromkeys(a for n in names for a in bound.get(n, (n,))))

    @property
    def reads(self) -> tuple[str, ...]:
        return self._actual(n for s in self.body for n in s.reads)

    @property
    def writes(self) -> tuple[str, ...]:
        return self._actual(n for s in self.body for n in s.writes)


Step = Union[Kernel, Template, Extern, Repeat]


@dataclass(frozen=True, slots=True)
class Program:
    """`steps` in a valid order.  `outputs` are buffers handed back (an input's name: the caller's own tensor)."""

    name: str
    symbols: tuple[Symbol, ...]
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    _by_name: dict[str, Buffer] = field(default_factory=dict, compare=False, repr=False, hash=False)

    def buffer(self, name: str) -> Buffer:
        """The declaration of a buffer; KeyError when there is none."""
        if not self._by_name:
            self._by_name.update((b.name, b) for b in self.buffers)
        return self._by_name[name]

    def declares(self, name: str) -> bool:
        """Is there a buffer of this name?"""
        if not self._by_name:
            self._by_name.update((b.name, b) for b in self.buffers)
        return name in self._by_name

    def root(self, name: str) -> str:
        """The buffer whose memory `name` is, following aliases."""
        while (alias := self.buffer(name).alias_of) is not None:
            name = alias.base
        return name

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        """What a caller passes, in declaration order."""
        return tuple(b for b in self.buffers if b.role not in ("temp",) and b.alias_of is None)

    def with_(self, **changes: object) -> Program:
        """`dataclasses.replace` that forgets the name table."""
        return replace(self, _by_name={}, **changes)  # type: ignore[arg-type]
