"""Give every kernel its schedule: a deterministic function of the kernel and the target's facts, never a timing race.

A target without warps (the CPU) has none: its generator walks rows in sweeps whose vector width is the level's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flagtree.ir.canonical import isolate
from flagtree.ir.program import Kernel, Program, Schedule
from flagtree.passes.base import Fuel, Report
from flagtree.passes.rewrite import map_kernels
from flagtree.passes.tiling import default_schedule
from flagtree.targets.base import Target


@dataclass(frozen=True)
class ScheduleKernels:
    """No options; a kernel that has a schedule keeps it."""

    name: ClassVar[str] = "schedule"
    version: ClassVar[int] = 1

    def run(self, program: Program, target: Target, fuel: Fuel | None = None) -> tuple[Program, Report]:
        report = Report(self.name)

        def change(kernel: Kernel) -> Kernel:
            if target.warp <= 1 or kernel.schedule is not None:
                return kernel
            report.rewrites += 1
            return replace(kernel, schedule=schedule_of(program, kernel, target))

        return map_kernels(program, change), report


def schedule_of(program: Program, kernel: Kernel, target: Target) -> Schedule:
    """Decided on the isolated kernel, so that equal kernels get equal schedules, then said in the kernel's own axis names."""
    alone = isolate(program, kernel)
    schedule = default_schedule(alone.program, target)
    names = {canonical.name: own.name for own, canonical in zip(kernel.axes, alone.kernel.axes, strict=True)}
    return replace(
        schedule,
        lane=names.get(schedule.lane or "", schedule.lane),
        tiles=tuple((names.get(axis, axis), size) for axis, size in schedule.tiles),
        loop=tuple(names.get(axis, axis) for axis in schedule.loop),
    )
