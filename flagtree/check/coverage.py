"""How many ATen calls a program executes, eagerly and compiled: what we generate, counted by what is left.

Rule: every operator call below autograd counts, forward and backward, as one dispatch mode sees them on a real run, with the same
mode on both sides; views, bare allocations and `detach` count on neither.  Our kernels are no ATen calls; externs are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flagtree.runtime import compile as compiling

# they make a view or a tensor without values although no alias annotation says so
_FREE = ("aten._unsafe_view", "aten.detach", "aten.lift_fresh", "aten._reshape_alias")


class _Counter(TorchDispatchMode):
    """Counts calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code runs under this mode rather than being skipped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _counts(func):
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _counts(func: torch._ops.OpOverload) -> bool:
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    name = str(func).rsplit(".", 1)[0]
    allocation = name.startswith("aten.") and "empty" in name
    return not (view or allocation or name in _FREE or func.namespace in ("prim", "profiler"))


def aten_calls(run: Callable[[], object]) -> Counter[str]:
    """ATen calls that `run` executes, by operator."""
    with _Counter() as counter:
        run()
    return counter.calls


@dataclass(frozen=True)
class Coverage:
    """`eager`, `left`: calls by operator, eagerly and compiled; `externs`: (callee, reason) to how often the launch lists name it;
    `kernels`: launches of generated kernels in them."""

    eager: Counter[str]
    left: Counter[str]
    externs: Counter[tuple[str, str]]
    kernels: int

    @property
    def share(self) -> float:
        """Calls left per call of eager's."""
        return self.left.total() / self.eager.total()


def coverage(function: Callable[..., Any], run: Callable[[Callable[..., Any]], object]) -> Coverage:
    """Count `run(function)` and `run(compiled function)`; the latter has run once before, so that compilation is not counted.

    `run` calls what it is given, and may run a backward pass.  Raises what they and the compiler raise.
    """
    eager = aten_calls(lambda: run(function))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=compiling.backend)
    with compiling.observed() as graphs:
        run(compiled)
    left = aten_calls(lambda: run(compiled))
    externs: Counter[tuple[str, str]] = Counter()
    kernels = 0
    for graph in graphs:
        for step in graph.launch["steps"]:
            if "extern" in step:
                externs[step["extern"], step["reason"]] += 1
            else:
                kernels += 1
    return Coverage(eager, left, externs, kernels)
