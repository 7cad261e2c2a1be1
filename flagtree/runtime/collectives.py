"""Collectives of a model whose weights are divided over ranks, as torch operators; in a launch list they are calls with a name.

    flagtree::all_reduce(x, group, ranks) -> x's shape       the sum of every rank's x, in a new tensor
    flagtree::all_gather(x, group, ranks, width) -> [..., width]   every rank's x side by side along the last dimension, rank 0 first, cut
                                                                   to `width` columns, contiguous

Invariant: a group of another size than the bundle was made for is refused, as its sums would be wrong without a sign.  The group is that
given to `set_group` under the name, else the process's default group.  Imported by `runtime/operators.py`.
"""

from __future__ import annotations

import torch
from torch import distributed

from flagtree.errors import BindError

TENSOR_PARALLEL = "tp"

_groups: dict[str, distributed.ProcessGroup] = {}
_library = torch.library.Library("flagtree", "FRAGMENT")
_library.define("all_reduce(Tensor x, str group, int ranks) -> Tensor")
_library.define("all_gather(Tensor x, str group, int ranks, int width) -> Tensor")


def set_group(name: str, group: distributed.ProcessGroup | None) -> None:
    """Let the collectives called `name` run over `group`; None takes it back, and they run over the process's default group."""
    if group is None:
        _groups.pop(name, None)
    else:
        _groups[name] = group


def _group(name: str, ranks: int) -> distributed.ProcessGroup | None:
    """The group of a collective, None for the default one.  BindError where there is none, or of another size."""
    group = _groups.get(name)
    if group is None and not (distributed.is_available() and distributed.is_initialized()):
        hint = "torch.distributed.init_process_group first; or set_group of flagtree.runtime.collectives"
        raise BindError(f"the bundle is for {ranks} ranks, and this process is in no group '{name}'", hint=hint)
    found = distributed.get_world_size(group)
    if found != ranks:
        hint = f"start {ranks} ranks, or compile with --tp {found}"
        raise BindError(f"the bundle is for {ranks} ranks, the group '{name}' has {found}", hint=hint)
    return group


def _all_reduce(x: torch.Tensor, group: str, ranks: int) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=_group(group, ranks))
    return total


def _all_gather(x: torch.Tensor, group: str, ranks: int, width: int) -> torch.Tensor:
    if not 0 < width <= ranks * x.shape[-1]:
        raise BindError(f"all_gather: {width} columns of {ranks} times {x.shape[-1]}")
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    distributed.all_gather(parts, x.contiguous(), group=_group(group, ranks))
    return torch.cat(parts, -1)[..., :width].contiguous()


def _reduced_shape(x: torch.Tensor, group: str, ranks: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gathered_shape(x: torch.Tensor, group: str, ranks: int, width: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], width)


_library.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
_library.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
torch.library.register_fake("flagtree::all_reduce", _reduced_shape, lib=_library)
torch.library.register_fake("flagtree::all_gather", _gathered_shape, lib=_library)
