"""What the integers of a kernel's operand may hold: its declared domain, and values in it that depend on nothing but position and seed.

Invariant: every value makes a valid problem (each access in bounds, rows sorted by expert, a permutation of choices), empty experts and
equal bounds included.  check/inputs.py asks for whole tensors, check/positions.py for the elements that chosen points read.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flagtree.check import attention_inputs
from flagtree.check.scattered import between, scattered
from flagtree.ir import experts
from flagtree.ir.attention import form_of
from flagtree.ir.program import Kernel, Program

Tensor = torch.Tensor
# any integer of the range; in rising order; rising from 0 to `high`, which the last one is; each of 0..high once
WITHIN, ASCENDING, ENDS, PERMUTATION = "within", "ascending", "ends", "permutation"
_EMPTY = 0.25  # share of the parts between two ends that hold nothing


@dataclass(frozen=True, slots=True)
class Limits:
    """What a buffer's elements may be: integers from `low` to `high` inclusive (0 or more for unsigned ones), in the order that `kind`
    says; floats `positive`."""

    low: int
    high: int
    positive: bool = False
    kind: str = WITHIN


def declared(program: Program, kernel: Kernel, symbols: Mapping[str, int]) -> dict[str, Limits]:
    """The domains of the operands of a kernel whose form says more than its accesses: which keys a row of an attention sees; where the
    rows of each expert end and which choice each row is."""
    if (form := form_of(program)) is not None:
        told = attention_inputs.told(program, form, symbols)
        return {} if told is None else {told[0]: Limits(0, told[1], kind=ASCENDING if told[2] else WITHIN)}
    if (known := experts.known(program, kernel)) is not None and not known.product.dense:
        rows = kernel.axes[0].extent.evaluate(symbols)
        return {known.names.starts: Limits(0, rows, kind=ENDS), known.names.order: Limits(0, max(0, rows - 1), kind=PERMUTATION)}
    return {}


def arranged(limits: Limits, positions: Tensor, count: int, seed: int) -> Tensor:
    """The integers (int64) at `positions` of an operand of `count` elements whose kind has an order."""
    match limits.kind:
        case "ascending":
            span = limits.high - limits.low + 1
            return limits.low + (positions * span + between(scattered(positions, seed), 0, span)) // max(1, count)
        case "ends":
            return torch.tensor(_ends(count, limits.high, seed))[positions]
        case _:
            factor = _coprime(limits.high + 1, seed)
            return (positions * factor + seed % (limits.high + 1)) % (limits.high + 1)


def _ends(count: int, total: int, seed: int) -> list[int]:
    """Ends of count - 1 parts of `total`; about a quarter of the parts are empty, the others of unequal size."""
    chance = random.Random(seed)
    shares = [0 if chance.random() < _EMPTY else chance.randrange(1, 1 << 20) for _ in range(count - 1)]
    if shares and not any(shares):
        shares[chance.randrange(len(shares))] = 1
    running = [0, *itertools.accumulate(shares)]
    return [total * part // max(1, running[-1]) for part in running]


def _coprime(size: int, seed: int) -> int:
    """A factor that maps 0..size-1 onto itself and neighbours far apart."""
    factor = max(1, int(size * 0.618) + seed % 7)
    while math.gcd(factor, size) != 1:
        factor += 1
    return factor
