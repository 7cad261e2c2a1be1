"""The whole list of passes, readable top to bottom, and the runner that verifies and reports after each.

Adding a pass is one file and one line in PASSES; out of tree by the entry point group `flagtree.passes`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import time
from collections.abc import Callable, Sequence

from flagtree.errors import FlagtreeError, UnknownName
from flagtree.ir.program import Program
from flagtree.ir.verify import verify
from flagtree.passes.attention import Attention
from flagtree.passes.base import Fuel, Pass, Report
from flagtree.passes.canonicalize import Canonicalize
from flagtree.passes.expert_products import ExpertProducts
from flagtree.passes.fuse_pointwise import FusePointwise
from flagtree.passes.fuse_reduction import FuseReduction
from flagtree.passes.group_heads import GroupHeads
from flagtree.passes.lookups import Lookups
from flagtree.passes.reinplace import Reinplace
from flagtree.passes.scaled_products import ScaledProducts
from flagtree.passes.schedule import ScheduleKernels
from flagtree.passes.small_products import SmallProducts
from flagtree.passes.split_reduction import SplitReduction
from flagtree.targets.base import Target

_OURS = (
    Canonicalize, GroupHeads, Lookups, Reinplace, FusePointwise, FuseReduction, SmallProducts, ExpertProducts, ScaledProducts,
    SplitReduction, Attention, ScheduleKernels,
)  # fmt: skip
PASSES: dict[str, type] = {p.name: p for p in _OURS}
_SPEC = r"([A-Za-z_]\w*)\s*(?:\{([^}]*)\})?\s*(?:,|$)"
After = Callable[[Pass, Program, Report], None]


def known_passes() -> dict[str, type]:
    """Ours and those of installed packages, by name.  FlagtreeError when two have one name: nothing is overridden silently."""
    found = dict(PASSES)
    for entry in importlib.metadata.entry_points(group="flagtree.passes"):
        if entry.name in found:
            raise FlagtreeError(f"two passes are called '{entry.name}'", where=entry.value, hint="uninstall one of the packages")
        found[entry.name] = entry.load()
    return found


def pipeline(target: Target) -> tuple[Pass, ...]:
    """Program as lowered to Program as generated, for one target."""
    return (
        Canonicalize(),      # views into indices, casts, common subexpressions, dead code
        GroupHeads(),        # attention of one token reads shared key heads where they lie
        Lookups(),           # embeddings that are added up are read in place, their indices checked
        Reinplace(),         # a state rewritten through a copy is written in place
        FusePointwise(),     # chains, gating, rotary
        FuseReduction(),     # norms and softmax with what surrounds them
        Canonicalize(),
        SmallProducts(),     # products of few rows as our own kernel
        ExpertProducts(),    # the products of a mixture of experts, gate included, as our own kernels
        ScaledProducts(),    # products of quantised activations and weights as our own kernels
        SplitReduction(),    # long sums over rows into partial and final
        Attention(),         # attention as our own kernel, where the target's facts say so
        ScheduleKernels(),   # tiles under the target's limits
    )  # fmt: skip


def run_pipeline(
    program: Program,
    passes: Sequence[Pass],
    target: Target,
    *,
    fuel: Fuel | None = None,
    after: After | None = None,
    check: bool = True,
) -> tuple[Program, list[Report]]:
    """Run `passes` in order; the program is verified before the first and after each one that changed it."""
    fuel, reports = fuel or Fuel(), []
    if check:
        verify(program)
    for p in passes:
        started = time.perf_counter()
        changed, report = p.run(program, target, fuel)
        report.seconds = time.perf_counter() - started
        if check and changed is not program:
            verify(changed)
        program = changed
        reports.append(report)
        if after is not None:
            after(p, program, report)
    return program, reports


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """`canonicalize, fuse_pointwise{max_ops=4}` to passes; the inverse of joining `spec(p)` with commas."""
    passes, known = [], known_passes()
    found = re.findall(_SPEC, text.strip())
    if re.sub(_SPEC, "", text.strip()).strip():
        hint = "passes are separated by commas: canonicalize, fuse_pointwise{max_ops=64}"
        raise FlagtreeError(f"cannot read the pipeline '{text}'", hint=hint)
    for name, options in found:
        if name not in known:
            raise UnknownName("pass", name, known)
        passes.append(known[name](**_options(known[name], options)))
    if not passes:
        raise FlagtreeError(f"no pass in '{text}'", hint="flagtree opt FILE -p 'canonicalize, fuse_pointwise{max_ops=64}'")
    return tuple(passes)


def _options(cls: type, text: str) -> dict[str, object]:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    out: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (x.strip() for x in item.partition("="))
        if key not in fields:
            raise UnknownName(f"option of {cls.name}", key, fields)  # type: ignore[attr-defined]
        default = getattr(cls, key)
        try:
            out[key] = value == "true" if isinstance(default, bool) else type(default)(value)
        except ValueError as error:
            raise FlagtreeError(f"option {key}={value} of pass {cls.name}", why=str(error)) from error  # type: ignore[attr-defined]
    return out
