"""The gate of the certificate: does every element lie where the stated errors allow, and does the kernel agree with eager?

A kernel of exactly rounded operations must have the interpreter's bits; functions and sums are allowed their stated errors, propagated
through the body (check/enclosure.py).  Float64 is computed from the kernel's own text, so eager must be near it too, else the text is
wrong.  Used by check/certify.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flagtree.check.accuracy import Accuracy, accuracy, share_within, unequal_places
from flagtree.check.enclosure import Enclosed
from flagtree.ir.dtypes import DTYPES

Tensor = torch.Tensor
# DESIGN, "Equal to eager": RMS error against float64 at most 4 times eager's plus 1e-6 of the mean magnitude
TIMES_EAGER, OF_MAGNITUDE = 4.0, 1e-6
# The other way round: wider, because eager may sum in a worse order than we do
EAGER_TIMES_OURS, EAGER_OF_MAGNITUDE = 8.0, 1e-5


@dataclass(frozen=True, slots=True)
class Judged:
    """One stored buffer of one run.  `record`: JSON for the certificate.  `faults`: why it is wrong, in words with numbers."""

    record: dict[str, object]
    faults: tuple[str, ...]


def judge(
    dtype: str, ours: Tensor, own: Tensor, truth: Tensor, eager: Tensor | None, enclosed: Enclosed | None, ordinary: bool = True
) -> Judged:
    """All one-dimensional, element for element: `ours` was executed, `own` is the interpreter in the kernel's dtypes, `truth` in float64,
    `eager` PyTorch's.  `ordinary`: the inputs are of one magnitude, so that a root-mean-square error means something."""
    faults: list[str] = []
    if eager is not None and eager.dtype != ours.dtype:
        return Judged({"dtype": dtype}, (f"{ours.dtype}, eager gives {eager.dtype}",))
    record: dict[str, object] = {"dtype": dtype, "elements": ours.numel()}
    if enclosed is not None:
        faults += outside(ours, enclosed)
        record["gate"] = "the interpreter's bits" if enclosed.exact else "stated error"
        if not enclosed.exact:
            open_ = ~((enclosed.low == enclosed.high) | (enclosed.low != enclosed.low))
            record["not_one_number"] = short(float(open_.double().mean()) if open_.numel() else 0.0)
    record["equal_to_interpreter"] = short(share_within(ours, own, 0, dtype))
    if eager is not None:
        record["equal_to_eager"] = short(share_within(ours, eager, 0, dtype))
    if not DTYPES[dtype].is_float:
        for reference, name in ((own if enclosed is None else None, "the interpreter"), (eager, "eager")):
            if reference is not None and (wrong := int((ours != reference).sum())):
                faults.append(f"{wrong} of {ours.numel()} elements are not {name}'s")
        return Judged(record, tuple(faults))
    mine = accuracy(ours, truth, dtype)
    record |= {"max_ulp": short(mine.max_ulp), "mean_ulp": short(mine.mean_ulp)}
    record |= {"rms": short(mine.rms), "mean_magnitude": short(mine.magnitude)}
    reference = own if eager is None else eager
    theirs = accuracy(reference, truth, dtype)
    record["rms_interpreter" if eager is None else "rms_eager"] = short(theirs.rms)
    if eager is not None:
        record["rms_to_eager"] = short(accuracy(ours, eager.double(), dtype).rms)
    if ordinary:
        faults += _errors(mine, theirs, accuracy(own, truth, dtype), eager is None)
        if places := unequal_places(ours, reference):
            faults.append(f"NaN or infinity at {places} places where {_whose(eager is None)} has another value")
    return Judged(record, tuple(faults))


def _errors(mine: Accuracy, theirs: Accuracy, own: Accuracy, alone: bool) -> list[str]:
    faults = []
    allowed = TIMES_EAGER * theirs.rms + OF_MAGNITUDE * mine.magnitude
    if mine.rms > allowed:
        faults.append(f"RMS error {mine.rms:.3g} against float64, {_whose(alone)}'s is {theirs.rms:.3g}, allowed {allowed:.3g}")
    near = EAGER_TIMES_OURS * max(mine.rms, own.rms) + EAGER_OF_MAGNITUDE * mine.magnitude
    if theirs.rms > near:
        faults.append(f"eager is {theirs.rms:.3g} (RMS) from what the kernel's text means, allowed {near:.3g}: its meaning is another")
    return faults


def _whose(alone: bool) -> str:
    return "the interpreter" if alone else "eager"


def outside(ours: Tensor, enclosed: Enclosed) -> list[str]:
    """Elements that do not lie where they must, with the first of them in numbers."""
    low, high = enclosed.low, enclosed.high
    value = ours.double() if ours.is_floating_point() else ours
    low, high = (x.double() if x.is_floating_point() else x for x in (low, high))
    nan = low != low
    anything = torch.isinf(low) & torch.isinf(high) & (low < high) if low.is_floating_point() else torch.zeros_like(nan)
    right = torch.where(nan, value != value, (value >= low) & (value <= high)) | anything
    wrong = (~right).nonzero().flatten()
    if not wrong.numel():
        return []
    k = int(wrong[0])
    place, where = int(enclosed.offsets[k]), f"{float(low[k]):.9g} to {float(high[k]):.9g}"
    where = f"{float(low[k]):.9g}" if bool(low[k] == high[k]) or bool(nan[k]) else where
    what = "the interpreter's" if enclosed.exact else "within the stated errors"
    return [f"{wrong.numel()} of {ours.numel()} elements are not {what}: element {place} is {float(value[k]):.9g}, must be {where}"]


def short(value: float) -> float:
    """Four digits: what a reader wants, and stable against the last bits of a sum."""
    return float(f"{value:.4g}")
