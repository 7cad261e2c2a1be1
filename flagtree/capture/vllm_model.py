"""One graph of a server without the server: vLLM's own model class on the meta device, traced by vLLM's own decorator, for any rank.

Runs in a process of its own, which `capture/ahead.py` starts: vLLM keeps its state in globals, and what is set here to play a rank alone
ends with the process.  No weight is made, no engine started, and nothing of vLLM that computes is changed.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from flagtree.artifact.files import canonical_json
from flagtree.artifact.recording import RecordedGraph
from flagtree.capture.ahead import ANSWERED, ELSEWHERE, OWN_DEVICE, Request
from flagtree.errors import CaptureError

PREDICTED = "predicted"  # a recording's fact: derived from the model class, no server met the graph
_NEEDED = ("vllm.engine.arg_utils", "vllm.forward_context", "vllm.model_executor.model_loader.utils", "flagtree.capture.recorded")
BACKEND = "flagtree.capture.vllm_model.keep"


class _Captured(Exception):
    """The graph is there: nothing needs to run any more."""


_kept: list[tuple[fx.GraphModule, Sequence[Any]]] = []


def keep(module: fx.GraphModule, example_inputs: Sequence[Any], **options: object) -> Any:
    """The compiler that vLLM calls with its graph."""
    _kept.append((module, example_inputs))
    raise _Captured


def main() -> None:
    """The process: requests as JSON in, `{"graph": …}` or `{"error": [what, where, why, hint]}` in the file of each.

    vLLM is imported once; each request has a fork of its own, as a process can be only one rank of one degree.
    """
    requests = [Request(**request) for request in json.loads(sys.argv[1])]
    for module in _NEEDED:
        importlib.import_module(module)
    for request in requests:
        child = os.fork()
        if child == 0:
            _answer(request)
            os._exit(0)  # groups of a rank that is alone have nobody to say good-bye to
        os.waitpid(child, 0)
        sys.stdout.write(f"{ANSWERED}\n")
        sys.stdout.flush()


def _answer(request: Request) -> None:
    try:
        answer: dict[str, Any] = {"graph": capture_served(request).model_dump(mode="json")}
    except CaptureError as error:
        answer = {"error": [error.what, error.where, error.why, error.hint]}
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        return
    Path(request.out).write_bytes(canonical_json(answer))


def capture_served(request: Request) -> RecordedGraph:
    """The recording that a server of this model, degree and platform would write.  CaptureError when vLLM cannot build or trace it."""
    from flagtree.capture.recorded import record_served
    from flagtree.serve.agreement import facts_of
    from flagtree.serve.graph import key_of, served_graph

    config = _configuration(request)
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config):
        try:
            _play_rank(request)
            _trace(_model(config), config)
        except Exception as error:  # what vLLM and the model's own code raise
            if not _kept:
                what = f"vLLM cannot trace {config.model_config.architectures[0]}"
                raise CaptureError(what, where=_where(request), why=_one_line(error), hint="does this vLLM serve the model?") from error
        facts = dict(facts_of(config))
    if not _kept:
        why = f"its compile mode for the model is {config.compilation_config.mode}"
        raise CaptureError("vLLM does not compile this model", where=_where(request), why=why, hint='serve it with "custom_ops": true')
    module, inputs = _kept[0]
    _place(module, request.device)
    served = served_graph(module)
    versions = {"torch": torch.__version__, "vllm": facts.pop("vllm", "")}
    facts[PREDICTED] = f"from vLLM's model class, for {request.device}"
    most = int(facts.get("max_tokens", "0"))
    try:
        return record_served(served, key_of(served), inputs, most=most, versions=versions, facts=facts)
    except RuntimeError as error:
        if request.device == OWN_DEVICE:
            raise
        what = f"the graph of a '{request.device}' platform cannot be predicted"
        raise CaptureError(what, where=_where(request), why=_one_line(error), hint=ELSEWHERE) from error


def _where(request: Request) -> str:
    return f"tensor parallel {request.degree}"


def _one_line(error: BaseException) -> str:
    """What an error of vLLM says, and at which line of the model's code tracing ended, without lists of everything that would have been
    right."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "error, " in line or "rror:" in line), lines[0] if lines else "")
    traced = [found for line in lines[:-1] if (found := _FRAME.match(line))]
    if traced:
        said += f", at {Path(traced[-1]['file']).name}:{traced[-1]['line']}: {lines[lines.index(traced[-1].string) + 1]}"
    return f"{type(error).__name__}: {said}"[:300]


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')  # of what Dynamo shows as "user code"


# -- vLLM's configuration ----------------------------------------------------------------------------------------------
def _configuration(request: Request) -> Any:
    """What a server's own arguments would make, with our name as its compiler."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry

    described = json.loads((Path(request.folder) / "config.json").read_text(encoding="utf-8"))
    (architecture,) = described["architectures"]
    known = ModelRegistry.get_supported_archs()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.6)
        why = f"closest: {', '.join(near)}" if near else f"it has {len(known)} others"
        raise CaptureError(f"this vLLM has no model class {architecture}", why=why, hint="another release of vLLM may have it")
    compilation: Any = {"mode": 2, "backend": BACKEND, "custom_ops": ["none"]}
    try:
        arguments = EngineArgs(
            model=request.folder, load_format="dummy", dtype=request.dtype, skip_tokenizer_init=True, compilation_config=compilation
        )
        config = arguments.create_engine_config()
        parallel = config.parallel_config  # set afterwards: vLLM would start a process a rank
        parallel.tensor_parallel_size = parallel.world_size = request.degree
        parallel.rank = request.rank
        config.model_config.verify_with_parallel_config(parallel)
    except Exception as error:  # pydantic's and vLLM's own
        raise CaptureError("vLLM refuses the configuration", where=_where(request), why=_one_line(error)) from error
    return config


# -- one rank, alone ---------------------------------------------------------------------------------------------------
def _play_rank(request: Request) -> None:
    """Rank `rank` of `degree` without the others: torch's fake process group, which answers every collective at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators import cpu_communicator

    distributed: Any = torch.distributed
    distributed.init_process_group("fake", store=FakeStore(), rank=request.rank, world_size=request.degree)
    new_group = distributed.new_group
    distributed.new_group = lambda ranks=None, *args, **options: new_group(ranks, backend="fake")
    make_group: Any = parallel_state.init_model_parallel_group

    def without_messages(*args: Any, **options: Any) -> Any:
        return make_group(*args, **{**options, "use_message_queue_broadcaster": False})

    parallel_state.init_model_parallel_group = without_messages
    shared: Any = getattr(cpu_communicator, "_CPUSHMDistributed", None)
    if shared is not None:
        shared._init_cpu_shm = lambda self: 0  # the handle of a shared memory that nobody shares; it is no part of the key
    nowhere = f"file://{tempfile.mktemp()}"  # never made: the group exists
    parallel_state.init_distributed_environment(request.degree, request.rank, nowhere, request.rank, "gloo")
    parallel_state.initialize_model_parallel(request.degree, 1)


# -- the model, on the meta device ---------------------------------------------------------------------------------------
def _model(config: Any) -> torch.nn.Module:
    """Built and prepared as a worker does, with sizes and no storage."""
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    _as_a_worker_starts(config)
    _pack_nothing()
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.model_config.dtype)
    try:
        with torch.device("meta"):
            model = initialize_model(config)
    finally:
        torch.set_default_dtype(before)
    process_weights_after_loading(model, config.model_config, torch.device("meta"))
    return model


def _as_a_worker_starts(config: Any) -> None:
    """Which form single operators take is decided where a worker starts; a vLLM without that choice has none to make."""
    with contextlib.suppress(ImportError, AttributeError):
        import vllm.ir

        config.kernel_config.ir_op_priority.set_default()
        vllm.ir.set_default_torch_wrap(config.compilation_config.ir_enable_torch_wrap)


_libraries: list[torch.library.Library] = []


def _pack_nothing() -> None:
    """Packing the weights of experts has no meta kernel: without storage there is nothing to pack."""
    import vllm._custom_ops  # noqa: F401  (registers the operators)

    for name in ("prepack_moe_weight", "prepack_moe_weight_int8"):
        if hasattr(torch.ops._C, name) and not torch._C._dispatch_has_kernel_for_dispatch_key(f"_C::{name}", "Meta"):
            library = torch.library.Library("_C", "IMPL")
            library.impl(name, lambda *tensors: None, "Meta")
            _libraries.append(library)


def _trace(model: torch.nn.Module, config: Any) -> None:
    """One call as the profile run makes it; vLLM's decorator traces it and hands the graph to `keep`."""
    from vllm.forward_context import set_forward_context

    tokens = config.scheduler_config.max_num_batched_tokens
    arguments: dict[str, Any] = {"input_ids": torch.zeros(tokens, dtype=torch.int32, device="meta"), "inputs_embeds": None}
    positions = torch.zeros(tokens, dtype=torch.int64, device="meta")
    if config.model_config.is_multimodal_model:  # embeddings of text and images arrive together
        width = config.model_config.get_inputs_embeds_size()
        arguments = {"input_ids": None, "inputs_embeds": torch.zeros(tokens, width, dtype=config.model_config.dtype, device="meta")}
    if config.model_config.uses_mrope:  # three rows of a table with one more column, as the runner keeps it
        positions = torch.zeros(3, tokens + 1, dtype=torch.int64, device="meta")[:, :tokens]
    with set_forward_context(None, config, num_tokens=tokens), torch.inference_mode():
        model(positions=positions, intermediate_tensors=None, **arguments)


def _place(module: fx.GraphModule, device: str) -> None:
    """Meta tensors become ones of the platform: it is what its own trace would have said."""

    def placed(value: Any) -> Any:
        return torch.device(device) if isinstance(value, torch.device) and value.type == "meta" else value

    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor) and value.device.type == "meta":
            with value.fake_mode:
                node.meta["example_value"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        if node.op not in ("placeholder", "output"):
            node.args = fx.node.map_aggregate(node.args, placed)
            node.kwargs = fx.node.map_aggregate(node.kwargs, placed)
