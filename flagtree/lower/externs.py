"""What stays a call to the platform's library: the reasons, and the operands that such a call writes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

_GEMM = "matrix product: the platform's library"
_CONV = "convolution: the platform's library"
_ATTENTION = "attention: the platform's library"
_PAGED = "attention over a paged cache: the server's own operator, whose page size and layout differ by platform"
_RANDOM = "random numbers: the generator's own order is kept"
_ORDER = "sorting: the platform's library"
_SCATTER = "scatter by index tensors: eager checks each index, and two may name one element"
_COLLECTIVE = "collective: the process group's library"
_LAYOUT = "uninitialised memory: allocation only"
REASONS = {
    **dict.fromkeys(("aten.linear", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.matmul"), _GEMM),
    **dict.fromkeys(("aten.einsum", "aten.mv", "aten.dot", "aten.addmv", "aten.bilinear"), _GEMM),
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.convolution_backward"), _CONV),
    **dict.fromkeys(("aten.scaled_dot_product_attention", "flagtree.attend", "flagtree.attention"), _ATTENTION),
    **dict.fromkeys(("flagtree.full_attention", "flagtree.varlen_attention"), _ATTENTION),
    "flagtree.paged_attention": _PAGED,
    **dict.fromkeys(("flagtree.all_reduce", "flagtree.all_gather"), _COLLECTIVE),
    "aten._scaled_dot_product_flash_attention_for_cpu": _ATTENTION,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _ATTENTION,
    **dict.fromkeys(("aten.sort", "aten.topk", "aten.argsort", "aten.median", "aten.kthvalue"), _ORDER),
    **dict.fromkeys(("aten.scatter", "aten.scatter_add", "aten.index_put", "aten.index_add", "aten.index_put_"), _SCATTER),
    "aten.value_selecting_reduction_backward": _SCATTER,
    **dict.fromkeys(("aten.rand", "aten.randn", "aten.rand_like", "aten.randn_like", "aten.bernoulli", "aten.native_dropout"), _RANDOM),
    **dict.fromkeys(("aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.new_empty_strided"), _LAYOUT),
    "aten.embedding": "embedding: eager checks each index, and a row copy gains nothing from fusion",
    "aten.index": "rows by index tensors: eager checks each index, and a row copy gains nothing from fusion",
    **dict.fromkeys(("vllm.unified_attention_with_output", "vllm.unified_attention", "vllm.unified_mla_attention_with_output"), _PAGED),
    "vllm.unified_kv_cache_update": "paged cache: the server's own operator",
}
_PURE = frozenset({"aten", "prims", "flagtree"})  # libraries whose schemas tell all that a call reads and writes
# written although the schema does not say so: operator -> operand positions
_HIDDEN_WRITES = {"aten.batch_norm.default": (3, 4), "aten.native_batch_norm.default": (3, 4)}


def reason_for(packet: str) -> str:
    """Why an operator that no rule takes is a call."""
    return REASONS.get(packet, f"no lowering rule for {packet}")


def effect_of(op: torch._ops.OpOverload) -> str:
    """Random numbers keep their order.  So do the calls of another library: they may do what their schema does not tell,
    such as writing a cache that no operand is."""
    if torch.Tag.nondeterministic_seeded in op.tags:
        return "rng"
    return "" if op.namespace in _PURE else f"state:{op.namespace}"


def written_operands(node: fx.Node) -> Iterator[fx.Node]:
    """Operand nodes that the call writes, from the schema's alias annotations."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    positions = _HIDDEN_WRITES.get(str(node.target), ())
    for k, argument in enumerate(schema.arguments):
        value = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name)
        written = (argument.alias_info is not None and argument.alias_info.is_write) or k in positions
        if written:
            values = value if isinstance(value, (list, tuple)) else (value,)
            yield from (v for v in values if isinstance(v, fx.Node))
