"""One kernel executed on one choice of inputs, and each stored buffer judged: what the certificate records of a run.

A run is sizes, a kind of floats, and where pointers stand; at the upper end of the symbols' ranges only chosen points are computed.
Called by check/certify.py for each run of each kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from flagtree.check.attention_rows import enclose_attention
from flagtree.check.enclosure import Enclosed, enclose
from flagtree.check.execute import Differs, Executor, Unexecuted
from flagtree.check.gate import Judged, judge
from flagtree.check.inputs import Operand, make_operands
from flagtree.check.points import all_points, count, reduced, some_points
from flagtree.check.recipe import NoEager
from flagtree.check.regimes import ORDINARY
from flagtree.check.sparse import Sampled, Strays, elements
from flagtree.check.stated import Stated, stated_gpu, stated_native
from flagtree.check.upper import run_blocks
from flagtree.check.upper_eager import Eager
from flagtree.check.upper_native import TooLarge, run_native
from flagtree.errors import IRError, KernelFault
from flagtree.ir import experts
from flagtree.ir.attention import form_of
from flagtree.ir.canonical import Isolated
from flagtree.ir.sample import Stored, stores_at
from flagtree.ir.walk import flat, run_kernel
from flagtree.toolchain.base import BuiltKernel

Tensor = torch.Tensor
LARGEST = 1 << 22  # points times reduced elements that are computed in a run on whole tensors
TERMS = 1 << 24  # terms of one element that are computed at chosen points
WHOLE, BLOCKS = 1 << 20, 2  # elements of a product's weights up to which all of it is executed; blocks that are where it is not


@dataclass(frozen=True, slots=True)
class Run:
    """`symbols`: the sizes.  `kind`: of the floats (check/regimes.py).  `shift`: elements by which pointers stand behind an aligned
    address.  `upper`: which symbol is at its upper end ("all", a name), "" for a run on whole small tensors.  `blocks`: of the grid."""

    symbols: Mapping[str, int]
    kind: str = "ordinary"
    shift: int = 0
    upper: str = ""
    blocks: int = 0

    def describe(self, names: tuple[str, ...]) -> str:
        """For an error: the sizes by the names that the program gives them, and what is special."""
        sizes = ", ".join(f"{n}={v}" for n, v in zip(names, self.symbols.values(), strict=True)) or "its fixed sizes"
        return f"{sizes}, {self.kind} inputs{', misaligned pointers' if self.shift else ''}"


@dataclass(slots=True)
class Examined:
    """What the runs of one kernel found.  `faults`: (run, what is wrong)."""

    records: list[dict[str, object]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    uncompared: str = ""


class Examination:
    """Runs of one kernel: `isolated` as built into `built`, compared with `eager` where there is one."""

    def __init__(self, isolated: Isolated, built: BuiltKernel, executor: Executor, eager: Eager | None, uncompared: str) -> None:
        self.isolated, self.built, self.executor, self.eager = isolated, built, executor, eager
        self.program, self.kernel = isolated.program, isolated.kernel
        self.found = Examined(uncompared="" if eager is not None else uncompared)
        native = bool(executor.levels(built))
        self.stated: Stated = (
            stated_native(self.kernel.numerics.fp_contract) if native else stated_gpu(self.kernel, int(built.launch["threads"]))  # type: ignore[call-overload]
        )
        self.form = form_of(self.program)
        self.accumulates = any(s.mode != "set" for s in self.kernel.stores)
        known = experts.known(self.program, self.kernel)
        self.vast = known is not None and not native and elements(self.program.buffer(known.names.w), {}) > WHOLE

    def run(self, run: Run, seed: int) -> None:
        """Execute and judge one run; its record and its faults are added to `found`.  Raises ToolchainError when a tool fails."""
        sparse = bool(run.upper) or self.vast
        if self.vast and run.shift:
            return  # chosen blocks are executed at both kinds of addresses in one run
        record: dict[str, object] = {"inputs": self._inputs(run, seed)}
        faults: list[str] = []
        try:
            record["outputs"] = self._chosen(run, seed, record, faults) if sparse else self._small(run, seed, faults)
        except (Differs, Strays, KernelFault) as error:  # a tool that fails is no fault of the kernel
            at = f" ({error.where})" if error.where else ""
            faults.append(f"{error.what}{': ' if error.why else ''}{error.why}{at}")
        except TooLarge as error:
            record["not_run"] = error.why
        self.found.records.append(record)
        self.found.faults += [f"{run.describe(tuple(map(str, self.isolated.symbols)))}: {fault}" for fault in faults]

    @staticmethod
    def _inputs(run: Run, seed: int) -> dict[str, object]:
        plain: dict[str, object] = {"kind": run.kind, "seed": seed, "symbols": dict(run.symbols)}
        return plain | ({"misaligned_by": run.shift} if run.shift else {}) | ({"upper_end": run.upper} if run.upper else {})

    # -- small tensors -----------------------------------------------------------------------------------------------
    def _small(self, run: Run, seed: int, faults: list[str]) -> dict[str, object]:
        operands = make_operands(self.program, run.symbols, seed, run.kind, run.shift)
        tensors = {name: o.tensor for name, o in operands.items()}
        wanted = max(64, LARGEST // reduced(self.kernel, run.symbols))  # a matrix product has more: first, last and random points of it
        complete = self.accumulates or count(self.kernel, run.symbols) <= wanted
        points = all_points(self.kernel, run.symbols) if complete else some_points(self.kernel, run.symbols, wanted, seed)
        try:
            if self.accumulates:
                own, truth = (self._whole(operands, run.symbols, precise) for precise in (False, True))
            else:
                own, truth = (stores_at(self.program, self.kernel, tensors, run.symbols, points, precise) for precise in (False, True))
        except IRError as error:
            raise Unexecuted("the kernel is not executed", why=f"no inputs were found that it accepts: {error.what}") from error
        eager = self._eager(operands, run.symbols)
        ours = self.executor.run(self.built, operands, run.symbols)
        self._untouched(operands, ours, own, complete, faults)
        enclosed, why = self._enclosed(tensors, run.symbols, points)
        out: dict[str, object] = {}
        for name, stored in own.items():
            theirs = self._at(name, eager.get(name), operands[name], stored, complete, faults)
            value = flat(ours[name].tensor)[stored.offsets]
            judged = judge(self.program.buffer(name).dtype, value, stored.values, truth[name].values, theirs, enclosed.get(name),
                           run.kind in ORDINARY)  # fmt: skip
            out[name] = self._recorded(name, judged, why, faults)
        return out

    def _recorded(self, name: str, judged: Judged, why: str, faults: list[str]) -> dict[str, object]:
        faults += [f"stored buffer {self.actual(name)}: {fault}" for fault in judged.faults]
        return judged.record | ({"gate": f"eager only: {why}"} if why else {})

    def actual(self, name: str) -> str:
        """What the program calls a buffer of the isolated kernel."""
        return self.isolated.buffers[int(name[1:])]

    def _whole(self, operands: Mapping[str, Operand], symbols: Mapping[str, int], precise: bool) -> dict[str, Stored]:
        """Every element of each stored buffer, for a kernel whose stores add up."""
        tensors = {name: _copied(o.tensor, precise) for name, o in operands.items()}
        run_kernel(self.program, self.kernel, tensors, symbols, precise)
        return {name: Stored(torch.arange(len(v := flat(tensors[name]))), v) for name in self.kernel.writes}

    def _enclosed(
        self, tensors: Mapping[str, Tensor], symbols: Mapping[str, int], points: Mapping[str, Tensor]
    ) -> tuple[dict[str, Enclosed], str]:
        """The bounds by buffer, or why there are none."""
        try:
            if self.form is not None:
                return enclose_attention(self.program, self.form, tensors, symbols, points, self.stated), ""
            if self.kernel.numerics.rounding != "eager":
                return {}, "it rounds at other places than its text"
            return enclose(self.program, self.kernel, tensors, symbols, points, self.stated), ""
        except IRError as error:
            return {}, error.what + (f": {error.why}" if error.why else "")

    def _eager(self, operands: Mapping[str, Operand], symbols: Mapping[str, int]) -> dict[str, Tensor]:
        if self.eager is None or self.found.uncompared:
            return {}
        try:
            found = self.eager({n: o.clone().tensor for n, o in operands.items()}, symbols)
        except NoEager as error:
            self.found.uncompared = error.why
            return {}
        if missing := [n for n in self.kernel.writes if n not in found]:
            self.found.uncompared = f"{', '.join(missing)} is internal to one operator"
        return found

    def _at(
        self, name: str, eager: Tensor | None, before: Operand, stored: Stored, complete: bool, faults: list[str]
    ) -> Tensor | None:
        """Eager's values where the kernel stores; elsewhere eager must have left the buffer as it was."""
        if eager is None:
            return None
        if eager.shape != before.tensor.shape:
            faults.append(f"stored buffer {self.actual(name)}: {list(before.tensor.shape)}, eager gives {list(eager.shape)}")
            return None
        placed = flat(_laid_out(eager, before))
        rest = torch.ones(len(placed), dtype=torch.bool)
        rest[stored.offsets] = False
        was = flat(before.tensor)
        same = (placed == was) | ((placed != placed) & (was != was))
        if complete and (more := int((rest & ~same).sum())):
            faults.append(f"stored buffer {self.actual(name)}: eager changes {more} elements that the kernel does not store")
        return placed[stored.offsets]

    def _untouched(
        self, before: Mapping[str, Operand], after: Mapping[str, Operand], own: Mapping[str, Stored], complete: bool, faults: list[str]
    ) -> None:
        """A kernel writes what it stores and nothing else; where not all points were computed, nothing outside of the buffer."""
        for name, operand in before.items():
            now = after[name].memory.clone()
            if name in own:
                inside = torch.arange(len(flat(operand.tensor)))
                places = (own[name].offsets if complete else inside) + operand.start
                now[places] = operand.memory[places]
            if changed := int((now.view(torch.uint8) != operand.memory.view(torch.uint8)).sum()):
                what = "besides what it stores" if name in own else "which is an input"
                faults.append(f"it wrote {changed} bytes of the memory of buffer {self.actual(name)}, {what}")

    # -- chosen blocks or points -------------------------------------------------------------------------------------
    def _chosen(self, run: Run, seed: int, record: dict[str, object], faults: list[str]) -> dict[str, object]:
        if self.accumulates:
            raise TooLarge("not run", why="its stores add up, so every point of the domain must be computed")
        if self.form is None and (terms := reduced(self.kernel, run.symbols)) > TERMS:
            raise TooLarge("not run", why=f"one element is made of {terms:.3g} terms there; at most {TERMS:.3g} are computed")
        found: Sampled
        if self.executor.levels(self.built):
            found = run_native(self.program, self.built, self.executor, run.symbols, seed, self.stated, self.eager)
        else:
            found = run_blocks(self.program, self.built, run.symbols, seed, self._blocks(run), stated=self.stated, eager=self.eager,
                               kind=run.kind)  # fmt: skip
        record["inputs"] = self._inputs(run, seed) | {"computed": found.what, "ways": list(found.ways)}
        out: dict[str, object] = {}
        for name, ours in found.ours.items():
            judged = judge(self.program.buffer(name).dtype, ours, found.own[name], found.truth[name], None, found.enclosed.get(name),
                           self._alike(run))  # fmt: skip
            recorded = self._recorded(name, judged, "" if found.enclosed else "no bound is stated", faults)
            out[name] = recorded | self._beside(name, found, self._alike(run), faults)
        return out

    def _alike(self, run: Run) -> bool:
        """Whether a root-mean-square error of the chosen elements means something."""
        return run.kind in ORDINARY and self.form is None

    def _blocks(self, run: Run) -> int:
        """How many blocks of the grid: as many as the run says, but no more than the interpreter computes in a few seconds."""
        wanted = run.blocks or BLOCKS
        if self.form is not None or self.kernel.schedule is None:
            return wanted
        tile = math.prod(size for axis, size in self.kernel.schedule.tiles if not axis.startswith("r"))
        return max(1, min(wanted, 8 * LARGEST // (tile * reduced(self.kernel, run.symbols))))

    def _beside(self, name: str, found: Sampled, ordinary: bool, faults: list[str]) -> dict[str, object]:
        """What the rows that eager computed say; or why it computed none."""
        if found.beside.why:
            return {"eager": f"not compared: {found.beside.why if self.eager is not None else self.found.uncompared}"}
        at, theirs = found.beside.places[name], found.beside.values[name]
        judged = judge(self.program.buffer(name).dtype, found.ours[name][at], found.own[name][at], found.truth[name][at], theirs, None,
                       ordinary)  # of an attention too few elements for an RMS: upper_attention.py judges them  # fmt: skip
        faults += [f"stored buffer {self.actual(name)}, beside eager: {fault}" for fault in judged.faults]
        kept = ("equal_to_eager", "rms_eager", "rms_to_eager")
        return {"elements_with_eager": len(at)} | {key: judged.record[key] for key in kept if key in judged.record}


def _copied(tensor: Tensor, precise: bool) -> Tensor:
    """The same values in memory of their own and equal strides; floats in float64 if asked."""
    dtype = torch.float64 if precise and tensor.dtype.is_floating_point else tensor.dtype
    return torch.as_strided(flat(tensor).to(dtype, copy=True), tensor.shape, tensor.stride(), 0)


def _laid_out(eager: Tensor, like: Operand) -> Tensor:
    """Eager's values in the strides of the buffer; what is between them as it was."""
    return _copied(like.tensor, False).to(eager.dtype).copy_(eager)
