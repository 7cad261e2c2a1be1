"""What must be right on a GPU, one function a claim; benchmarks/gpu.py reports them, tests/runtime/test_gpu_device.py asserts them.

Each takes torch's device, raises AssertionError with what differs, and returns one line on what was seen.  None has run on a GPU yet:
docs/gpu.md says how far each is proved without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

HIDDEN, HEADS, KEY_HEADS, HEAD, INNER = 4096, 32, 8, 128, 12288  # Qwen3-8B


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def residual_norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = x + r
    return s, norm(s, w)


def head_norm_rotary(q: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    n = norm(q, w)
    half = q.shape[-1] // 2
    return n * cos + torch.cat((-n[..., half:], n[..., :half]), -1) * sin


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def cases() -> dict[str, tuple[Callable[..., Any], Callable[[int, torch.device], tuple[torch.Tensor, ...]]]]:
    """The fused kernels of Qwen3-8B's layer: name -> (the model's own operations, (tokens, device) -> bf16 inputs)."""

    def rand(*shape: int, device: torch.device) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def heads(count: int) -> Callable[[int, torch.device], tuple[torch.Tensor, ...]]:
        return lambda n, d: (rand(n, count, HEAD, device=d), rand(HEAD, device=d), rand(n, 1, HEAD, device=d), rand(n, 1, HEAD, device=d))

    return {
        "norm": (norm, lambda n, d: (rand(n, HIDDEN, device=d), rand(HIDDEN, device=d))),
        "residual and norm": (residual_norm, lambda n, d: (*(rand(n, HIDDEN, device=d) for _ in range(2)), rand(HIDDEN, device=d))),
        "query norm and rotary": (head_norm_rotary, heads(HEADS)),
        "key norm and rotary": (head_norm_rotary, heads(KEY_HEADS)),
        "SwiGLU": (swiglu, lambda n, d: tuple(rand(n, INNER, device=d) for _ in range(2))),
    }


def layer(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """A decoder layer as Qwen3's.  x: [B, T, C]; cos, sin: [T, D]; weights as `layer_inputs` makes them."""
    first, wq, wk, wv, wo, nq, nk, second, gate, up, down = weights
    h = norm(x, first)
    q, k, v = ((h @ w).unflatten(-1, (-1, nq.shape[0])).transpose(1, 2) for w in (wq, wk, wv))
    q, k = head_norm_rotary(q, nq, cos, sin), head_norm_rotary(k, nk, cos, sin)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x, h = residual_norm(x, attended.transpose(1, 2).flatten(2) @ wo, second)
    return x + swiglu(h @ gate, h @ up) @ down


def layer_inputs(device: torch.device, dtype: torch.dtype, *, width: int = 256, tokens: int = 40) -> list[torch.Tensor]:
    """Inputs of `layer` at a quarter as many key heads as query heads of 32 elements."""
    torch.manual_seed(0)
    shapes = [(width,), (width, width), (width, width // 4), (width, width // 4), (width, width), (32,), (32,), (width,),
              (width, 3 * width), (width, 3 * width), (3 * width, width)]  # fmt: skip
    weights = [torch.randn(*s) / (s[0] ** 0.5 if len(s) == 2 else 1) for s in shapes]
    angles = torch.outer(torch.arange(tokens).float(), 10000 ** (-torch.arange(32).remainder(16) / 16))
    return [t.to(device, dtype) for t in (torch.randn(2, tokens, width), angles.cos(), angles.sin(), *weights)]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile with flagtree, apart from what was compiled before."""
    from flagtree.runtime.compile import backend

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=False)


def leaves(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def equal(have: Any, eager: Any, exact: Any) -> float:
    """The rule "equal to eager": the error against float64 is at most four times eager's, plus 1e-6 of the mean magnitude.  The largest
    ratio to eager's error."""
    worst = 0.0
    for one, other, truth in zip(leaves(have), leaves(eager), leaves(exact), strict=True):
        assert (one.dtype, one.shape, one.stride(), one.device) == (other.dtype, other.shape, other.stride(), other.device)
        ours, its = ((t.double() - truth).square().mean().sqrt().item() for t in (one, other))
        limit = 4 * its + 1e-6 * truth.abs().mean().item()
        assert ours <= limit, f"error {ours:.3g} against float64, eager {its:.3g}"
        worst = max(worst, ours / its if its else 0.0)
    return worst


def doubled(tensors: Any) -> list[torch.Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


# -- the claims ------------------------------------------------------------------------------------------------------
def check_kernels(device: torch.device) -> str:
    """Each kernel of Qwen3-8B equals eager, at 1, 17 and 512 tokens."""
    worst = 0.0
    for function, make in cases().values():
        for tokens in (1, 17, 512):
            args = make(tokens, device)
            worst = max(worst, equal(compiled(function)(*args), function(*args), function(*doubled(args))))
    return f"{len(cases())} kernels, largest error {worst:.2f} of eager's"


def check_misaligned(device: torch.device) -> str:
    """Inputs that start 2 bytes off take the generic variant, and give the bits of the aligned one."""
    function = residual_norm
    args = cases()["residual and norm"][1](9, device)
    want = compiled(function)(*args)
    moved = []
    for t in args:
        backing = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
        moved.append(backing[1:].view(t.shape).copy_(t))
    have = compiled(function)(*moved)
    assert all(t.data_ptr() % 16 == 2 for t in moved)
    for one, other in zip(have, want, strict=True):
        assert torch.equal(one, other)
    return "2 bytes off: the same bits as the aligned variant"


def check_layer(device: torch.device) -> str:
    """torch.compile of a decoder layer equals eager, in both types."""
    ratios = []
    for dtype in (torch.float32, torch.bfloat16):
        args = layer_inputs(device, dtype)
        with torch.no_grad():
            ratios.append(equal(compiled(layer)(*args), layer(*args), layer(*doubled(args))))
    return f"float32 and bfloat16, error {max(ratios):.2f} of eager's"


def check_gradients(device: torch.device) -> str:
    """Gradients of a decoder layer's inputs and weights equal eager's."""

    def gradients(call: Callable[..., Any], args: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = [t.detach().clone().requires_grad_() for t in args]
        out = call(*given)
        out.square().mean().backward()
        found = tuple(t.grad for t in given if t.grad is not None)
        assert len(found) == len(given)
        return found

    args = layer_inputs(device, torch.float32)
    worst = equal(gradients(compiled(layer), args), gradients(layer, args), gradients(layer, doubled(args)))
    return f"{len(args)} gradients, error {worst:.2f} of eager's"


def check_graph(device: torch.device) -> str:
    """A compiled layer is captured into a CUDA graph and replays on new inputs, also after calls outside of the graph."""
    args = layer_inputs(device, torch.bfloat16)
    call = compiled(layer)
    with torch.no_grad():
        for _ in range(3):
            call(*args)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (result,) = leaves(call(*args))
        for seed in (1, 2):
            torch.manual_seed(seed)
            args[0].copy_(torch.randn_like(args[0]))
            between = call(*args)  # a call outside must not share memory with the graph
            graph.replay()
            torch.cuda.synchronize(device)
            assert torch.equal(result, between), "the replay differs from a call"
    return "captured, replayed twice on new inputs, calls between"


def check_stream(device: torch.device) -> str:
    """Calls on two side streams at once give what calls one after the other give."""
    call = compiled(layer)
    inputs = [layer_inputs(device, torch.bfloat16, tokens=n) for n in (40, 40)]
    inputs[1][0].neg_()
    with torch.no_grad():
        wanted = [call(*args) for args in inputs]
        torch.cuda.synchronize(device)
        streams = [torch.cuda.Stream(device) for _ in inputs]
        for _ in range(20):
            found = []
            for stream, args in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(call(*args))
            torch.cuda.synchronize(device)
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other), "a side stream gives other values"
    return "two streams, 20 rounds: equal"


def check_thread(device: torch.device) -> str:
    """A thread that never touched the device launches there."""
    import threading

    args = layer_inputs(device, torch.bfloat16)
    call = compiled(layer)
    found: list[Any] = []
    with torch.no_grad():
        want = call(*args)

        def work() -> None:
            with torch.no_grad():
                found.append(call(*args))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    torch.cuda.synchronize(device)
    assert found and torch.equal(found[0], want)
    return "the same values from another thread"


CHECKS: Mapping[str, Callable[[torch.device], str]] = {
    "each kernel equals eager": check_kernels,
    "torch.compile of a decoder layer": check_layer,
    "gradients of a decoder layer": check_gradients,
    "misaligned inputs": check_misaligned,
    "CUDA graph capture and replay": check_graph,
    "side streams": check_stream,
    "another thread": check_thread,
}
# What a torch without CUDA can rehearse: everything that names no stream and no graph.
REHEARSED = ("each kernel equals eager", "torch.compile of a decoder layer", "gradients of a decoder layer", "misaligned inputs")
