"""Is what a kernel computed right?  One stored buffer of one run against float64, the interpreter and PyTorch eager.

The rules are DESIGN's "Equal to eager", and what that cannot see: float64 comes from the kernel's own text, so eager must be near it;
a rounding left out makes a kernel more accurate, so it must also agree with the interpreter, which rounds where the text says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flagtree.check.accuracy import Accuracy, accuracy, share_within, unequal_places
from flagtree.ir.dtypes import DTYPES

Tensor = torch.Tensor
TIMES_EAGER, OF_MAGNITUDE = 4.0, 1e-6  # RMS error against float64: at most 4 times eager's plus 1e-6 of the mean magnitude
# float64 is computed from the kernel's own text, so eager must be near it too, else a pass or a lowering changed the meaning.
# Wider than the rule above: eager may sum in a worse order than we do.
EAGER_TIMES_OURS, EAGER_OF_MAGNITUDE = 8.0, 1e-5
# Share of elements that agree with the interpreter.  The only legal difference is an exp or a sum that ends an f32 ULP away: it
# changes a bf16 in about 1 of 10 000 elements and an f16 in 1 of 1 000, and is far below 256 ULP of an f32 short of cancellation.
# A missing rounding to bf16 or f16 changes a third of the elements, or moves an f32 by thousands of ULP.
AGREEING = 0.99
FEW = 2  # so many elements may always differ in the last place: a share means little in a tiny tensor
WIDE_ULPS = 256.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One stored buffer of one run.  `record`: JSON for the certificate.  `faults`: why it is wrong, in words with numbers.
    `disagrees`: the fault of the agreement with the interpreter, "" when it agrees; one run may disagree by bad luck, not two."""

    record: dict[str, object]
    faults: tuple[str, ...]
    disagrees: str = ""


def judge(dtype: str, ours: Tensor, own: Tensor, truth: Tensor, eager: Tensor | None) -> Judged:
    """`ours` was executed, `own` is the interpreter in the kernel's rounding, `truth` in float64 (for integers: as `own`)."""
    faults = _shape_faults(ours, eager)
    if faults:
        return Judged({"dtype": dtype}, tuple(faults))
    if not DTYPES[dtype].is_float:
        return _exact(dtype, ours, own, eager)
    reference = own if eager is None else eager
    mine, theirs = accuracy(ours, truth, dtype), accuracy(reference, truth, dtype)
    allowed = TIMES_EAGER * theirs.rms + OF_MAGNITUDE * mine.magnitude
    if mine.rms > allowed:
        faults.append(f"RMS error {mine.rms:.3g} against float64, {_whose(eager)}'s is {theirs.rms:.3g}, allowed {allowed:.3g}")
    near = EAGER_TIMES_OURS * max(mine.rms, accuracy(own, truth, dtype).rms) + EAGER_OF_MAGNITUDE * mine.magnitude
    if theirs.rms > near:
        faults.append(f"eager is {theirs.rms:.3g} (RMS) from what the kernel's text means, allowed {near:.3g}: its meaning is another")
    if places := unequal_places(ours, reference):
        faults.append(f"NaN or infinity at {places} places where {_whose(eager)} has another value")
    share, disagrees = _agreement(dtype, ours, own)
    return Judged(_record(dtype, ours, eager, mine, theirs, share), tuple(faults), disagrees)


def _whose(eager: Tensor | None) -> str:
    return "the interpreter" if eager is None else "eager"


def _shape_faults(ours: Tensor, eager: Tensor | None) -> list[str]:
    if eager is None or (eager.dtype == ours.dtype and eager.shape == ours.shape):
        return []
    return [f"{ours.dtype} {list(ours.shape)}, eager gives {eager.dtype} {list(eager.shape)}"]


def _exact(dtype: str, ours: Tensor, own: Tensor, eager: Tensor | None) -> Judged:
    faults = []
    for reference, name in ((own, "the interpreter"), (eager, "eager")):
        if reference is not None and (wrong := int((ours != reference).sum())):
            faults.append(f"{wrong} of {ours.numel()} elements are not {name}'s")
    record: dict[str, object] = {"dtype": dtype, "elements": ours.numel(), "equal_to_interpreter": share_within(ours, own, 0, dtype)}
    if eager is not None:
        record["equal_to_eager"] = share_within(ours, eager, 0, dtype)
    return Judged(record, tuple(faults))


def _agreement(dtype: str, ours: Tensor, own: Tensor) -> tuple[float, str]:
    """(share of elements with the interpreter's bits, what is wrong with the agreement)."""
    ulps = 0.0 if DTYPES[dtype].bits < 32 else WIDE_ULPS
    share = share_within(ours, own, ulps, dtype)
    differing = round((1 - share) * ours.numel())
    if share >= AGREEING or differing <= FEW:
        return share_within(ours, own, 0, dtype), ""
    within = f" within {ulps:g} ULP" if ulps else ""
    why = f"{differing} of {ours.numel()} elements do not agree{within} with the interpreter, which rounds where the kernel's text says"
    return share_within(ours, own, 0, dtype), why


def _record(dtype: str, ours: Tensor, eager: Tensor | None, mine: Accuracy, theirs: Accuracy, share: float) -> dict[str, object]:
    record: dict[str, object] = {
        "dtype": dtype, "elements": ours.numel(), "max_ulp": _short(mine.max_ulp), "mean_ulp": _short(mine.mean_ulp),
        "rms": _short(mine.rms), "mean_magnitude": _short(mine.magnitude), "equal_to_interpreter": _short(share),
    }  # fmt: skip
    if eager is None:
        return record | {"rms_interpreter": _short(theirs.rms)}
    apart = accuracy(ours, eager.to(torch.float64), dtype).rms
    equal = share_within(ours, eager, 0, dtype)
    return record | {"rms_eager": _short(theirs.rms), "rms_to_eager": _short(apart), "equal_to_eager": _short(equal)}


def _short(value: float) -> float:
    """Four digits: what a reader wants, and stable against the last bits of a sum."""
    return float(f"{value:.4g}")
