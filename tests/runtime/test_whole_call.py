"""A whole call in C against eager: results, memory between kernels, threads, references, errors, and what it leaves to the frame."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from flagtree.runtime.compile import Callee, backend, observed


def compiled(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> tuple[Callable[..., Any], Callee]:
    """The compiled function after its first call, and its graph."""
    torch._dynamo.reset()
    with observed() as graphs, torch.no_grad():
        run = torch.compile(function, backend=backend, dynamic=dynamic)
        run(*args)
    (graph,) = graphs
    return torch.no_grad()(run), graph


def norm(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w
    return y, x


def columns(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)).square().sum(1)  # two kernels, what passes between them lies in the arena


X, W = torch.randn(7, 33), torch.randn(33)


@pytest.mark.parametrize(("function", "args"), [(norm, (X, W)), (columns, (X,)), (lambda x: x[:, 3:] * 2, (X,)), (torch.sin, (X[:0],))])
def test_equals_eager_call_after_call(function: Callable[..., Any], args: tuple) -> None:
    run, graph = compiled(function, *args)
    assert graph.executable.whole is not None
    earlier = [(given, run(*given)) for given in ([torch.randn_like(a) for a in args] for _ in range(3))]
    for given, results in earlier:  # later calls write nothing that earlier ones returned
        torch.testing.assert_close(results, function(*given))


def test_an_input_comes_back_as_itself() -> None:
    _, graph = compiled(norm, X, W)
    result = graph(X, W)
    whole = graph.executable.whole
    assert whole is not None
    assert [r is X for r in whole(X, W)] == [r is X for r in result]


def test_threads_at_once() -> None:
    """One holds the frame, the others go step by step."""
    _, graph = compiled(columns, X)
    whole = graph.executable.whole
    assert whole is not None

    def work(seed: int) -> bool:
        x = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed))
        want = columns(x)
        return all(torch.allclose(graph(x)[0], want, atol=1e-4) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert whole(X) is not None  # free again


def test_references_are_given_back() -> None:
    _, graph = compiled(norm, X, W)
    whole = graph.executable.whole
    assert whole is not None
    x, w = X.clone(), W.clone()
    (kept,) = {id(r): r for r in whole(x, w) if r is not x}.values()
    before = [sys.getrefcount(o) for o in (x, w, None, *graph.executable.prepared.layouts)]
    for _ in range(1000):
        whole(x, w)
    after = [sys.getrefcount(o) for o in (x, w, None, *graph.executable.prepared.layouts)]
    assert [abs(a - b) < 50 for a, b in zip(after, before, strict=True)] == [True] * len(before)
    assert sys.getrefcount(kept) == 2


def test_what_torch_raises_is_raised_and_the_next_call_is_right() -> None:
    run, graph = compiled(norm, X, W)
    whole = graph.executable.whole
    assert whole is not None
    with pytest.raises(TypeError, match="data_ptr"):
        whole(X, "w")
    with pytest.raises(RuntimeError, match="storage"):
        torch.func.vmap(lambda x: whole(x, W))(X[None])
    torch.testing.assert_close(run(X, W), norm(X, W))


def test_what_is_left_to_the_frame() -> None:
    _, graph = compiled(norm, X, W)
    assert graph.executable.whole is not None
    assert graph.executable.whole(X) is None  # another number of arguments
    assert compiled(norm, X, W, dynamic=True)[1].executable.whole is None  # sizes that change
    assert compiled(lambda x, w: (x @ w).relu(), X, W)[1].executable.whole is None  # an extern
    run, graph = compiled(lambda x: x.add_(1), X.clone())
    x = X.clone()
    run(x)
    torch.testing.assert_close(x, X + 1)
