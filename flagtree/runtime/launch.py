"""The executor: runs a launch list on torch tensors, with as little work per kernel as Python allows.

A call reads the symbols, takes the frame for its sizes out of the pool, runs it and puts it back, so a frame never serves
two calls at once.  Used by `load.py` and by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flagtree.errors import BindError
from flagtree.runtime.expand import Declared
from flagtree.runtime.frame import Frame
from flagtree.runtime.gpu import Device
from flagtree.runtime.prepare import Library, Prepared, SymbolSpec, check_symbol, read_symbol
from flagtree.runtime.whole_call import Function, whole_call

KEPT_BYTES = 256 << 20  # arenas kept between calls, for one session
KEPT_FRAMES = 16


class Executable:
    """A launch list ready to run.  `library` gives its kernels, `constants` its tables by name.

    `inputs` are the buffers that `call` takes, in order.  BundleError when the launch list is not valid or names an
    operator that does not exist here.
    """

    def __init__(
        self, launch: Mapping[str, Any], library: Library | None = None, constants: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.prepared = Prepared(launch, library)
        given = {b.name for b in self.prepared.program.given}
        self.constants = {n: t.to(self.prepared.tensors) for n, t in (constants or {}).items() if n in given}
        self._session = Session(self, {})
        self.inputs: list[Declared] = self._session.inputs
        self.restrided = self.prepared.restrided  # extern name to how often its result was copied into the declared strides

    def call(self, args: Sequence[Any]) -> tuple:
        """Run once.  `args`: tensors and numbers in the order of `inputs`, trusted to have the declared types, sizes and
        strides; symbol ranges are checked (BindError).  Returns the outputs in order: an input's own tensor where the
        program hands one back, None for an output nobody needs."""
        return self._session(args)

    @property
    def whole(self) -> Function | None:
        """`call` as one builtin function over the inputs, once a first call has made it; None from it leaves a call to `call`."""
        return self._session.whole

    def bind(self, given: Mapping[str, torch.Tensor]) -> Session:
        """A session in which the named buffers (weights) are fixed; its `inputs` are the rest."""
        return Session(self, given)


class Session:
    """An executable with some buffers bound for good.  Callable from several threads at once."""

    def __init__(self, executable: Executable, bound: Mapping[str, Any]) -> None:
        self.executable, self.prepared = executable, executable.prepared
        self.bound = {**executable.constants, **bound}
        self.inputs = [b for b in self.prepared.program.given if b.name not in self.bound]
        self._argument = {b.name: i for i, b in enumerate(self.inputs)}
        early = [(i, s) for i, s in enumerate(self.prepared.symbols) if s.name not in self.prepared.homes.late]
        self._readers = [(i, self._reader(s), s) for i, s in early]
        self._values = [max(1, s.lo) for s in self.prepared.symbols]  # for symbols that an extern resolves later
        self._frames: dict[tuple[int, ...], Frame] = {}
        self.whole: Function | None = None
        self._is_first = True
        self._autocasts = sorted({"cpu", self.prepared.tensors.type})

    def _reader(self, symbol: SymbolSpec) -> Callable[[Sequence[Any]], int]:
        k = symbol.dimension
        if symbol.buffer in self.bound:
            fixed = read_symbol(symbol, self.bound[symbol.buffer])
            return lambda args: fixed
        i = self._argument[symbol.buffer]
        if symbol.kind == "dim":
            return lambda args: args[i].shape[k]
        if symbol.kind == "stride":
            return lambda args: args[i].stride(k)
        return lambda args: int(args[i])

    def __call__(self, args: Sequence[Any]) -> tuple:
        """As `Executable.call`, over the buffers that are not bound."""
        if self.whole is not None and (outputs := self.whole(*args)) is not None:
            return outputs
        for kind in self._autocasts:
            if torch.is_autocast_enabled(kind):  # the launch list says every type; autocast would change them in externs
                with torch.autocast(kind, enabled=False):
                    return self(args)
        if len(args) != len(self.inputs):
            raise BindError(f"{self.prepared.program.name} takes {len(self.inputs)} inputs, {len(args)} were given")
        values = self._values.copy()
        for i, read, symbol in self._readers:
            values[i] = value = read(args)
            if not symbol.lo <= value <= symbol.hi or value % symbol.multiple:
                check_symbol(symbol, value)
        key = tuple([values[i] for i in self.prepared.key_symbols])
        if self.prepared.device is not None:
            return self._on_device(self.prepared.device, key, args, values)
        frame = self._frames.pop(key, None) or self._frame(values)
        outputs = frame.run(args, values)
        if self._is_first:
            self._is_first, self.whole = False, whole_call(frame, self.inputs)
            if self.whole is not None:
                return outputs  # the frame is the function's now
        self._keep(key, frame)
        return outputs

    def _on_device(self, device: Device, key: tuple[int, ...], args: Sequence[Any], values: list[int]) -> tuple:
        """Launch on the caller's current stream.  A frame belongs to one stream, so that its arena is never used on two at once; what
        a graph records has a frame of its own, whose arena the graph's memory pool owns, as it replays after the frame is gone."""
        with device.here():
            stream = device.queue()
            if device.capturing():
                return self._frame(values, stream).run(args, values)
            key = (*key, stream)
            frame = self._frames.pop(key, None) or self._frame(values, stream)
            outputs = frame.run(args, values)
            self._keep(key, frame)
            return outputs

    def _frame(self, values: list[int], stream: int = 0) -> Frame:
        with torch.inference_mode(False):  # a frame outlives the caller's mode
            return Frame(self.prepared, self.inputs, self.bound, values, stream)

    def _keep(self, key: tuple[int, ...], frame: Frame) -> None:
        """Keep the frame for the next call with these sizes, the most recent ones within bounds."""
        frames = self._frames
        if frame.arena_bytes > KEPT_BYTES:
            return
        frames[key] = frame
        if len(frames) > 1:
            kept = list(frames.items())
            while len(kept) > KEPT_FRAMES or sum(f.arena_bytes for _, f in kept) > KEPT_BYTES:
                frames.pop(kept.pop(0)[0], None)
