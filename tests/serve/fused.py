"""What of a recorded graph lies in generated kernels: ATen calls by the recording, which has a step a call, and what its bundle leaves.

Not counted on either side: views and bare allocations, products, experts' products, attention, the cache, embedding, collectives.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from flagtree.artifact.bundle import Bundle
from flagtree.artifact.recording import RecordedGraph
from flagtree.check.report import KernelRow, PartReport
from flagtree.ir.parse import parse_program
from flagtree.ir.program import Extern, Kernel

NOT_COUNTED = re.compile(
    r"aten\.(linear|mm|addmm|bmm|matmul|embedding|empty\w*|new_empty)\b|_C\.(cpu_fused_moe|onednn_\w+|shm_\w+)\b"
    r"|vllm\.(unified_\w+|all_reduce|all_gather|reduce_scatter)\b|_c10d_functional\."
)


@dataclass(frozen=True)
class Fused:
    """`calls`: by operator, as recorded; `left`: those that the bundle leaves to the library; `kernels`: what it generates."""

    calls: Counter[str]
    left: Counter[str]
    kernels: tuple[KernelRow, ...]

    @property
    def share(self) -> float:
        """Of the calls that lie in generated kernels."""
        return 1 - self.left.total() / self.calls.total()

    def having(self, *ops: str) -> list[KernelRow]:
        """Kernels that compute all of `ops`."""
        return [k for k in self.kernels if all(f"aten.{op}" in {o.rsplit(".", 1)[0] for o in k.ops} for op in ops)]


def fused(graph: RecordedGraph, bundle: Bundle) -> Fused:
    """Of one graph and the bundle that was made of it."""
    calls: Counter[str] = Counter()
    for step in parse_program(graph.program).steps:
        if isinstance(step, Kernel):
            calls.update(step.ops)
        elif isinstance(step, Extern):
            calls[step.callee] += 1
    told = bundle.manifest.coverage[graph.name]
    assert isinstance(told, dict)
    report = PartReport.from_dict(told["report"])
    left = Counter({row.callee: row.count for row in report.externs if not NOT_COUNTED.match(row.callee)})
    return Fused(Counter({c: n for c, n in calls.items() if not NOT_COUNTED.match(c)}), left, report.kernels)
