"""What a compile did, as data: kernels and externs per part, bytes moved, tiers, what was executed, where the bundle is.

Every number is counted or measured by the part that fills it in; None means that nobody told, never zero.  `flagtree.compile`
builds these, the command line prints them (cli/table.py) and `to_json` is what `--json` writes.  Imports neither torch nor sympy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One generated kernel as it stands in one part's launch list.

    `launches`: how often one call of the part launches it, all layers counted.  `ops`: the ATen ops fused into it, in order.
    `missing`: what the next tier would need, empty at the target's last tier.  `bytes_before`: memory traffic of one launch if
    each of `ops` read its inputs and wrote its outputs once; `bytes_after`: what the kernel's own loads and stores move.  Both
    at the part's reference sizes.  `registers` per thread, `spills` in bytes per thread, `shared` in bytes per program
    instance; None where the toolchain does not tell.
    """

    name: str
    digest: str
    part: str
    launches: int
    ops: tuple[str, ...]
    tier: str
    missing: str
    bytes_before: int
    bytes_after: int
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None


def fact(facts: Mapping[str, object], name: str) -> int | None:
    """A number that the toolchain told, from the aligned variant where there are several."""
    value = facts.get(name)
    if value is None:
        variant = facts.get("aligned")
        value = variant.get(name) if isinstance(variant, Mapping) else None
    return value if isinstance(value, int) else None


@dataclass(frozen=True, slots=True)
class ExternRow:
    """All calls of one callee for one reason in one part.  `count`: calls in one run of the part; `bytes`: what all of them move."""

    callee: str
    part: str
    count: int
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class PartReport:
    """One part of a bundle (prefill, decode).  `reference`: the symbol values at which bytes are counted.

    `..._per_layer` describe one period of the model's `Repeat` (None where the part has none): generated kernels, and bytes
    of kernels and externs together.  `launches_total` counts the generated kernels of one run of the part.  `weights`: named
    weights that it binds.  `symbols`: name to (lowest, highest, multiple), which is the coverage that the bundle promises.
    `about`: whose graph it is and where it comes from, when the name does not say it.
    """

    name: str
    target: str
    kernels: tuple[KernelRow, ...]
    externs: tuple[ExternRow, ...]
    launches_total: int
    weights: int
    launches_per_layer: int | None = None
    bytes_before_per_layer: int | None = None
    bytes_after_per_layer: int | None = None
    symbols: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    reference: Mapping[str, int] = field(default_factory=dict)
    about: str = ""

    @property
    def bytes_before(self) -> int:
        """Bytes that the generated kernels' ops would move unfused in one run of the part; externs are counted apart."""
        return sum(row.bytes_before * row.launches for row in self.kernels)

    @property
    def bytes_after(self) -> int:
        """Bytes that the generated kernels move in one run of the part."""
        return sum(row.bytes_after * row.launches for row in self.kernels)

    @property
    def bytes_extern(self) -> int:
        return sum(row.bytes for row in self.externs)

    @property
    def calls_extern(self) -> int:
        return sum(row.count for row in self.externs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data.  Totals are repeated in it, so that a script need not add up; `from_dict` leaves them out again."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "bytes_extern": self.bytes_extern,
                  "calls_extern": self.calls_extern}
        return {**asdict(self), "totals": totals}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PartReport:
        """Inverse of `to_dict`, also after a trip through JSON.  Raises KeyError or TypeError for other data."""
        plain = {k: v for k, v in data.items() if k != "totals"}
        return cls(**{
            **plain,
            "kernels": tuple(KernelRow(**{**row, "ops": tuple(row["ops"])}) for row in plain["kernels"]),
            "externs": tuple(ExternRow(**row) for row in plain["externs"]),
            "symbols": {name: tuple(bounds) for name, bounds in plain["symbols"].items()},
        })


@dataclass(frozen=True, slots=True)
class BundleReport:
    """One bundle for one target.  `tiers`: tier to number of distinct kernels.  `seconds`: wall time by phase.
    `cached`: nothing was compiled, the store had it.  `executed`: how a kernel was run ("native x86-64-v3",
    "maca-ir (emulated)") to the number of distinct kernels run that way; empty when none was executed.  `stored`: distinct
    kernels that the store had when this bundle was built, from other models or earlier builds."""

    target: str
    path: str
    digest: str
    parts: tuple[PartReport, ...]
    tiers: Mapping[str, int]
    seconds: Mapping[str, float] = field(default_factory=dict)
    cached: bool = False
    executed: Mapping[str, int] = field(default_factory=dict)
    stored: int = 0

    @property
    def kernels(self) -> int:
        """Distinct kernels: equal digests are one compiled kernel, also across parts."""
        return len({row.digest for part in self.parts for row in part.kernels})


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What `flagtree compile` did for one model: one bundle a target."""

    model: str
    bundles: tuple[BundleReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with a format number."""
        bundles = [{**asdict(b), "kernels": b.kernels, "parts": [part.to_dict() for part in b.parts]} for b in self.bundles]
        return {"format": FORMAT, "model": self.model, "bundles": bundles}

    def to_json(self) -> str:
        """One line of JSON, phases and sizes in their own order.  A NaN or an infinity is an error here, not a surprise for the reader."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CompileReport:
        """Inverse of `to_json`.  Raises ValueError for text that is not such a report."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"compile report of format {data['format']!r}, this reads {FORMAT}")
            return cls(data["model"], tuple(_bundle(entry) for entry in data["bundles"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a compile report: {error!r}") from error


def _bundle(data: dict[str, Any]) -> BundleReport:
    plain = {k: v for k, v in data.items() if k != "kernels"}
    return BundleReport(**{**plain, "parts": tuple(PartReport.from_dict(part) for part in plain["parts"])})
