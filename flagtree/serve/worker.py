"""`worker_extension_cls="flagtree.serve.worker.Report"`: each rank tells what it found, missed and compiled.

vLLM mixes the class into its worker; `llm.collective_rpc("flagtree_report")` returns one answer a rank.
"""

from __future__ import annotations

from typing import Any

from flagtree.serve.counts import report
from flagtree.serve.metrics import publish


class Report:
    """The methods that a worker gains; names begin with `flagtree_`, so that they meet no other."""

    rank: int

    def flagtree_report(self) -> dict[str, Any]:
        """Plain JSON data: the rank, and `flagtree.serve.counts.report` of its process."""
        publish()
        return {"rank": getattr(self, "rank", 0), **report()}
