"""The capture key: one computation has one key in every process, and everything that the compiled graph depends on changes it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from flagtree.runtime.capture_key import CaptureKey, Unkeyed, capture_key

FACTORS = {"torch": torch.__version__, "level": "x86-64-v3"}


def graph_of(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> fx.GraphModule:
    """The graph that Dynamo hands over."""
    found: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(module)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=keep, dynamic=dynamic)(*args)
    return found[0]


def key_of(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> CaptureKey:
    return capture_key(graph_of(function, *args, dynamic=dynamic), FACTORS)


def scaled(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return (x * factor).sum(-1)


X = torch.ones(4, 6)
BASE = key_of(scaled, X).digest


def test_names_do_not_enter() -> None:
    def other(another_name: torch.Tensor) -> torch.Tensor:
        product = another_name * 2.0
        return product.sum(-1)

    assert key_of(other, X + 1).digest == BASE


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (scaled, X.bfloat16()),
        (scaled, torch.ones(4, 7)),
        (scaled, torch.ones(6, 4).t()),
        (lambda x: scaled(x, 3.0), X),
        (lambda x: scaled(x, 2), X),
        (lambda x: (x * 2.0).sum(0), X),
        (lambda x: (x * 2.0).amax(-1), X),
        (lambda x: (x * 2.0, (x * 2.0).sum(-1)), X),
    ],
    ids=["dtype", "shape", "stride", "constant", "kind of constant", "argument", "operator", "results"],
)
def test_what_matters_enters(function: Callable[..., Any], value: torch.Tensor) -> None:
    assert key_of(function, value).digest != BASE


def test_factors_enter() -> None:
    module = graph_of(scaled, X)
    assert capture_key(module, FACTORS | {"level": "x86-64-v4"}).digest != capture_key(module, FACTORS).digest == BASE


def test_gradients_enter() -> None:
    def with_gradient() -> torch.Tensor:
        found: list[str] = []

        def keep(module: fx.GraphModule, _: object) -> Callable[..., Any]:
            found.append(capture_key(module, FACTORS).digest)
            return module.forward

        torch._dynamo.reset()
        torch.compile(scaled, backend=keep)(X.clone().requires_grad_())
        return found[0]

    assert with_gradient() != BASE


def test_symbols_are_renamed_in_order_and_ranges_enter() -> None:
    first, second = (key_of(scaled, torch.ones(*shape), dynamic=True) for shape in ((4, 6), (5, 9)))
    assert first.digest == second.digest != BASE
    assert sorted(first.renamed.values()) == ["s0", "s1"]

    def bounded(x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[0] <= 64)
        return scaled(x)

    assert key_of(bounded, X, dynamic=True).digest != first.digest


def test_constants_enter_by_content() -> None:
    tables = torch.arange(6.0), torch.arange(6.0), torch.arange(6.0) + 1
    keys = []
    for table in tables:
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["example_value"] = torch.ones(6)
        graph.output((graph.call_function(torch.add, (x, graph.get_attr("table"))),))
        module = fx.GraphModule({"table": table}, graph)
        keys.append(capture_key(module, FACTORS).digest)
    assert keys[0] == keys[1] != keys[2]


def test_what_has_no_identity_has_no_key() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(6)
    graph.output((graph.call_function(lambda v: v, (x,)),))
    with pytest.raises(Unkeyed):
        capture_key(fx.GraphModule({}, graph), FACTORS)


@pytest.mark.parametrize("seed", ["0", "77"])
def test_other_processes_and_hash_seeds_agree(seed: str) -> None:
    program = (
        "import torch, sys\n"
        "from tests.runtime.test_capture_key import key_of, scaled\n"
        "print(key_of(scaled, torch.ones(4, 6)).digest, key_of(scaled, torch.ones(3, 8), dynamic=True).digest)"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [BASE, key_of(scaled, X, dynamic=True).digest]
