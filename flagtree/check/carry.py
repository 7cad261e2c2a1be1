"""What stays true of a bundle's report and certificate when some of its kernels get another binary.

Invariant: nothing that was measured is changed or claimed for the new binary: its record says what made it, from which text, and that
it was not executed.  `flagtree/finalize.py` writes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flagtree.check.report import PartReport, fact
from flagtree.toolchain.base import BuiltKernel

# what the numbers of a record are about, seen from a binary that was made of each text
_FROM = {
    "kernel.py": "built anew from kernel.py, so what was executed is another build of the same source",
    "llir": "made from the bundle's LLVM IR",
    "ptx": "made from the bundle's PTX",
}


def carried_evidence(
    evidence: Mapping[str, Any], kernels: Mapping[str, BuiltKernel], tool: str, made_from: str, bundle: str
) -> dict[str, Any]:
    """The certificate's evidence for the bundle with `kernels` in it; `bundle` is the digest of the one that they come from."""
    note = f"by {tool}, {_FROM[made_from]}; not executed"
    records = {
        digest: {**record, "binary": note} if digest in kernels and isinstance(record, Mapping) else record
        for digest, record in evidence.get("kernels", {}).items()
    }
    step = {"from": bundle, "tool": tool, "kernels": len(kernels)}
    return {**evidence, "kernels": records, "finalized": [*evidence.get("finalized", []), step]}


def carried_coverage(coverage: Mapping[str, Any], kernels: Mapping[str, BuiltKernel]) -> dict[str, Any]:
    """The coverage with tier, registers and shared bytes of `kernels` in each part's report; a report that is none stays as it is."""
    return {part: _with_report(promised, kernels) for part, promised in coverage.items()}


def _with_report(promised: Any, kernels: Mapping[str, BuiltKernel]) -> Any:
    try:
        report = PartReport.from_dict(promised["report"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return promised
    rows = []
    for row in report.kernels:
        if (built := kernels.get(row.digest)) is not None:
            registers, spills, shared = (fact(built.facts, name) for name in ("registers", "spills", "shared"))
            row = replace(row, tier=built.tier, missing=built.missing, registers=registers, spills=spills, shared=shared)
        rows.append(row)
    return {**promised, "report": replace(report, kernels=tuple(rows)).to_dict()}
