"""The operator that refuses what kernels found: indices outside of the table whose rows they name.

    flagtree::refuse_outside(Tensor[] outside) -> ()   each a bool of one element: was an index of one lookup outside?

Raises IndexError with the text of eager's `embedding`.  Imports nothing but torch; runtime/operators.py imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_library = torch.library.Library("flagtree", "FRAGMENT")
_library.define("refuse_outside(Tensor[] outside) -> ()")


def _refuse(outside: Sequence[torch.Tensor]) -> None:
    if any(flag.item() for flag in outside):
        raise IndexError("index out of range in self")


def _nothing(outside: Sequence[torch.Tensor]) -> None:
    return None


_library.impl("refuse_outside", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("flagtree::refuse_outside", _nothing, lib=_library)
