"""Arguments that do not lie as a graph was compiled for: copied into place, or the graph is left alone when it writes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flagtree.runtime.compile import _of_any_strides

Tensors = dict[str, torch.Tensor]


def compiled(write: bool) -> Any:
    """x + y over (3, 4) tensors that are declared contiguous, x written in place or not."""
    graph = fx.Graph()
    with torch._subclasses.FakeTensorMode():
        nodes = [graph.placeholder(n) for n in ("x", "y")]
        for node in nodes:
            node.meta["val"] = torch.empty(3, 4)
    function = torch.ops.aten.add_.Tensor if write else torch.ops.aten.add.Tensor
    call = graph.call_function(function, tuple(nodes))
    call.meta["val"] = nodes[0].meta["val"]
    graph.output((call,))
    return _of_any_strides(fx.GraphModule(torch.nn.Module(), graph))


def test_another_layout_or_element_type_is_copied() -> None:
    run, x, y = compiled(write=False), torch.randn(3, 4), torch.randn(4, 3).t()
    assert run.restride([x, y])[0] is x, "what lies as declared is taken as it is"
    assert torch.equal(run(x, y)[0], x + y)
    assert torch.equal(run(x, y.bfloat16())[0], x + y.bfloat16().float())
    assert torch.equal(run(x.t().contiguous().t(), y)[0], x + y)


def test_a_written_argument_is_written_where_it_lies() -> None:
    run, x, y = compiled(write=True), torch.randn(4, 3).t(), torch.randn(3, 4)
    want = x + y
    run(x, y)
    assert torch.equal(x, want) and x.stride() == (1, 3)
