"""The rule "equal to eager" (`equal_to_eager.py`) for gradients: a function or module is run forward and backward, eagerly, in float64
and compiled, on copies of its operands; results, gradients, written operands and running statistics are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from flagtree.runtime.compile import backend
from tests.runtime.equal_to_eager import compare

Function = Callable[..., Any]


def check_gradients(function: Function, *args: Any, dynamic: bool | None = False, seed: int = 0, rounds: int = 1) -> None:
    """`function(*args)` gives tensors in any nesting.  Each differentiable one is multiplied by fixed random numbers, the sum is
    differentiated with respect to every parameter and every operand that asks for a gradient.  More `rounds` accumulate gradients."""
    torch._dynamo.reset()
    eager, exact, have = (_run(kind, function, args, dynamic, seed, rounds) for kind in ("eager", "exact", "compiled"))
    assert list(eager) == list(have), "who has a gradient"
    for name, want in eager.items():
        truth = exact.get(name, want)
        compare(want, have[name], truth, name)


def _run(kind: str, function: Function, args: tuple[Any, ...], dynamic: bool | None, seed: int, rounds: int) -> dict[str, Any]:
    function, args = copy.deepcopy((function, [_plain(a) for a in args]))
    args = [_as_given(a, kind == "exact") for a in args]
    if isinstance(function, torch.nn.Module):
        function = function.double() if kind == "exact" else function
    called = torch.compile(function, backend=backend, dynamic=dynamic) if kind == "compiled" else function
    found: dict[str, Any] = {}
    for k in range(rounds):
        torch.manual_seed(seed)
        # a leaf cannot be written in place: functions get a copy that the graph of gradients knows
        given = [tree_map(lambda a: a * 1 if _wanted(a) else a, x) for x in args]
        results = list(tree_leaves(called(*given)))
        total = _weighted(results)
        if total is not None:
            total.backward()
        found |= {f"round {k}, result {i}": x for i, x in enumerate(results)}
        found |= {f"round {k}, operand {i}": x for i, x in enumerate(tree_leaves(given)) if isinstance(x, torch.Tensor)}
    found |= {f"gradient of operand {i}": x.grad for i, x in enumerate(tree_leaves(args)) if _wanted(x) and x.grad is not None}
    if isinstance(function, torch.nn.Module):
        found |= {f"gradient of {n}": p.grad for n, p in function.named_parameters() if p.grad is not None}
        found |= {f"buffer {n}": b for n, b in function.named_buffers()}
    return found


def _wanted(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _plain(value: Any) -> Any:
    """Operands as (tensor without history, wanted): deep copies keep strides and shared storages."""
    return tree_map(lambda x: (x.detach(), x.requires_grad) if isinstance(x, torch.Tensor) else x, value)


def _as_given(value: Any, exact: bool) -> Any:
    def one(pair: Any) -> Any:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], torch.Tensor)):
            return pair
        tensor, wanted = pair
        tensor = tensor.double() if exact and tensor.is_floating_point() else tensor
        return tensor.requires_grad_(wanted)

    return tree_map(one, value, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], torch.Tensor))


def _weighted(results: list[Any]) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(5)
    total = None
    for x in results:
        if isinstance(x, torch.Tensor) and x.requires_grad:
            weights = torch.randn(x.shape, generator=generator).to(x.dtype)
            term = (x * weights).sum()
            total = term if total is None else total + term.to(total.dtype)
    return total
