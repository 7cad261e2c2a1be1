"""The least bytes that one interior layer can move when every chain of pointwise operations is one kernel; derived, not measured.

A product reads both operands and writes its result once.  Residual, sum and the norm after it are one kernel: two rows of the model's width
read, two written.  Rotary (with the norm of query or key where there is one) reads and writes its rows and reads the two tables; the key's
rows go to the cache at once.  Attention reads queries, each cached key and value, and writes its result.  A gated activation reads two rows
and writes one, a plain one reads one.  Experts read their rows and the weights of those experts that tokens can reach, once.
Where a model computes in fp8, a weight is a byte with a scale for each block of 128 x 128 and what a product reads a byte with a scale for
each group of 128; a norm writes that in the place of its row (with it where a router reads the row), what attention gives is read and
written once more.
By this count a Qwen3-8B layer moves 1 067 MB for 2048 tokens, as research measured it kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagtree.capture.model_spec import ModelSpec
from flagtree.capture.parts import REFERENCE
from flagtree.capture.spec_rules import named

_BYTES = 2  # bf16
_BLOCK, _SCALE = 128, 4  # fp8: elements to a scale, and its f32


def _rows(tokens: int, width: int, scaled: bool) -> int:
    """What a product reads."""
    return tokens * (width + width // _BLOCK * _SCALE) if scaled else _BYTES * tokens * width


def _weight(inside: int, outside: int, scaled: bool) -> int:
    return inside * outside + inside // _BLOCK * (outside // _BLOCK) * _SCALE if scaled else _BYTES * inside * outside


def _product(tokens: int, inside: int, outside: int, scaled: bool = False) -> int:
    return _rows(tokens, inside, scaled) + _BYTES * tokens * outside + _weight(inside, outside, scaled)


def _gated(tokens: int, width: int, inner: int) -> int:
    return 2 * _product(tokens, width, inner) + _product(tokens, inner, width) + 3 * _BYTES * tokens * inner


def text_layer(spec: ModelSpec, part: str, *, routed: bool) -> int:
    """One decoder layer for one sequence at the sizes at which reports count."""
    text, sizes = spec.text, REFERENCE[part]
    tokens, context = sizes.get("sequence", 1), sizes["context"]
    width, head, scaled = text["hidden_size"], spec.head_width, spec.capture.quantised
    q, kv = text["num_attention_heads"] * head, spec.key_heads * head
    turned = int(text.get("rotary_dim") or head)
    total = 2 * 4 * _BYTES * tokens * width
    if shared := text.get("share_q_dim"):
        total += _product(tokens, width, shared) + 2 * _BYTES * tokens * shared + _product(tokens, shared, q)
    else:
        total += _product(tokens, width, q, scaled)
    total += 2 * _product(tokens, width, kv, scaled) + _product(tokens, q, width, scaled)
    total += 2 * _BYTES * tokens * (q + kv) + 2 * 2 * _BYTES * tokens * turned
    total += _BYTES * (2 * tokens * q + 2 * context * kv)
    if scaled:  # the first norm's row is none, the second's is one more; what attention gives
        total += 2 * _rows(tokens, width, True) - _BYTES * tokens * width + _BYTES * tokens * q + _rows(tokens, q, True)
    if not routed:
        return total + _gated(tokens, width, text["intermediate_size"])
    experts, taken = named(text, "num_experts")[1], named(text, "num_experts_per_tok")[1]
    inner = text.get("moe_intermediate_size") or text["intermediate_size"]
    total += _product(tokens, width, experts)
    total += _rows(tokens, width, scaled) + _BYTES * tokens * width + min(experts, tokens * taken) * 3 * _weight(width, inner, scaled)
    if shared := text.get("share_expert_dim"):
        total += _gated(tokens, width, shared) + _BYTES * tokens * width
    return total


def vision_block(spec: ModelSpec) -> int:
    """One block of the tower for one image."""
    vision: Mapping[str, Any] = spec.config["vision_config"]
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    merged = vision.get("spatial_merge_size")
    if merged:
        rows = REFERENCE["vision"]["tokens"] * merged**2
        turned, activation = 4 * _BYTES * rows * width + 2 * 2 * _BYTES * rows * width // vision["num_heads"], _gated(rows, width, inner)
    else:
        square = (REFERENCE["vision"]["side"] * 2 * spec.config.get("understand_projector_stride", 0)) ** 2 + 4
        rows = square if "output_hidden_size" in vision else REFERENCE["vision"]["patches"]
        turned, activation = 0, _product(rows, width, inner) + _product(rows, inner, width) + 2 * _BYTES * rows * inner
    # one product for query, key and value or three: the rows are read once in the one, three times in the others
    times = 3 if "query_num" in spec.config else 1
    projections = _product(rows, width, 3 * width) + (times - 1) * _BYTES * rows * width + _product(rows, width, width)
    norm = 3 if "output_hidden_size" in vision else 4  # a post-norm adds what it normed: two rows read, one written
    return projections + turned + 4 * _BYTES * rows * width + activation + 2 * norm * _BYTES * rows * width
