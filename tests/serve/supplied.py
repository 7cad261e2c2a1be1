"""What the test bed supplies where vLLM's build for the CPU lacks it, in each of vLLM's processes; the plug-in has no part in it.

Sigmoid routing (MiniMax-M2), a question that only a CUDA build of torch answers (MiniCPM-V), and a loader of random weights.
"""

from __future__ import annotations

import os
import zlib
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from tests.serve.architectures import WEIGHTS
from tests.serve.checkpoints import GAIN


def supply() -> None:
    """To be called before a model is built."""
    _torchvision()
    _sigmoid_routing()
    _random_weights()
    _model_classes()
    if os.environ.get("QUIET"):  # vLLM's own helpers compile even in eager mode, 10 s of g++ that prove nothing in a run that is no proof
        torch.compiler.set_stance("eager_on_recompile")
    if not torch.cuda.is_available():
        torch.cuda.is_current_stream_capturing = lambda: False


def _torchvision() -> None:
    """The public wheel is a build for CUDA and defines no operators beside a torch for the CPU; images need its transforms alone."""
    if find_spec("torchvision") is None or version("torchvision").endswith("+cpu"):
        return
    _DEFINED.append(library := torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_DEFINED: list[torch.library.Library] = []  # an operator lives as long as what defined it


def _sigmoid_routing() -> None:
    """As MiniMax-M2 routes: the bias chooses, the score weighs."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    softmax_only = cpu_router.CPURouter._compute_routing

    def compute(self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, **others: Any) -> Any:
        if self.use_grouped_topk or self.scoring_func != "sigmoid" or self.custom_routing_function is not None:
            return softmax_only(self, hidden_states, router_logits, indices_type, **others)
        scores = router_logits.float().sigmoid()
        bias = self.e_score_correction_bias
        ids = torch.topk(scores if bias is None else scores + bias, self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, ids)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.routed_scaling_factor, ids.to(torch.int32)

    cpu_router.CPURouter._compute_routing = compute


def _model_classes() -> None:
    """vLLM asks a process of its own what a model class can do, lest CUDA be initialised: a whole import of vLLM for nothing here."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()


def _random_weights() -> None:
    """Wide ones, by name: the loader of the build gives all models the same few tokens.  Shards differ by rank, the rest does not."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class RandomWeights(DummyModelLoader):
        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            several = get_tensor_model_parallel_world_size() > 1
            for path, module in model.named_modules():
                whole = isinstance(module, ReplicatedLinear) or not several
                for name, parameter in module.named_parameters(path, recurse=False):
                    rank = 0 if whole or parameter.dim() == 1 else get_tensor_model_parallel_rank()
                    _fill(parameter, zlib.crc32(name.encode()) + rank)

    register_model_loader(WEIGHTS["load_format"])(RandomWeights)


def _fill(parameter: torch.Tensor, seed: int) -> None:
    if not parameter.dtype.is_floating_point:
        return
    drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    with torch.no_grad():
        parameter.copy_(1 + 0.1 * drawn if parameter.dim() == 1 else drawn * (GAIN / parameter.shape[-1] ** 0.5))
