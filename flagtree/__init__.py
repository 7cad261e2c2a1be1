"""flagtree: a PyTorch model in, a checked bundle of fused kernels for a named chip out.

Importing this package imports neither torch nor the compiler; `load` and the settings arrive on first use.
The stages stand in the sub-packages; docs/architecture.md names the contracts between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from flagtree.runtime.load import load


def __getattr__(name: str) -> object:
    if name == "load":
        from flagtree.runtime.load import load

        return load
    raise AttributeError(f"module 'flagtree' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
