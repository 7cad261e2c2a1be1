"""The IR's element types as torch's, for the side that runs without the IR.

A test keeps this table equal to `ir/dtypes.py`, which the runtime does not import.
"""

from __future__ import annotations

import torch

from flagtree.errors import BundleError

DTYPES: dict[str, torch.dtype] = {
    "b1": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of an IR name.  BundleError for one that this flagtree does not know."""
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise BundleError(f"unknown element type {name!r}", why=f"known: {', '.join(DTYPES)}") from None
