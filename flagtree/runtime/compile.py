"""`torch.compile(model, backend="flagtree")`: the registered backend.

A graph that the store knows by its capture key runs from there: no AOTAutograd, nothing of the compiler is imported.
On a miss the compiler is imported, once, here.
"""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from flagtree.artifact.code import code_digest
from flagtree.artifact.files import canonical_json, parse_json
from flagtree.artifact.store import Miss, Store
from flagtree.errors import CaptureError, FlagtreeError, StoreError, ToolchainError
from flagtree.runtime import cpu, gpu
from flagtree.runtime.capture_key import CaptureKey, Unkeyed, capture_key
from flagtree.runtime.launch import Executable
from flagtree.runtime.parts import home_of, split
from flagtree.runtime.prepare import Library
from flagtree.runtime.results import Results, size
from flagtree.runtime.strides import Restride
from flagtree.runtime.whole_call import Function
from flagtree.settings import settings

log = logging.getLogger("flagtree")

KIND = "graph"


def backend(module: fx.GraphModule, example_inputs: Sequence[Any], **options: object) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured.  With gradients it goes through AOTAutograd, forward and backward apart."""
    if options:
        what = f"unknown option '{next(iter(options))}' for torch.compile with flagtree"
        raise FlagtreeError(what, hint="it takes none; `flagtree --help` lists the FLAGTREE_* variables")
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return _training(module, example_inputs)
    return compiled(module)


def _training(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch.utils._python_dispatch import _disable_current_modes

    def compile_half(half: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        with _disable_current_modes():  # AOTAutograd calls us under its fake mode; constants and arenas are real
            return make_boxed_func(compiled(half))

    def compile_backward(half: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        with _disable_current_modes():
            return make_boxed_func(_of_any_strides(half))

    # what is written without a gradient (running statistics) is written by the graph rather than copied after it
    through_aot = aot_autograd(
        fw_compiler=compile_half, bw_compiler=compile_backward, inference_compiler=compile_half, keep_inference_input_mutations=True
    )
    return through_aot(module, example_inputs)


def compiled(module: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a callable over its placeholders: from the store, else built now, else (an internal failure) as it is."""
    if (why := _unsupported(home_of(module))) is not None:
        return _as_it_is(module, why)
    split_up = split(module, _of_any_strides)
    return _compiled_whole(module) if split_up is None else split_up


def _of_any_strides(module: fx.GraphModule) -> Callable[..., Any]:
    """Compile a graph whose arguments Dynamo does not guard."""
    with observed() as graphs:
        run = compiled(module)
    for graph in graphs:
        graph.restride = Restride(graph.executable)
    return run


def _target(home: torch.device) -> tuple[str, str]:
    """The target for graphs on this device, and the CPU's level."""
    if home.type == "cpu":
        return "cpu", cpu.levels()[0] if cpu.levels() else ""
    return gpu.target_name(home) or "", ""


def _factors(target: str, level: str) -> dict[str, str]:
    """What else decides the result: versions, settings, and the state of torch that tracing reads."""
    state = {
        "torch": torch.__version__,
        "flagtree": code_digest(),
        "target": target,
        "level": level,
        "default dtype": str(torch.get_default_dtype()),
        "autocast": " ".join(f"{torch.is_autocast_enabled(kind)} {torch.get_autocast_dtype(kind)}" for kind in ("cpu", "cuda")),
    }
    return state | {f"setting.{name}": str(value) for name, value in settings.key_factors().items()}


def _compiled_whole(module: fx.GraphModule) -> Callable[..., Any]:
    target, level = _target(home_of(module))
    try:
        key: CaptureKey | None = capture_key(module, _factors(target, level))
    except Unkeyed as reason:
        key = None
        log.info("a graph has no capture key: %s", reason)
    if key is not None and (found := _from_store(module, key)) is not None:
        return found
    try:
        return _built(module, key, target, level)
    except ToolchainError:
        raise
    except CaptureError as refusal:  # not a failure: no program carries what this graph does, and the next start need not find out again
        _keep(key, [], {"refused": refusal.what}, {})  # as it is a graph is right for all sizes that Dynamo's guards let through
        return _as_it_is(module, refusal.what)
    except Exception as error:
        if settings.on_error == "raise":
            raise
        return _as_it_is(module, _report(module, error))


def _unsupported(home: torch.device) -> str | None:
    if home.type not in ("cpu", "cuda"):  # torch's word for every GPU that it drives as it drives CUDA's
        return f"tensors on {home.type}: there is no path for that device"
    if home.type == "cuda" and gpu.target_name(home) is None:
        return f"no target fits the device {torch.cuda.get_device_properties(home).name}"
    return None


def _as_it_is(module: fx.GraphModule, reason: str) -> Callable[..., Any]:
    """The whole graph as one extern: right, and said aloud."""
    log.warning("flagtree runs a graph of %d nodes as one extern: %s", len(module.graph.nodes), reason)
    return module.forward


def _report(module: fx.GraphModule, error: Exception) -> str:
    """Leave a reproducer and say in one line what went wrong."""
    from flagtree.reproducer import write

    error.reproducer = {"graph.txt": str(module.graph)}  # type: ignore[attr-defined]
    folder = write(error, ["torch.compile", 'backend="flagtree"'])
    first = (str(error).splitlines() or [""])[0]
    return f"internal failure, {type(error).__name__}: {first}; the reproducer is in {folder}"


# -- from the store ----------------------------------------------------------------------------------------------------
def _from_store(module: fx.GraphModule, key: CaptureKey) -> Callable[..., Any] | None:
    entry = Store().get(KIND, key.digest)
    if isinstance(entry, Miss):
        log.info("capture key %s: %s", key.digest[:16], entry.reason)
        return None
    meta: Any = parse_json(entry.files["graph.json"], "a stored graph")
    if not _hold(meta["conditions"], key):
        log.info("capture key %s: stored for other sizes", key.digest[:16])
        return None
    if settings.debug:
        sys.stderr.write(f"flagtree graph-{key.digest[:16]}: from the store\n")
    if "refused" in meta:
        return _as_it_is(module, meta["refused"])
    constants = {}
    if "constants.safetensors" in entry.files:
        import safetensors.torch

        constants = safetensors.torch.load(entry.files["constants.safetensors"])
    return Callee(module, meta["launch"], entry.files, meta["results"], constants)


_RELATIONS = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def _hold(conditions: Sequence[Sequence[Any]], key: CaptureKey) -> bool:
    """Evaluate the guards that the first compilation added; doing so on Dynamo's own sizes adds them to its guards again."""
    return all(bool(_RELATIONS[op](size(left, key.sizes), size(right, key.sizes))) for op, left, right in conditions)


# -- built now ---------------------------------------------------------------------------------------------------------
def _built(module: fx.GraphModule, key: CaptureKey | None, target: str, level: str) -> Callable[..., Any]:
    from flagtree.capture.dynamo import compile_graph

    name = f"graph-{key.digest[:16]}" if key else "graph"
    graph = compile_graph(module, key.renamed if key else {}, target, level, settings.jobs, name)
    files = dict(graph.kernels)
    if graph.constants:
        import safetensors.torch

        files["constants.safetensors"] = safetensors.torch.save({n: t.contiguous() for n, t in graph.constants.items()})
    _keep(key, graph.conditions, {"launch": graph.launch, "results": graph.results}, files)
    return Callee(module, graph.launch, graph.kernels, graph.results, graph.constants)


def _library(home: torch.device, files: Mapping[str, bytes]) -> Library | None:
    """The kernels among a graph's files: a shared object for the CPU, else launch records with their binaries."""
    if home.type == "cpu":
        return cpu.load_library(files["kernels.so"]) if "kernels.so" in files else None
    launches: Any = parse_json(files["kernels.json"], "a stored graph's kernels")
    device = gpu.find_device(_target(home)[0], home)
    return gpu.GpuLibrary(device, launches, lambda digest, file: files[f"{digest[:16]}.{file}"], "a compiled graph")


def _keep(key: CaptureKey | None, conditions: list | None, graph: dict[str, Any], files: dict[str, bytes]) -> None:
    """Store what a graph became under its capture key, where it has one and its conditions can be written down."""
    if key is None or conditions is None:
        return
    content = {"graph.json": canonical_json({**graph, "conditions": conditions}), **files}
    try:
        Store().put(KIND, key.digest, content, {"refused": graph["refused"]} if "refused" in graph else None)
    except StoreError as error:
        log.warning("compiled, but not kept: %s", error)


_observers: list[list[Callee]] = []


@contextmanager
def observed() -> Iterator[list[Callee]]:
    """The graphs that are compiled, or taken from the store, within the context, in order."""
    found: list[Callee] = []
    _observers.append(found)
    try:
        yield found
    finally:
        _observers[:] = [other for other in _observers if other is not found]


class Callee:
    """A compiled graph over its placeholders, in order.  Returns a tuple as the graph does."""

    def __init__(
        self, module: fx.GraphModule, launch: dict, files: Mapping[str, bytes], results: list, constants: dict[str, torch.Tensor]
    ) -> None:
        self.eager, self.launch = module.forward, launch
        self.executable = Executable(launch, _library(home_of(module), files), constants)
        self.call = self.executable.call
        self.states = [i for i, b in enumerate(self.executable.inputs) if b.role == "state"]
        self.results = Results(results, launch["symbols"], [b.name for b in self.executable.inputs])
        self.restride: Restride | None = None
        self._whole: Function | None = None  # one call from here to the kernels and back
        for found in _observers:
            found.append(self)

    def __call__(self, *given: Any) -> tuple:
        if self._whole is not None and (results := self._whole(*given)) is not None:
            return results
        args = given if self.restride is None else self.restride(given)
        if args is None:
            return self.eager(*given)  # a written argument that lies otherwise than tracing believed
        if self.states and self._overlap(args):
            return self.eager(*args)  # a written input shares memory with another: the order of single elements matters
        results = self.results(self.call(args), args)
        if self.restride is None and not self.states and self.results.in_order and len(results) == len(self.launch["outputs"]):
            self._whole = self.executable.whole
        return results

    def _overlap(self, args: Sequence[Any]) -> bool:
        homes = [a.untyped_storage().data_ptr() if isinstance(a, torch.Tensor) and a.numel() else None for a in args]
        return any(homes[i] is not None and homes.count(homes[i]) > 1 for i in self.states)
