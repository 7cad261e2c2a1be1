"""The rule of DESIGN §9, "equal to eager", for a function under torch.compile: results, their layout, and what happened to the arguments.

dtype, shape, visible strides, integers, and who shares memory with whom are exact; a float tensor's root-mean-square error against
float64 is at most four times eager's own plus 1e-6 of the mean magnitude, with NaN and infinities at the same places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from flagtree.runtime.compile import backend


def check(function: Callable[..., Any], *args: Any, dynamic: bool | None = False, seed: int = 0) -> None:
    """Run `function` eagerly, in float64 and compiled, on copies of `args`, and compare.  Modules are copied too."""
    torch._dynamo.reset()
    runs = []
    for kind in ("eager", "exact", "compiled"):
        own = _copies((function, args))
        if kind == "exact":
            own = _doubled(own)
        called, given = own
        torch.manual_seed(seed)
        with torch.no_grad():
            if kind == "compiled":
                called = torch.compile(called, backend=backend, dynamic=dynamic)
            try:
                result = called(*given)
            except RuntimeError:
                if kind != "exact":
                    raise
                runs.append(None)  # it mixes types that double cannot replace: eager itself is then the truth
                continue
        runs.append(([*tree_leaves(result)], [*tree_leaves(given), *_buffers(called)]))
    eager, exact, have = runs
    for part in (0, 1):
        assert len(eager[part]) == len(have[part])
        for k, (want, got) in enumerate(zip(eager[part], have[part])):
            truth = exact[part][k] if exact is not None else want
            compare(want, got, truth, f"{'result' if part == 0 else 'argument'} {k}")
    assert _sharing(*eager) == _sharing(*have), "who shares memory with whom"


def compare(want: Any, have: Any, exact: Any, where: str) -> None:
    """One leaf against eager's, with `exact` the float64 truth."""
    if not isinstance(want, torch.Tensor):
        assert type(want) is type(have) and (want == have or want != want), f"{where}: {have!r} instead of {want!r}"
        return
    assert want.dtype == have.dtype and want.shape == have.shape, (
        f"{where}: {have.dtype} {tuple(have.shape)}, not {want.dtype} {tuple(want.shape)}"
    )
    assert visible(want) == visible(have), f"{where}: strides {have.stride()} instead of {want.stride()} of {tuple(want.shape)}"
    if want.is_complex():
        want, have, exact = (torch.view_as_real(t.detach().resolve_conj()) for t in (want, have, exact))
    if not want.is_floating_point():
        assert torch.equal(want, have), f"{where}: {have} instead of {want}"
        return
    want, have, exact = (t.detach().double() for t in (want, have, exact))
    for name in ("isnan", "isposinf", "isneginf"):
        assert torch.equal(getattr(want, name)(), getattr(have, name)()), f"{where}: {name} at other places: {have} instead of {want}"
    if exact.shape != want.shape:
        exact = want
    finite = want.isfinite() & exact.isfinite()
    if finite.any():
        truth = exact[finite]
        ours, theirs = ((t[finite] - truth).square().mean().sqrt().item() for t in (have, want))
        allowed = 4 * theirs + 1e-6 * truth.abs().mean().item()
        assert ours <= allowed, f"{where}: error {ours:.3g}, eager's {theirs:.3g}, allowed {allowed:.3g}: {have} instead of {want}"


def visible(tensor: torch.Tensor) -> list[int]:
    """Strides that can be told from values: those of dimensions longer than 1 of a tensor with elements."""
    return [s for n, s in zip(tensor.shape, tensor.stride()) if n > 1] if tensor.numel() else []


def _copies(values: Any) -> Any:
    """Deep copies that keep strides, offsets and shared storages."""
    return copy.deepcopy(values)


def _doubled(values: Any) -> Any:
    def double(x: Any) -> Any:
        if isinstance(x, torch.nn.Module):
            return x.double()
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(double, values)


def _buffers(called: Any) -> list[torch.Tensor]:
    return list(called.buffers()) if isinstance(called, torch.nn.Module) else []


def _sharing(results: list[Any], arguments: list[Any]) -> list[list[int]]:
    """For each result, which results and arguments lie in its storage."""
    values = [*results, *arguments]
    homes = [x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) and x.numel() else None for x in values]
    return [[j for j, home in enumerate(homes) if home is not None and home == mine] for mine in homes[: len(results)]]
